"""The Triton programs of A8W4: per-token int8 activations, then int8 x dual-grained int4 -> int32 -> float.

`quantize_rows` reproduces `kernels.activation.quantize_token` bit for bit; `matmul_tile` is an exact integer GEMM with a
float32 epilogue. Both must be compiled with `enable_fp_fusion=False`: a fused multiply-add would skip the rounding of
x * (1 / scale) that the reference makes, and move codes at ties. Layouts are described in `kernels/gpu/a8w4.py`.

Inline assembly is used where `INLINE` is set (NVIDIA); the interpreter and other GPUs run the plain twin of the same step.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.activation import ABSMAX_FLOOR

FLOOR = tl.constexpr(ABSMAX_FLOOR)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, half to even, and leaves it in the low bits

# Four bytes, two nibbles each -> eight int8 weights. $2: packed codes; $3: parameter word (s_lo, b_lo, s_hi, b_hi).
# u * s + b stays in 0..255 for every code, so one 32-bit multiply-add serves four bytes without a carry; the xor takes
# 128 off each byte. AFFINE: both halves use (s_lo, b_lo). AFFINE_PAIR: the high half has its own group.
AFFINE = tl.constexpr("""{ .reg .b32 lo, hi, s, b;
prmt.b32 s, $3, 0, 0x4440; prmt.b32 b, $3, 0, 0x1111;
and.b32 lo, $2, 0x0f0f0f0f; shr.b32 hi, $2, 4; and.b32 hi, hi, 0x0f0f0f0f;
mad.lo.u32 lo, lo, s, b; mad.lo.u32 hi, hi, s, b;
xor.b32 $0, lo, 0x80808080; xor.b32 $1, hi, 0x80808080; }""")
AFFINE_PAIR = tl.constexpr("""{ .reg .b32 lo, hi, s, b;
prmt.b32 s, $3, 0, 0x4440; prmt.b32 b, $3, 0, 0x1111;
and.b32 lo, $2, 0x0f0f0f0f; shr.b32 hi, $2, 4; and.b32 hi, hi, 0x0f0f0f0f;
mad.lo.u32 lo, lo, s, b; prmt.b32 s, $3, 0, 0x4442; prmt.b32 b, $3, 0, 0x3333; mad.lo.u32 hi, hi, s, b;
xor.b32 $0, lo, 0x80808080; xor.b32 $1, hi, 0x80808080; }""")


@triton.jit
def quantize_rows(x_ptr, q_ptr, scale_ptr, K, K_PAD, BLOCK: tl.constexpr):
    """One program per token: x [M, K] float -> q int8 [M, K_PAD] (zeros past K), scale float32 [M].

    A token that holds a NaN or an infinity gets an infinite scale, so its outputs are not finite either.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), FLOOR, tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * K + start + lane, mask=start + lane < K, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(x == x, tl.abs(x), float("inf")))
    scale = tl.div_rn(tl.max(top, 0), 127.0)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, K_PAD, BLOCK):
        x = tl.load(x_ptr + row * K + start + lane, mask=start + lane < K, other=0.0).to(tl.float32)
        code = (x * inverse + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)  # |x * inverse| <= 127: no clamp needed
        tl.store(q_ptr + row * K_PAD + start + lane, code, mask=start + lane < K_PAD)


@triton.jit
def restore_int8(packed, word, SHAPE: tl.constexpr, PAIR: tl.constexpr, INLINE: tl.constexpr):
    """packed uint8 [SHAPE], word int32 broadcastable to it -> the int8 weights of the low and of the high nibbles."""
    if INLINE:
        asm: tl.constexpr = AFFINE_PAIR if PAIR else AFFINE
        args = [packed, tl.broadcast_to(word, SHAPE)]
        low, high = tl.inline_asm_elementwise(asm, "=r,=r,r,r,r,r,r", args, dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        s_low, b_low, s_high, b_high = word & 255, (word >> 8) & 255, (word >> 16) & 255, (word >> 24) & 255
        low = (((packed & 15).to(tl.int32) * s_low + b_low) ^ 128).to(tl.int8)
        high = (((packed >> 4).to(tl.int32) * s_high + b_high) ^ 128).to(tl.int8)
    return low, high


@triton.jit
def bfloat16_bits(y):
    """float32 -> the bits of the nearest bfloat16, half to even, as int16. NaN stays NaN.

    Own rounding, because the interpreter truncates; done here, because a float32 store and a cast outside would write
    three times the bytes and launch once more.
    """
    bits = y.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(y == y, rounded, 0x7FC0).to(tl.int16)


@triton.jit(do_not_specialize=["M"])
def matmul_tile(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    word_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    BLOCKS,
    X_STRIDE,
    W_STRIDE,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    PAIR: tl.constexpr,
    SWAP: tl.constexpr,
    BIAS: tl.constexpr,
    BF16: tl.constexpr,
    INLINE: tl.constexpr,
):
    """One [BM, BN] tile of y = (x @ w8^T) * row_scale[n] * x_scale[m] + bias[n].

    x int8 [M, X_STRIDE], w uint8 [BLOCKS, N, HALF] (+ slack rows), word int32 [BLOCKS, N] (+ slack), y [M, N].
    W_STRIDE = N * HALF as int64. SWAP: weights are the left operand of the MMA. BF16: y_ptr points to int16.
    The loop has no masks: rows of x are clamped to the last token, rows of w past N are those of the next block or the
    slack, K is padded; only the stores are masked.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, HALF)
    x_row = tl.minimum(m, M - 1).to(tl.int64) * X_STRIDE
    w_row = tl.arange(0, BN) * HALF
    w_ptr += tl.program_id(1).to(tl.int64) * (BN * HALF)
    words = word_ptr + n
    if SWAP:
        SHAPE: tl.constexpr = (BN, HALF)
        x_offset = x_row[None, :] + k[:, None]
        w_offset = w_row[:, None] + k[None, :]
        acc = tl.zeros((BN, BM), tl.int32)
    else:
        SHAPE: tl.constexpr = (HALF, BN)
        x_offset = x_row[:, None] + k[None, :]
        w_offset = w_row[None, :] + k[:, None]
        acc = tl.zeros((BM, BN), tl.int32)
    for _ in range(0, BLOCKS):
        packed = tl.load(w_ptr + w_offset)
        x_low = tl.load(x_ptr + x_offset)
        x_high = tl.load(x_ptr + HALF + x_offset)
        word = tl.load(words)
        w_low, w_high = restore_int8(packed, word[:, None] if SWAP else word[None, :], SHAPE, PAIR, INLINE)
        if SWAP:
            acc = tl.dot(w_low, x_low, acc, out_dtype=tl.int32)
            acc = tl.dot(w_high, x_high, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x_low, w_low, acc, out_dtype=tl.int32)
            acc = tl.dot(x_high, w_high, acc, out_dtype=tl.int32)
        w_ptr += W_STRIDE
        x_ptr += 2 * HALF
        words += N
    if SWAP:
        acc = tl.trans(acc)
    in_m, in_n = m < M, n < N
    y = acc.to(tl.float32) * tl.load(row_scale_ptr + n, mask=in_n, other=0.0)[None, :]
    y = y * tl.load(x_scale_ptr + m, mask=in_m, other=0.0)[:, None]
    if BIAS:
        y = y + tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if BF16:
        y = bfloat16_bits(y)
    y_offset = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])
