"""Packed weights -> a dense matrix, for so many tokens that unpacking once and a dense product are faster."""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef, assignment"
# ruff: noqa: RUF005 (Triton has no iterable unpacking)

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.gpu.jit.gemm import bfloat16_bits


@triton.jit
def dequantize(
    w_ptr,
    word_ptr,
    row_scale_ptr,
    dense_ptr,
    N,
    K,
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
    BN: tl.constexpr,
    INLINE: tl.constexpr,
):
    """BN rows of K block `program_id(2)` -> dense [N, K], times row_scale. The other arguments are those of `gemm`.

    A weight is rounded where `gemm` rounds it, and by row_scale once more: one of the two is exact in every format. An int16
    dense_ptr takes the bits of bfloat16.
    """
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    block = tl.program_id(2)
    w_ptr += block.to(tl.int64) * W_STRIDE + tl.program_id(1).to(tl.int64) * (BN * SLICE)
    word_ptr += block * WORD_STRIDE + row
    offset = (tl.arange(0, BN) * SLICE)[:, None] + tl.arange(0, SLICE)[None, :]
    planes = ()
    for p in tl.static_range(PLANES):
        planes = planes + (tl.load(w_ptr + p * PLANE_STRIDE + offset),)
    words = ()
    for g in tl.static_range(GROUPS):
        words = words + (tl.load(word_ptr + g * N)[:, None],)
    w = UNPACK(planes, words, COMPUTE, True, INLINE)
    scale = tl.load(row_scale_ptr + row, mask=row < N, other=0.0)[:, None]
    k = tl.arange(0, SLICE)
    if MIXED and not INLINE:  # the plain twin leaves the bytes where they are
        k = (k & -4) | ((k & 1) << 1) | ((k & 2) >> 1)
    for i in tl.static_range(SLICES):
        value = w[i].to(tl.float32) * scale
        if dense_ptr.dtype.element_ty == tl.int16:
            value = bfloat16_bits(value)
        column = block * (SLICES * SLICE) + i * SLICE + k
        at = row.to(tl.int64)[:, None] * K + column[None, :]
        tl.store(dense_ptr + at, value.to(dense_ptr.dtype.element_ty), mask=(row < N)[:, None] & (column < K)[None, :])
