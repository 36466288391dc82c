"""Clipping search on Gram blocks: which step and zero point lose least at a group's output.

The loss of a group is d^T H_gg d with d = w_g - q_g and H_gg the G x G block of X^T X on the diagonal, so its cost
does not depend on how many tokens were seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RATIOS = tuple(1.0 - 0.04 * i for i in range(13))  # 1.00 down to 0.52


CHUNK = 1 << 17  # weights searched at a time


def shrunk(gram: Tensor, amount: float) -> Tensor:
    """A [K, K] Gram matrix with its off-diagonal scaled by 1 - amount: what calibration text and served text share.

    Correlations between channels are what a method can overfit to a narrow calibration text; their sizes carry over.
    (A Ledoit-Wolf shrinkage with the diagonal as target.) On SmolLM2-135M it lowers perplexity on both the text that was
    calibrated on and on other text, where more damping, which also flattens the diagonal, does not.
    """
    return gram * (1 - amount) + torch.diag(amount * gram.diagonal())


def gram_blocks(gram: Tensor, group: int) -> Tensor:
    """The diagonal blocks of a [K, K] Gram matrix: [K // G, G, G]."""
    count = gram.shape[0] // group
    view = gram.view(count, group, count, group)
    return view[torch.arange(count), :, torch.arange(count), :]


def block_loss(error: Tensor, blocks: Tensor) -> Tensor:
    """d^T H_gg d: error [N, K // G, G], blocks [K // G, G, G] -> [N, K // G]."""
    by_group = error.transpose(0, 1)  # [K // G, N, G]
    return (torch.bmm(by_group, blocks) * by_group).sum(-1).T


def by_rows(search: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Run `search` on slices of rows of the given [N, ...] tensors and join its results.

    A search makes dozens of passes over its weights; slices that stay in a core's cache make it several times faster.
    """
    rows = max(1, CHUNK // tensors[0][0].numel())
    parts = [search(*chunk) for chunk in zip(*(torch.split(t, rows) for t in tensors), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def output_error(error: Tensor, gram: Tensor) -> float:
    """Sum over rows of d^T H d: error [N, K], gram [K, K]; in the units of the layer's squared output, summed over tokens."""
    return float(((error @ gram) * error).sum())


def search_grid(
    weight: Tensor, blocks: Tensor, levels: int, symmetric: bool = False, ratios: tuple[float, ...] = RATIOS
) -> tuple[Tensor, Tensor]:
    """Step and zero point per group that minimize the block loss over `ratios` of the group's range.

    weight float32 [N, K], blocks [K // G, G, G], levels = 2^bits. Returns step, zero, float32 [N, K // G]; step is 0
    where a group is all zero. The range is widened to hold 0, so that zero lies inside 0 .. levels - 1. Ratio 1 is in
    the grid, hence the loss never exceeds plain round-to-nearest. (DGQ, official code, phase 1, with these changes.)
    """
    n = weight.shape[0]
    w = weight.view(n, blocks.shape[0], -1)
    if symmetric:
        span = w.abs().amax(-1) / (levels // 2 - 1)
        low = torch.zeros_like(span)
    else:
        low = w.amin(-1).clamp_max(0)
        span = (w.amax(-1).clamp_min(0) - low) / (levels - 1)
    empty = span == 0
    span = torch.where(empty, 1.0, span)
    best = torch.full_like(span, torch.inf)
    step, zero = span.clone(), torch.zeros_like(span)
    for ratio in ratios:
        s = span * ratio
        z = torch.full_like(s, levels / 2) if symmetric else torch.round(-low * ratio / s).clamp_(0, levels - 1)
        loss = block_loss(w - on_grid(w, s, z, levels), blocks)
        better = loss < best
        best = torch.where(better, loss, best)
        step = torch.where(better, s, step)
        zero = torch.where(better, z, zero)
    return step.masked_fill(empty, 0), zero


def on_grid(w: Tensor, step: Tensor, zero: Tensor, levels: int) -> Tensor:
    """w [N, K // G, G] rounded to step * (0 .. levels - 1 minus zero)."""
    s, z = step.unsqueeze(-1), zero.unsqueeze(-1)
    return (torch.round(w / s).clamp_(-z, levels - 1 - z)) * s
