"""Group steps fitted to the codes that rounding chose, by least squares over whole rows.

For a row w with levels v (code minus zero point, or the value of a float code) a layer's squared output error is a quadratic
in its K / G steps s,

    (w - sum_g s_g v_g)^T H (w - sum_g s_g v_g),       v_g: v inside group g, 0 elsewhere

so the best steps solve A s = b with A_gh = v_g^T H v_h and b_g = v_g^T H w. (As the scale update of PV-Tuning's and
AQLM's layer-wise phase, for one-dimensional codes.) Steps that were searched before rounding are never optimal after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from quant.grid import Grid
from quant.rounding import coordinate_descent

RIDGE = 1e-3  # share of A's diagonal that holds a step where it was: groups whose inputs are almost zero stay put
CHUNK_ROWS = 512


G = TypeVar("G", bound=Grid)


def refit(
    weight: Tensor, gram: Tensor, codes: Tensor, grid: G, storable: Callable[[Tensor], Tensor], rounds: int
) -> tuple[Tensor, G]:
    """Codes [N, K] and grid after rounds of fitted steps, as `storable` rounds them, and of one sweep over the codes."""
    for _ in range(rounds):
        grid = replace(grid, step=storable(refit_steps(weight, gram, grid.levels(codes), grid.step)))
        codes = coordinate_descent(weight, gram, codes, grid, 1)
    return codes, grid


def refit_steps(weight: Tensor, gram: Tensor, levels: Tensor, step: Tensor) -> Tensor:
    """Steps float32 [N, K // G] of least squared output error for levels float32 [N, K].

    weight float32 [N, K], gram [K, K], step: those that the codes were chosen with. A row whose solution is not finite or
    would turn a step's sign keeps its steps.
    """
    parts = zip(*(torch.split(t, CHUNK_ROWS) for t in (weight, levels, step)), strict=True)
    fitted = torch.cat([_refit_rows(w, gram, v.unsqueeze(1), s.unsqueeze(1)) for w, v, s in parts]).squeeze(1)
    return torch.where((fitted > 0).all(-1, keepdim=True), fitted, step)


def refit_planes(weight: Tensor, gram: Tensor, planes: Tensor, scales: Tensor) -> Tensor:
    """The same where a weight is a sum of P scaled planes: planes float32 [N, P, K], scales [N, P, K // G] of any sign."""
    parts = zip(*(torch.split(t, CHUNK_ROWS) for t in (weight, planes, scales)), strict=True)
    return torch.cat([_refit_rows(w, gram, v, s) for w, v, s in parts])


def _refit_rows(weight: Tensor, gram: Tensor, planes: Tensor, scales: Tensor) -> Tensor:
    n, count, groups = scales.shape
    v = planes.view(n, count, groups, -1)
    size = v.shape[-1]
    wanted = ((weight @ gram).view(n, 1, groups, size) * v).sum(-1).flatten(1)  # b [N, P * groups]
    normal = torch.empty(n, count * groups, count * groups, device=weight.device)  # A
    for p in range(count):
        for g in range(groups):
            pull = v[:, p, g] @ gram[g * size : (g + 1) * size]  # H v_g [N, K]
            normal[:, p * groups + g] = (pull.view(n, 1, groups, size) * v).sum(-1).flatten(1)
    before = scales.flatten(1)
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    solved, info = torch.linalg.solve_ex(normal + torch.diag_embed(ridge), wanted + ridge * before)
    good = (info == 0) & solved.isfinite().all(-1)
    return torch.where(good.unsqueeze(-1), solved, before).view(scales.shape)
