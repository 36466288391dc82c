"""FP4 blocks (MXFP4, NVFP4): each block's 8-bit scale by search on its Gram block, codes by GPTQ and coordinate descent.

A scale is only ever tried as it will be stored, and judged by d^T H_gg d (`search.block_loss`) of the weights rounded under it:
    nearest    the block's absmax at the end of E2M1, as the format's own baseline: rule EVEN for mxfp4
    floor      mxfp4: E = floor(log2 a) - 2, the OCP baseline; the largest values may saturate
    rceil      mxfp4: E = ceil(log2(a / 6)), never saturates
    four_six   nvfp4: absmax at 6 or at 4, whichever loses less (Four Over Six, arXiv 2512.02010)
    shrink     nvfp4: absmax scaled by 1.00, 0.99 .. 0.81 (the MSE observer of llm-compressor, with this loss)
    sweep      every stored scale around the one of `nearest`: 0.5 to 2 times for nvfp4, 1/4 to 2 times for mxfp4
The divisor of nvfp4 is a power of two that puts the largest block scale into (128, 256]: exact to divide by, with room above
for `four_six` and `sweep`, and rows come out the same whatever other rows share it. Scales are frozen before codes are
rounded, so act-order costs nothing on disk (GPTQ on FP4 grids: MR-GPTQ, arXiv 2509.23202).

Output error over plain rounding's, mean of eight layers of SmolLM2-135M on text that was not calibrated on, before and after
GPTQ: nvfp4 nearest 1.00 and 0.63, four_six 0.85 and 0.58, sweep 0.69 and 0.55; mxfp4 nearest 1.00 and 0.565, rceil 1.05 and
0.590, sweep 0.955 and 0.571. So a finer choice of scale pays with E4M3 and not with powers of two. Choosing scales and codes
together block by block afterwards gains another 1 %, refitting the scales in closed form nothing: E4M3 is too coarse for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from quant.grid import FloatGrid
from quant.kernels.format import Codes, Format
from quant.kernels.formats.fp4_block import (
    BIAS,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Fp4Block,
    even_exponent,
    power_divisor,
)
from quant.kernels.minifloat import E2M1
from quant.passes.base import GridRounder
from quant.rounding import coordinate_descent, gptq
from quant.search import block_loss, by_rows, gram_blocks
from quant.stats import InputStats

Search = Literal["nearest", "floor", "rceil", "four_six", "shrink", "sweep"]
KIND_OF = {"floor": "mxfp4", "rceil": "mxfp4", "four_six": "nvfp4", "shrink": "nvfp4"}  # searches that one kind has


class Pass(GridRounder):
    """search: how a block's scale is chosen."""

    search: Search = "sweep"

    def refuses(self, fmt: Format) -> str | None:
        if not isinstance(fmt, Fp4Block):
            return f"fp4 writes fp4_block, not {fmt.name}; use gptq or rtn for int_group, dgq for int4_dual"
        if KIND_OF.get(self.search, fmt.kind) != fmt.kind:
            return f"fp4 has search {self.search} for {KIND_OF[self.search]} only, not for {fmt.kind} of fp4_block; use sweep"
        return None

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        assert isinstance(fmt, Fp4Block)
        gram = self.gram(stats)
        blocks = gram_blocks(gram, fmt.group)
        whole = {"weight_global_scale": power_divisor(weight.abs().amax())} if fmt.kind == "nvfp4" else {}
        (scale,) = by_rows(lambda rows: (search_scale(fmt, rows, blocks, whole, self.search),), weight)
        params = {"weight_scale": scale, **whole}
        if self.round == "nearest":
            return fmt.encode(weight, params)
        grid = FloatGrid(fmt.steps(params), E2M1)
        codes = gptq(weight, gram, grid, act_order=self.act_order, damp=self.damp)
        return Codes(coordinate_descent(weight, gram, codes, grid, self.sweeps), params)


def search_scale(fmt: Fp4Block, weight: Tensor, blocks: Tensor, whole: dict[str, Tensor], how: Search) -> Tensor:
    """`weight_scale` [N, K // G] as stored, of least block loss among the candidates of `how`; the first of equal ones.

    weight float32 [N, K], blocks [K // G, G, G], whole: the divisor [1] of nvfp4.
    """
    w = weight.view(weight.shape[0], -1, fmt.group)
    absmax = w.abs().amax(-1)
    tried = mx_candidates(absmax, how) if fmt.kind == "mxfp4" else nv_candidates(absmax, whole["weight_global_scale"], how)
    best, least = None, torch.full_like(absmax, torch.inf)
    for scale in tried:
        step = fmt.steps({"weight_scale": scale, **whole}).unsqueeze(-1)
        loss = block_loss(w - E2M1.round(w / step) * step, blocks)
        better = loss < least
        least = torch.where(better, loss, least)
        best = scale if best is None else torch.where(better, scale.view(torch.uint8), best.view(torch.uint8)).view(scale.dtype)
    assert best is not None
    return best


def mx_candidates(absmax: Tensor, how: Search) -> Iterator[Tensor]:
    """E8M0 scales uint8 of a block's absmax a; see the head of this file."""
    bits = absmax.view(torch.int32)
    if how == "floor":
        exponents = [(bits >> 23) - BIAS - 2]
    elif how == "rceil":
        sixth = (absmax / E2M1.largest).view(torch.int32)
        exponents = [(sixth + 0x7FFFFF >> 23) - BIAS]
    else:
        exponents = [even_exponent(absmax) + move for move in ((0, -1, 1, -2) if how == "sweep" else (0,))]
    for exponent in exponents:
        yield (exponent.clamp(-BIAS, BIAS) + BIAS).to(torch.uint8)


def nv_candidates(absmax: Tensor, divisor: Tensor, how: Search) -> Iterator[Tensor]:
    """E4M3 scales of a block's absmax a under a divisor; positive codes of E4M3 are ordered as integers."""
    base = absmax / E2M1.largest * divisor
    factors = {"four_six": (1.0, 1.5), "shrink": tuple(1 - i / 100 for i in range(20))}.get(how, (1.0,))
    stored = [(base * factor).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float8_e4m3fn) for factor in factors]
    yield from stored
    if how == "sweep":
        low, high = (
            int(torch.tensor(end).to(torch.float8_e4m3fn).view(torch.uint8)) for end in (SMALLEST_SCALE, LARGEST_SCALE)
        )
        code = stored[0].view(torch.uint8).int()
        for move in (m for distance in range(1, 9) for m in (distance, -distance)):  # eight codes are a factor of two
            yield (code + move).clamp(low, high).to(torch.uint8).view(torch.float8_e4m3fn)
