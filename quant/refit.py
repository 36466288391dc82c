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
    return torch.cat([_refit_rows(w, gram, v, s) for w, v, s in parts])


def _refit_rows(weight: Tensor, gram: Tensor, levels: Tensor, step: Tensor) -> Tensor:
    n, groups = step.shape
    v = levels.view(n, groups, -1)
    size = v.shape[-1]
    wanted = ((weight @ gram).view(n, groups, size) * v).sum(-1)  # b [N, groups]
    normal = torch.empty(n, groups, groups, device=weight.device)  # A
    for g in range(groups):
        pull = v[:, g] @ gram[g * size : (g + 1) * size]  # H v_g [N, K]
        normal[:, g] = (pull.view(n, groups, size) * v).sum(-1)
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    solved, info = torch.linalg.solve_ex(normal + torch.diag_embed(ridge), wanted + ridge * step)
    good = (info == 0) & (solved.isfinite() & (solved > 0)).all(-1)
    return torch.where(good.unsqueeze(-1), solved, step)
