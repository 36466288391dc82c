"""Weights that are sums of entries of codebooks times float tokens, and the same weights as a dense matrix.

Entries are gathered inside the K loop from a codebook that the caches hold. The sum over the books is that of their products: a
dot for each, added in float32, so no sum of entries is rounded.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.gemm import bfloat16_bits, finish

ENTRIES = tl.constexpr(256)


@triton.jit
def entries(book_ptr, code, GROUP: tl.constexpr):
    """uint8 [R, T] -> their entries [R, T * GROUP]."""
    at = (code.to(tl.int32) * GROUP)[:, :, None] + tl.arange(0, GROUP)[None, None, :]
    return tl.reshape(tl.load(book_ptr + at), (code.shape[0], code.shape[1] * GROUP))


@triton.jit(do_not_specialize=["M"])
def codebook_gemm(
    x_ptr,
    code_ptr,
    book_ptr,
    row_scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    X_STRIDE,
    TILES,
    PLANE_STRIDE,
    GROUP: tl.constexpr,
    BOOKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One [BM, BN] tile of y [M, N], or with SPLIT > 1 of partial sums [SPLIT, M, N]. Weights are the left operand: their rows
    fill the MMA however few the tokens are.

    x [M, X_STRIDE]; codes uint8 [BOOKS, N, TILES], TILES = K / GROUP, PLANE_STRIDE = N * TILES; book [BOOKS, 256, GROUP] in the
    type of x, or float16 for float32 tokens, which meet it in float32; row_scale float32 [N]. RAGGED: BK does not divide K.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    column, tile = tl.arange(0, BK), tl.arange(0, BK // GROUP)
    x_at = m.to(tl.int64)[None, :] * X_STRIDE + column[:, None]
    code_at = tl.minimum(n, N - 1).to(tl.int64)[:, None] * TILES + tile[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    stretch = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    first = tl.program_id(2) * stretch
    for k in range(first, tl.minimum(first + stretch, K), BK):
        seen = (m < M)[None, :]
        if RAGGED:
            seen = seen & (column < K - k)[:, None]
        x = tl.load(x_ptr + k + x_at, mask=seen, other=0.0)
        if COMPUTE == "fp32":
            x = x.to(tl.float32)
        for b in tl.static_range(BOOKS):
            at = code_ptr + b * PLANE_STRIDE + k // GROUP + code_at
            code = tl.load(at, mask=(tile < TILES - k // GROUP)[None, :], other=0) if RAGGED else tl.load(at)
            w = entries(book_ptr + b * ENTRIES * GROUP, code, GROUP)
            if COMPUTE == "fp32":
                w = w.to(tl.float32)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
    acc = tl.trans(acc)
    if SPLIT > 1:
        at = (tl.program_id(2).to(tl.int64) * M + m.to(tl.int64)[:, None]) * N + n[None, :]
        tl.store(y_ptr + at, acc, mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        finish(acc, m, n, None, row_scale_ptr, bias_ptr, y_ptr, M, N)


@triton.jit
def codebook_dense(
    code_ptr,
    book_ptr,
    row_scale_ptr,
    dense_ptr,
    N,
    K,
    TILES,
    PLANE_STRIDE,
    GROUP: tl.constexpr,
    BOOKS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A [BN, BK] tile of dense [N, K], rounded once; codes and book as above, the book in float16. An int16 dense_ptr takes the
    bits of bfloat16."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    tile = tl.program_id(2) * (BK // GROUP) + tl.arange(0, BK // GROUP)
    at = n.to(tl.int64)[:, None] * TILES + tile[None, :]
    inside = (n < N)[:, None] & (tile < TILES)[None, :]
    value = tl.zeros((BN, BK), tl.float32)
    for b in tl.static_range(BOOKS):
        code = tl.load(code_ptr + b * PLANE_STRIDE + at, mask=inside, other=0)
        value += entries(book_ptr + b * ENTRIES * GROUP, code, GROUP).to(tl.float32)
    value = value * tl.load(row_scale_ptr + n, mask=n < N, other=0.0)[:, None]
    if dense_ptr.dtype.element_ty == tl.int16:
        value = bfloat16_bits(value)
    k = tl.program_id(2) * BK + tl.arange(0, BK)
    to = n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dense_ptr + to, value.to(dense_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
