"""Two scales per group for weights of two bits, w ~ a1 B1 + a2 B2: a search, then alternating least squares.

Levels 0, a1, a2 and a1 + a2 with |a2| <= |a1| are rounded to as DB-LLM's FDB does (Chen et al., 2024): for given scales its two
thresholds choose the nearest level. For given planes the best scales of a group solve two linear equations,

    [B1'H B1  B1'H B2] [a1]   [B1'H w]
    [B2'H B1  B2'H B2] [a2] = [B2'H w]          H: the group's block of the Gram matrix, or its diagonal

DB-LLM starts from an equally spaced grid, a1 = -2 a2, and learns the rest; nothing is trained here.
"""

from __future__ import annotations

import torch
from torch import Tensor

RATIOS = tuple(0.2 + 0.05 * i for i in range(21))  # of half the group's largest magnitude, as the step
SINGULAR = 1e-4  # determinant over the product of the diagonal, below which a group keeps its scales


def ordered(scales: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The same weight with |a2| <= |a1|: scales [N, K // G, 2], uint8 codes [N, K], planes swapped where they have to be."""
    swap = scales[..., 1].abs() > scales[..., 0].abs()
    turned = torch.where(swap.unsqueeze(-1), scales.flip(-1), scales)
    there = swap.repeat_interleave(codes.shape[1] // swap.shape[1], 1)
    return turned, torch.where(there, codes >> 1 | (codes & 1) << 1, codes)


def planes(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """B1 and B2 of the nearest levels, float32: values [N, K // G, G], scales [N, K // G, 2] with |a2| <= |a1|."""
    a1, a2 = scales.unsqueeze(2).unbind(-1)
    first = ((values - (a1 + a2) / 2) * a1 >= 0).to(values.dtype)
    second = ((values - a1 * first - a2 / 2) * a2 > 0).to(values.dtype)
    return first, second


def weighed(values: Tensor, metric: Tensor) -> Tensor:
    """H v per group: values [N, K // G, G]; metric [K // G, G, G], blocks, or [K // G, G], their diagonals."""
    if metric.dim() == 2:
        return values * metric
    return torch.bmm(values.transpose(0, 1), metric).transpose(0, 1)


def lost(values: Tensor, scales: Tensor, metric: Tensor) -> Tensor:
    """(w - q)' H (w - q) per group, [N, K // G], at the nearest levels."""
    first, second = planes(values, scales)
    a1, a2 = scales.unsqueeze(2).unbind(-1)
    error = values - a1 * first - a2 * second
    return (weighed(error, metric) * error).sum(-1)


def fit(values: Tensor, first: Tensor, second: Tensor, scales: Tensor, metric: Tensor) -> Tensor:
    """The scales [N, K // G, 2] of least loss for given planes; those given where the planes are too alike or one is empty."""
    pulled = [weighed(plane, metric) for plane in (first, second)]
    s11, s12, s22 = ((pulled[i] * b).sum(-1) for i, b in ((0, first), (0, second), (1, second)))
    b1, b2 = ((p * values).sum(-1) for p in pulled)
    determinant = s11 * s22 - s12 * s12
    good = determinant > SINGULAR * s11 * s22
    solved = torch.stack((s22 * b1 - s12 * b2, s11 * b2 - s12 * b1), -1)
    solved = solved / torch.where(good, determinant, 1.0).unsqueeze(-1)
    return torch.where(good.unsqueeze(-1) & solved.isfinite(), solved, scales)


def search_scales(weight: Tensor, metric: Tensor, rounds: int, ratios: tuple[float, ...] = RATIOS) -> tuple[Tensor]:
    """Scales float32 [N, K // G, 2], 0 where a group is all zero; |a2| <= |a1|.

    weight float32 [N, K]. The best equally spaced grid over `ratios` and both orientations, then `rounds` of planes and scales;
    the best scales of all rounds. Ratio 1 is among them, hence no worse than round-to-nearest in this metric.
    """
    values = weight.view(weight.shape[0], len(metric), -1)
    top = values.abs().amax(-1)
    unit = torch.where(top > 0, top, 1.0) / 2
    best = torch.full_like(unit, torch.inf)
    scales = torch.stack((2 * unit, -unit), -1)
    for ratio in (1.0, *ratios):
        for sign in (1.0, -1.0):
            tried = torch.stack((2 * ratio * sign * unit, -ratio * sign * unit), -1)
            best, scales = better(best, scales, lost(values, tried, metric), tried)
    last = scales
    for _ in range(rounds):
        last = fit(values, *planes(values, last), last, metric)
        swap = last[..., 1].abs() > last[..., 0].abs()
        last = torch.where(swap.unsqueeze(-1), last.flip(-1), last)
        best, scales = better(best, scales, lost(values, last, metric), last)
    return (scales.masked_fill((top == 0).unsqueeze(-1), 0),)


def better(best: Tensor, scales: Tensor, loss: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller of two losses [N, K // G], and its scales."""
    smaller = loss < best
    return torch.where(smaller, loss, best), torch.where(smaller.unsqueeze(-1), tried, scales)
