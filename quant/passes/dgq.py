"""DGQ: dual-grained A8W4. A float scale per row, an integer step per group, one uninterrupted INT8 GEMM.

Two-phase search (Dual Grained Quantization, Zhang et al., 2023, in the form of its official code) on Gram blocks:
1. per group, the float step S and zero point z that lose least (`search.search_grid`);
2. per row, the row scale s1 on a grid of ratios; each group then gets s2 = round(S / s1), held at the largest step for
   which all 16 codes stay inside int8.
What differs from the paper: the loss is d^T H_gg d over all tokens instead of an output error on the last sample; 0 is
forced into each range; overflow is excluded by bounding s2 for all 16 codes instead of clamping the codes used; a third
step re-chooses each group's (s2, z) around phase 2's answer; codes may be rounded on the dual grid by GPTQ and coordinate
descent; and the row scale is refitted to the final codes in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.format import Codes, Format
from quant.kernels.formats.int4_dual import Int4Dual, factor_steps, largest_step
from quant.passes.base import GridRounder
from quant.search import block_loss, by_rows, gram_blocks, on_grid, search_grid
from quant.stats import InputStats

ROW_RATIOS = tuple(1.0 - 0.04 * i for i in range(20))  # 1.00 down to 0.24


class Pass(GridRounder):
    """refine: third search step. refit: closed-form row scale."""

    refine: bool = True
    refit: bool = True

    def refuses(self, fmt: Format) -> str | None:
        return None if isinstance(fmt, Int4Dual) else f"dgq writes int4_dual, not {fmt.name}; use gptq or rtn for int_group"

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        assert isinstance(fmt, Int4Dual)
        gram = self.gram(stats)
        blocks = gram_blocks(gram, fmt.group)
        row_scale, s2, zero = by_rows(lambda rows: self.search(rows, blocks), weight)
        codes = self.codes(weight, gram, row_scale.unsqueeze(-1) * s2, zero, 16)
        if self.refit:
            row_scale = refit_row_scale(weight, gram, fmt, Codes(codes, fmt.params(row_scale, s2, zero)))
        return Codes(codes, fmt.params(row_scale, s2, zero))

    def search(self, weight: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The dual grid of some rows: row_scale [N], s2 and zero [N, K // G]."""
        step, zero = search_grid(weight, blocks, 16)
        row_scale, s2 = search_row_scale(weight, blocks, step, zero)
        return row_scale, *(refine_groups(weight, blocks, row_scale, s2, zero) if self.refine else (s2, zero))


def search_row_scale(
    weight: Tensor, blocks: Tensor, step: Tensor, zero: Tensor, ratios: tuple[float, ...] = ROW_RATIOS
) -> tuple[Tensor, Tensor]:
    """Phase 2: row_scale [N] and s2 [N, K // G] of least summed block loss over `ratios` of the range-covering scale."""
    n = weight.shape[0]
    w = weight.view(n, blocks.shape[0], -1)
    best = torch.full((n,), torch.inf, device=weight.device)
    row_scale, s2 = factor_steps(step, zero)
    for ratio in ratios:
        s1, steps = factor_steps(step, zero, ratio)
        loss = block_loss(w - on_grid(w, s1.unsqueeze(-1) * steps, zero, 16), blocks).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        row_scale = torch.where(better, s1, row_scale)
        s2 = torch.where(better.unsqueeze(-1), steps, s2)
    return row_scale, s2


def refine_groups(
    weight: Tensor, blocks: Tensor, row_scale: Tensor, s2: Tensor, zero: Tensor, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """Per group, move s2 and z by at most one per round while the block loss falls. Shapes as in phase 2."""
    w = weight.view(weight.shape[0], blocks.shape[0], -1)

    def loss_of(steps: Tensor, zeros: Tensor) -> Tensor:
        return block_loss(w - on_grid(w, row_scale.unsqueeze(-1) * steps, zeros, 16), blocks)

    best = loss_of(s2, zero)
    for _ in range(rounds):
        s2_center, zero_center = s2, zero
        for ds in (-1, 0, 1):
            for dz in (-1, 0, 1):
                zeros = (zero_center + dz).clamp(0, 15)
                steps = torch.minimum((s2_center + ds).clamp_min(1), largest_step(zeros))
                loss = loss_of(steps, zeros)
                better = loss < best
                best = torch.where(better, loss, best)
                s2 = torch.where(better, steps, s2)
                zero = torch.where(better, zeros, zero)
    return s2, zero


def refit_row_scale(weight: Tensor, gram: Tensor, fmt: Int4Dual, codes: Codes) -> Tensor:
    """The s1 that minimizes (w - s1 v)^T H (w - s1 v) for the integers v = w8: s1 = w^T H v / v^T H v, [N].

    Rows where that is not a positive number (v^T H v = 0) keep their scale.
    """
    v = fmt.integers(codes).float()
    hv = v @ gram
    fitted = (weight * hv).sum(-1) / (v * hv).sum(-1)
    kept = codes.params["row_scale"]
    return torch.where((fitted > 0) & fitted.isfinite(), fitted, kept)
