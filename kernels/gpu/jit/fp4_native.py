"""FP4 times FP4 on the tensor cores that have it: tokens to codes and scales, and the GEMM on codes.

Both operands are read as compressed-tensors stores weights: two E2M1 codes a byte, even k in the low nibble, and a scale byte
per block of GROUP along K, E4M3 for 16 (nvfp4) and E8M0 for 32 (mxfp4). Products and sums are float32.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.gemm import finish

MAGIC = tl.constexpr(24576.0)  # 1.5 * 2^14, where float32 counts in 2^-9: adding it rounds to subnormals of E4M3
NAN_E4M3 = tl.constexpr(0x7F)
NAN_E8M0 = tl.constexpr(0xFF)


@triton.jit
def e4m3_code(x):
    """The code of the nearest E4M3, ties to even, of float32 x in [2^-9, 448]; as int32."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (x + MAGIC).to(tl.int32, bitcast=True) & 15
    return tl.where(x < 0.015625, small, normal)


@triton.jit
def e4m3_value(code):
    """float32 of an E4M3 code from 0 to 0x7E."""
    normal = ((code + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def e2m1_code(x, scale):
    """Codes of the nearest E2M1 to x / scale, ties to the even code, too large ones to 6; as int32, its sign in bit 3."""
    v = tl.div_rn(x, scale)
    sign = (v.to(tl.int32, bitcast=True) >> 28) & 8
    v = tl.abs(v)
    low = (v > 0.25).to(tl.int32) + (v >= 0.75).to(tl.int32) + (v > 1.25).to(tl.int32) + (v >= 1.75).to(tl.int32)
    return sign + low + (v > 2.5).to(tl.int32) + (v >= 3.5).to(tl.int32) + (v > 5.0).to(tl.int32)


@triton.jit
def e2m1_value(code):
    """float32 of E2M1 codes, the sign left out."""
    code = code & 7
    ahead = (((code >> 1) + 126) << 23 | (code & 1) << 22).to(tl.float32, bitcast=True)
    return tl.where(code < 2, code.to(tl.float32) * 0.5, ahead)


@triton.jit
def lost(x, code, scale):
    """Sum over each block of (|x| - value of its code)^2."""
    error = tl.abs(x) - e2m1_value(code) * scale
    return tl.sum(error * error, 1)


@triton.jit
def fp4_tokens(x_ptr, divisor_ptr, q_ptr, scale_ptr, K, BLOCK: tl.constexpr, GROUP: tl.constexpr, FOUR_SIX: tl.constexpr):
    """BLOCK elements of one token: x [M, K] float -> q uint8 [M, K / 2], scale uint8 [M, K / GROUP].

    divisor float32 [1] for GROUP 16, None for 32. FOUR_SIX: see `activations/nvfp4.py`. Rounds as the activation rules do; of
    two equally good scales of FOUR_SIX another may be taken, for sums are added in another order. A block that holds a NaN or
    an infinity gets NaN for its scale.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * (BLOCK // GROUP)
    block = first + tl.arange(0, BLOCK // GROUP)
    at = block[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * K + at, mask=at < K, other=0.0).to(tl.float32)
    if divisor_ptr is not None:
        x = x * tl.load(divisor_ptr)
    top = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    if GROUP == 32:
        raised = (top.to(tl.int32, bitcast=True) + (1 << 21)) >> 23
        code = tl.where(top > 0, tl.minimum(tl.maximum(raised - 2, 0), 254), 127)
        scale = tl.maximum(code << 23, 1 << 22).to(tl.float32, bitcast=True)
        q = e2m1_code(x, scale[:, None])
        code = tl.where(top < float("inf"), code, NAN_E8M0)
    else:
        top = tl.div_rn(top, 6.0)
        code = e4m3_code(tl.minimum(tl.maximum(top, 0.001953125), 448.0))
        scale = e4m3_value(code)
        q = e2m1_code(x, scale[:, None])
        if FOUR_SIX:
            other_code = e4m3_code(tl.minimum(tl.maximum(1.5 * top, 0.001953125), 448.0))
            other_scale = e4m3_value(other_code)
            other = e2m1_code(x, other_scale[:, None])
            better = lost(x, other, other_scale[:, None]) < lost(x, q, scale[:, None])
            q = tl.where(better[:, None], other, q)
            code = tl.where(better, other_code, code)
        code = tl.where(top < float("inf"), code, NAN_E4M3)
    low, high = tl.split(tl.reshape(q, (BLOCK // GROUP, GROUP // 2, 2)))
    byte = block[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    tl.store(q_ptr + row * (K // 2) + byte, (low | high << 4).to(tl.uint8), mask=byte < K // 2)
    tl.store(scale_ptr + row * (K // GROUP) + block, code.to(tl.uint8), mask=block < K // GROUP)


@triton.jit
def as_scale(byte, GROUP: tl.constexpr):
    """Scale bytes in the type by which `tl.dot_scaled` knows their format."""
    return byte.to(tl.float8e4nv, bitcast=True) if GROUP == 16 else byte


@triton.jit(do_not_specialize=["M"])
def fp4_gemm(
    q_ptr,
    q_scale_ptr,
    w_ptr,
    w_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One [BM, BN] tile of y [M, N], or with SPLIT > 1 of partial sums [SPLIT, M, N]. Weights are the left operand: their rows
    fill the MMA however few the tokens are.

    q uint8 [M, K / 2], w uint8 [N, K / 2], scales uint8 [., K / GROUP]; row_scale float32 [N].
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    byte, block = tl.arange(0, BK // 2), tl.arange(0, BK // GROUP)
    w_row, q_row = tl.minimum(n, N - 1).to(tl.int64), tl.minimum(m, M - 1).to(tl.int64)
    w_at, q_at = w_row[:, None] * (K // 2) + byte[None, :], q_row[None, :] * (K // 2) + byte[:, None]
    ws_at, qs_at = w_row[:, None] * (K // GROUP) + block[None, :], q_row[:, None] * (K // GROUP) + block[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    stretch = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    first = tl.program_id(2) * stretch
    for k in range(first, tl.minimum(first + stretch, K), BK):
        inside, scaled = byte < (K - k) // 2, block < (K - k) // GROUP
        w = tl.load(w_ptr + k // 2 + w_at, mask=inside[None, :], other=0)
        q = tl.load(q_ptr + k // 2 + q_at, mask=inside[:, None], other=0)
        w_scale = tl.load(w_scale_ptr + k // GROUP + ws_at, mask=scaled[None, :], other=0)
        q_scale = tl.load(q_scale_ptr + k // GROUP + qs_at, mask=scaled[None, :], other=0)
        acc = tl.dot_scaled(w, as_scale(w_scale, GROUP), "e2m1", q, as_scale(q_scale, GROUP), "e2m1", acc)
    acc = tl.trans(acc)
    if SPLIT > 1:
        at = (tl.program_id(2).to(tl.int64) * M + m.to(tl.int64)[:, None]) * N + n[None, :]
        tl.store(y_ptr + at, acc, mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        finish(acc, m, n, None, row_scale_ptr, bias_ptr, y_ptr, M, N)
