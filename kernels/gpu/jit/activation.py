"""The activation program: optional input vector, row absmax, int8 codes and, where asked for, sums of the codes by group.

Reproduces `kernels.activations.int_token.quantize_token` (of x / divisor) bit for bit. It must be compiled with fusion off: a
fused multiply-add would skip the rounding of x * (1 / scale) that the reference makes, and move codes at ties.
"""

# Triton takes its argument types from the launch; an annotation other than constexpr would not compile.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-redef"

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.activation import ABSMAX_FLOOR

FLOOR = tl.constexpr(ABSMAX_FLOOR)
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, half to even, and leaves it in the low bits


@triton.jit
def load_row(x_ptr, divisor_ptr, at, K):
    x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    if divisor_ptr is not None:
        x = tl.div_rn(x, tl.load(divisor_ptr + at, mask=at < K, other=1.0))
    return x


@triton.jit
def quantize_rows(x_ptr, divisor_ptr, q_ptr, scale_ptr, sum_ptr, K, K_PAD, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """One program per token: x [M, K] float -> q int8 [M, K_PAD] (zeros past K), scale float32 [M].

    divisor float32 [K] or None; sum int32 [M, K_PAD / GROUP] or None, GROUP a power of two that divides BLOCK and K_PAD.
    A token that holds a NaN or an infinity gets an infinite scale, so its outputs are not finite either.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    x_ptr += row * K
    top = tl.full((BLOCK,), FLOOR, tl.float32)
    for start in range(0, K, BLOCK):
        x = load_row(x_ptr, divisor_ptr, start + lane, K)
        top = tl.maximum(top, tl.where(x == x, tl.abs(x), float("inf")))
    scale = tl.div_rn(tl.max(top, 0), 127.0)
    tl.store(scale_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, K_PAD, BLOCK):
        x = load_row(x_ptr, divisor_ptr, start + lane, K)
        code = (x * inverse + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)  # |x * inverse| <= 127: no clamp needed
        tl.store(q_ptr + row * K_PAD + start + lane, code, mask=start + lane < K_PAD)
        if sum_ptr is not None:
            sums = tl.sum(tl.reshape(code.to(tl.int32), (BLOCK // GROUP, GROUP)), 1)
            g = start // GROUP + tl.arange(0, BLOCK // GROUP)
            tl.store(sum_ptr + row * (K_PAD // GROUP) + g, sums, mask=g < K_PAD // GROUP)
