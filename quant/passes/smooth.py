"""Smoothing: move activation outliers into the weights, by channel, folded into the layer before.

percentile  r_j = max(1, a_j / P), a_j the channel's absmax, P the k-th largest a_j, k = floor(top * K + 1.5); only outliers
            move (DGQ, official code; left alone when P < 1e-4).
migrate     r_j = a_j^strength / w_j^(1 - strength), w_j the absmax of column j over the readers (SmoothQuant, Xiao et al.,
            2023, equation 4).
balance     r_j = rms(x_j)^strength / ||w_j||^(1 - strength), for rotated inputs. A rotation spreads a block's rounding error
            evenly, so that tokens and weights both lose  sum_b (sum_{j in b} x_j^2 / r_j^2) (sum_{j in b} w_j^2 r_j^2)  over
            the blocks b, which is least at strength 0.5, by Cauchy and Schwarz, whatever the blocks are. ||w_j|| is of the
            columns of all readers, each relative to its output. SmolLM2-135M with float weights and rotated 4-bit inputs in
            groups of 64: KL 0.131 without, 0.079 with it.
search      per group of readers, whichever of r = 1, percentile, and migrate at strengths 0.1 to 0.9 leaves the least output
            error when weights and activations are quantized as they will be served, on calibration tokens that were kept.
learn       the winner of search, then gradient descent on log r. With rounding errors taken as independent and uniform, the
            squared output error is, but for a common factor, the sum of two terms that r trades against each other,
                tokens   a^2 sum_t (max_j |x_tj| / r_j)^2 sum_j (r_j ||w_j||)^2
                weights  b^2 sum_ng (max_{j in g} |w_nj| r_j)^2 sum_{j in g} (||x_j|| / r_j)^2
            with a and b the steps of a token's and of a weight group's unit range. Kept where it serves better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from quant.folds import BlockView, InputGroup
from quant.kernels.activation import Activation
from quant.kernels.format import Format
from quant.kernels.rotation import by_matrix
from quant.passes.base import Transform
from quant.search import output_error
from quant.stats import InputStats

STRENGTHS = tuple(i / 10 for i in range(1, 10))


class Pass(Transform):
    """only: leaf names of the readers to smooth (empty: all that a fold can reach). skip: leaf names left alone."""

    method: Literal["percentile", "migrate", "balance", "search", "learn"] = "percentile"
    top: float = Field(0.005, gt=0, lt=1)
    strength: float = Field(0.5, ge=0, le=1)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def apply(self, view: BlockView) -> dict[str, str]:
        refused = {}
        for group in view.groups:
            leaves = {name.rpartition(".")[2] for name in group.names}
            if (self.only and not leaves & set(self.only)) or leaves & set(self.skip):
                continue
            reason = view.fold(group, self.factors(view, group)) if group.stats.data else "too few calibration tokens"
            if reason:
                refused[group.names[0]] = reason
        return refused

    def factors(self, view: BlockView, group: InputGroup) -> Tensor:
        """r [K] for one input group."""
        if self.method == "percentile":
            return percentile_factors(group.stats.absmax, self.top)
        if self.method == "balance":
            return balance_factors(group.stats, [view.linear(name).weight for name in group.names], self.strength)
        absmax = group.stats.absmax
        columns = torch.stack([view.linear(name).weight.abs().amax(0) for name in group.names]).amax(0)
        if self.method == "migrate":
            return migration_factors(absmax, columns, self.strength)
        candidates = [torch.ones_like(absmax), percentile_factors(absmax, self.top)]
        candidates += [migration_factors(absmax, columns, strength) for strength in STRENGTHS]
        error = served_error(view, group)
        best = min(candidates, key=error)
        if self.method == "learn":
            best = min(best, learned_factors(view, group, best), key=error)
        return best


def fold_best(view: BlockView, candidates: Callable[[InputGroup], list[Tensor]]) -> dict[str, str]:
    """Fold, for every group of readers, the factors r [K] of least served error; returns what was refused, as `apply` does."""
    refused = {}
    for group in view.groups:
        reason: str | None = "too few calibration tokens"
        if group.stats.data:
            reason = view.fold(group, min(candidates(group), key=served_error(view, group)))
        if reason:
            refused[group.names[0]] = reason
    return refused


def served_error(view: BlockView, group: InputGroup) -> Callable[[Tensor], float]:
    """r [K] -> relative squared output error of the group's readers, summed, with X / r and W r rounded to the nearest code."""
    x = torch.cat(group.stats.rows)
    layers = []
    for name in group.names:
        weight = view.linear(name).weight
        wanted = x @ weight.T
        layers.append((weight, view.schemes[name], wanted, wanted.square().sum().clamp_min(1e-30)))

    def error(r: Tensor) -> float:
        total = 0.0
        for weight, (fmt, activation), wanted, signal in layers:
            lost = served_output(x / r, weight * r, fmt, activation) - wanted
            total += float(lost.square().sum() / signal)
        return total

    return error


def served_output(x: Tensor, weight: Tensor, fmt: Format, activation: Activation) -> Tensor:
    """[T, N] of tokens x [T, K] and weight [N, K], both rotated and rounded to the nearest code as the scheme says."""
    tokens, turned = by_matrix(x, activation.rotate), by_matrix(weight, activation.rotate)
    seen = activation.quantize(tokens, activation.fit(tokens, tokens.abs().amax(0)))
    return seen @ fmt.dequantize(fmt.nearest(turned)).T


def percentile_factors(absmax: Tensor, top: float = 0.005) -> Tensor:
    """r [K] >= 1 that brings every channel above the (1 - top) percentile down to it; ones when that is below 1e-4."""
    rank = int(top * len(absmax) + 1.5)
    level = absmax.sort(descending=True).values[rank - 1]
    return (absmax / level).clamp_min(1) if level >= 1e-4 else torch.ones_like(absmax)


def migration_factors(absmax: Tensor, columns: Tensor, strength: float) -> Tensor:
    """r [K] = absmax^strength / columns^(1 - strength); 1 for channels that are zero on either side."""
    r = absmax.clamp_min(1e-5) ** strength / columns.clamp_min(1e-5) ** (1 - strength)
    return torch.where((absmax > 0) & (columns > 0), r.clamp(1e-4, 1e4), 1.0)


def balance_factors(stats: InputStats, weights: list[Tensor], strength: float = 0.5) -> Tensor:
    """r [K] = rms(x_j)^strength / ||w_j||^(1 - strength), of geometric mean 1; 1 for channels that are zero on either side."""
    power, columns = stats.gram.diagonal(), torch.zeros_like(stats.gram[0])
    for weight in weights:
        columns += weight.square().sum(0) / max(output_error(weight, stats.gram), 1e-30)
    live = (power > 0) & (columns > 0)
    log_r = torch.where(live, (strength * power.log() - (1 - strength) * columns.log()) / 2, 0.0)
    log_r = torch.where(live, log_r - log_r.sum() / live.sum().clamp_min(1), 0.0)
    return log_r.exp().clamp(1e-4, 1e4)


@torch.enable_grad()
def learned_factors(view: BlockView, group: InputGroup, start: Tensor, steps: int = 60, rate: float = 0.05) -> Tensor:
    """r [K] after gradient descent from `start` on the expected error of `learn`."""
    rows = torch.cat(group.stats.rows)
    x, energy = rows.abs(), rows.square().sum(0)
    layers = []
    for name in group.names:
        weight, (fmt, activation) = view.linear(name).weight.detach(), view.schemes[name]
        signal = (rows @ weight.T).square().sum().clamp_min(1e-30)
        token_step = 0.0 if activation.name == "none" else 1 / 127
        size = getattr(fmt, "group", -1)
        by_group = (len(start) // size, size) if size > 0 else (1, len(start))
        layers.append(
            (weight.abs(), weight.square().sum(0), by_group, token_step, 2 / (2 ** getattr(fmt, "bits", 4) - 1), signal)
        )
    log_r = start.log().requires_grad_()
    optimizer = torch.optim.Adam([log_r], lr=rate)
    for _ in range(steps):
        r = log_r.exp()
        peaks, spread = (x / r).amax(1).square().sum(), energy / r.square()
        loss = torch.zeros(())
        for size_w, columns, by_group, token_step, weight_step, signal in layers:
            tops = (size_w * r).view(-1, *by_group).amax(2).square().sum(0)  # over rows
            weights = weight_step**2 * (tops * spread.view(by_group).sum(1)).sum()
            loss = loss + (token_step**2 * peaks * (columns * r.square()).sum() + weights) / signal
        optimizer.zero_grad()
        loss.log().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return log_r.detach().exp()
