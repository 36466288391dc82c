"""The tile loop of every quantized GEMM, and the ordered sum of a split K.

    y[m, n] = x_scale[m] * row_scale[n] * sum_k x[m, k] * w[n, k] + bias[n]

`gemm` is one body; its constexprs select the weight policy (UNPACK, see `unpack.py`), the arithmetic (COMPUTE: "int8" adds
in int32, exactly; "fp16", "bf16", "fp32" in float32), where the group scale is applied and which operand comes first. The
layouts are described in `kernels/gpu/layout.py`. With SPLIT > 1 each program adds one stretch of K into partial sums
[SPLIT, M, N] and `combine` adds those in index order, so the result never depends on which program finished first.

The loop has no masks on the weights: rows past N are those of the next block or the slack of the layout. Rows of x past the
last token are clamped to it, or with FEW not loaded: sixteen readers of one row, in every program at once, cost a single token
up to 70 % (measured on an H200).
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"
# ruff: noqa: RUF005 (Triton has no iterable unpacking)

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.unpack import group_scale


@triton.jit
def bfloat16_bits(y):
    """float32 -> the bits of the nearest bfloat16, half to even, as int16. NaN stays NaN.

    Own rounding, because the interpreter truncates; done here, because a float32 store and a cast outside would write
    three times the bytes and launch once more.
    """
    bits = y.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(y == y, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def finish(acc, m, n, x_scale_ptr, row_scale_ptr, bias_ptr, y_ptr, M, N):
    """Sums [BM, BN] -> scaled, biased, rounded and stored. An int16 y_ptr takes the bits of bfloat16."""
    in_m, in_n = m < M, n < N
    y = acc.to(tl.float32) * tl.load(row_scale_ptr + n, mask=in_n, other=0.0)[None, :]
    if x_scale_ptr is not None:
        y = y * tl.load(x_scale_ptr + m, mask=in_m, other=0.0)[:, None]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if y_ptr.dtype.element_ty == tl.int16:
        y = bfloat16_bits(y)
    y_offset = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["M"])
def gemm(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    word_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    X_STRIDE,
    BLOCKS,
    W_STRIDE,
    PLANE_STRIDE,
    WORD_STRIDE,
    UNPACK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PLANES: tl.constexpr,
    SLICES: tl.constexpr,
    SLICE: tl.constexpr,
    GROUPS: tl.constexpr,
    MIXED: tl.constexpr,
    RAGGED: tl.constexpr,
    FEW: tl.constexpr,
    ON_SUM: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SWAP: tl.constexpr,
    INLINE: tl.constexpr,
):
    """One [BM, BN] tile, or its partial sums.

    x [M, X_STRIDE]; w uint8 [BLOCKS, PLANES, N, SLICE] (+ slack), W_STRIDE and PLANE_STRIDE in bytes; words int32
    [BLOCKS, GROUPS, N] (+ slack), WORD_STRIDE = GROUPS * N, or 0 when one word serves all of a row; y [M, N].
    MIXED: bytes of a word are in the order k, k + 2, k + 1, k + 3. RAGGED: x ends at K inside the last block. FEW: tokens are
    often fewer than BM. ON_SUM: the group scale multiplies the sum of a group, not the weights. SWAP: weights are the left
    operand of the MMA.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, SLICE)
    if MIXED and not INLINE:  # the plain twin leaves the bytes where they are and reorders x instead
        k = (k & -4) | ((k & 1) << 1) | ((k & 2) >> 1)
    x_row = tl.minimum(m, M - 1).to(tl.int64) * X_STRIDE
    w_row = tl.arange(0, BN) * SLICE
    w_ptr += tl.program_id(1).to(tl.int64) * (BN * SLICE)
    if GROUPS > 0:
        word_ptr += n
    PRECISION: tl.constexpr = "tf32x3" if INLINE else "ieee"  # float32 tokens only: three products restore what one loses
    SUM: tl.constexpr = tl.int32 if COMPUTE == "int8" else tl.float32
    if SWAP:
        x_offset = x_row[None, :] + k[:, None]
        x_k, x_in = k[:, None], (m < M)[None, :]
        w_offset = w_row[:, None] + tl.arange(0, SLICE)[None, :]
        acc = tl.zeros((BN, BM), SUM)
    else:
        x_offset = x_row[:, None] + k[None, :]
        x_k, x_in = k[None, :], (m < M)[:, None]
        w_offset = w_row[None, :] + tl.arange(0, SLICE)[:, None]
        acc = tl.zeros((BM, BN), SUM)
    first, last = 0, BLOCKS
    if SPLIT > 1:
        stretch = tl.cdiv(BLOCKS, SPLIT)
        first = tl.program_id(2) * stretch
        last = tl.minimum(first + stretch, BLOCKS)
        w_ptr += first.to(tl.int64) * W_STRIDE
        x_ptr += first * (SLICES * SLICE)
        if GROUPS > 0:
            word_ptr += first * WORD_STRIDE
    for b in range(first, last):
        planes = ()
        for p in tl.static_range(PLANES):
            planes = planes + (tl.load(w_ptr + p * PLANE_STRIDE + w_offset),)
        words = ()
        for g in tl.static_range(GROUPS):
            word = tl.load(word_ptr + g * N)
            words = words + ((word[:, None] if SWAP else word[None, :]),)
        w = UNPACK(planes, words, COMPUTE, not ON_SUM, INLINE)
        part = tl.zeros(acc.shape, SUM) if ON_SUM else acc
        for i in tl.static_range(SLICES):
            if RAGGED:
                inside = x_k + (b * (SLICES * SLICE) + i * SLICE) < K
                if FEW:
                    inside = inside & x_in
                x = tl.load(x_ptr + i * SLICE + x_offset, mask=inside, other=0)
            elif FEW:
                x = tl.load(x_ptr + i * SLICE + x_offset, mask=x_in, other=0)
            else:
                x = tl.load(x_ptr + i * SLICE + x_offset)
            if COMPUTE == "fp32":
                x = x.to(tl.float32)
            if SWAP:
                part = tl.dot(w[i], x, part, out_dtype=SUM, input_precision=PRECISION)
            else:
                part = tl.dot(x, w[i], part, out_dtype=SUM, input_precision=PRECISION)
            if ON_SUM and (i + 1) % (SLICES // GROUPS) == 0:
                acc += part * group_scale(words[i * GROUPS // SLICES], tl.float32)
                part = tl.zeros(acc.shape, SUM)
        if not ON_SUM:
            acc = part
        w_ptr += W_STRIDE
        x_ptr += SLICES * SLICE
        if GROUPS > 0:
            word_ptr += WORD_STRIDE
    if SWAP:
        acc = tl.trans(acc)
    if SPLIT > 1:
        at = (tl.program_id(2).to(tl.int64) * M + m.to(tl.int64)[:, None]) * N + n[None, :]
        tl.store(y_ptr + at, acc, mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        finish(acc, m, n, x_scale_ptr, row_scale_ptr, bias_ptr, y_ptr, M, N)


@triton.jit(do_not_specialize=["M"])
def combine(
    part_ptr,
    x_scale_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Partial sums [SPLIT, M, N], float32 or int32, added in index order -> y [M, N]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    acc = tl.load(part_ptr + at, mask=inside, other=0)
    for s in tl.static_range(1, SPLIT):
        acc += tl.load(part_ptr + s * M.to(tl.int64) * N + at, mask=inside, other=0)
    finish(acc, m, n, x_scale_ptr, row_scale_ptr, bias_ptr, y_ptr, M, N)
