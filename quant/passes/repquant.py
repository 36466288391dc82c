"""RepQuant: quantize a norm's output channel by channel, then turn that exactly into one scale and one zero per layer.

For the output X [T, K] of a norm, per channel j a scale s_j and a zero z_j; of the layer, st = mean(s), zt = round(mean(z)):
    r = s / st,  shift = (zt - z) st       X' = X / r - shift, folded into the norm;  W' = W r,  bias' = bias + W' shift
    clamp(round(X' / st) + zt)  ==  clamp(round(X / s) + z)            the layer-wise codes are the channel-wise ones
(RepQuant, Li et al., 2024; RepQ-ViT, Li et al., 2023, with an integer zt so that the equality holds to the last code.)
A norm without bias (RMSNorm) takes the scale alone. Its grid is then symmetric, or, where the activation rule stores a zero
per channel, keeps its z_j there: they cost a constant per output.

Ends of the channels' ranges: percentiles of least squared error, then "dual clipping", each end free. Gradient-free here:
channel by channel, the ratio of each end, 1 to 0.5, of least error at the readers' outputs given the errors of all other
channels. Inputs that no norm makes get one grid per layer, its two ends searched for the same error.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from quant.folds import BlockView, InputGroup
from quant.kernels.activations.int_static import SEARCHED, IntStatic, evenly, grid, on_grid, search_ends
from quant.kernels.rotation import by_matrix
from quant.passes.base import Transform

PERCENTILES = (0.999, 0.9999, 0.99999)
RATIOS = tuple(1.0 - 0.025 * i for i in range(21))  # 1.0 down to 0.5
GRID_TOKENS = 256  # that the two ends of a layer's one grid are searched on
LARGEST_R = 100.0  # r stays in 1 / LARGEST_R .. LARGEST_R, so that a norm's weight stays in float16's range


class Pass(Transform):
    """For readers of int_static. clip: how the ends of a channel's range are found, `dual` starting from `percentile`."""

    rows: ClassVar[int] = 64
    shifts: ClassVar[bool] = True
    clip: Literal["percentile", "dual"] = "dual"

    def apply(self, view: BlockView) -> dict[str, str]:
        refused = {}
        for group in view.groups:
            if not group.stats.data:
                continue
            rule, *more = {view.schemes[name][1] for name in group.names}
            if not any(isinstance(each, IntStatic) for each in (rule, *more)):
                continue
            if more or not isinstance(rule, IntStatic):
                given = " and ".join(map(str, (rule, *more)))
                refused[group.names[0]] = f"its input is read by {given}, not by one int_static"
                continue
            if group.maker is not None:
                reason = "its input is rotated" if rule.rotate else self.reparameterize(view, group, group.maker, rule)
                if reason is None:
                    continue
                refused[group.names[0]] = f"one grid for all channels, {reason}"
            group.stats.inputs = layer_grid(view, group, rule)
        return refused

    def reparameterize(self, view: BlockView, group: InputGroup, maker: str, rule: IntStatic) -> str | None:
        """Fold a channel-wise grid into the norm that makes the group's input; why that is impossible, or None."""
        shifted = getattr(view.module(maker), "bias", None) is not None
        symmetric = not shifted and rule.zeros == "layer"
        x, counts = searched(group)
        low, high = percentile_ends(x, counts, rule.levels, symmetric)
        if self.clip == "dual":
            low, high = dual_clip(x, counts, importance(view, group), low, high, rule.levels, symmetric)
        scale, zero = channel_grid(low, high, rule.levels, symmetric)
        st, zt, r, z = to_layer(scale, zero, (low + high) / 2, rule.levels)
        reason = view.fold(group, r, (zt - z) * st if shifted else None)
        if reason is None:
            group.stats.inputs = rule.stored(st, zt if shifted or symmetric else z, len(r))
        return reason


def searched(group: InputGroup, most: int = SEARCHED) -> tuple[Tensor, Tensor]:
    """Kept tokens [T, K], `most` of them where there are more, and how many tokens each stands for [T]."""
    x, counts = group.stats.sample()
    some = evenly(len(x), x.device, most)
    return x[some], counts[some]


def importance(view: BlockView, group: InputGroup) -> Tensor:
    """[K, K] by which an error e of the input weighs e A e^T: squared output errors of the readers, relative to each output."""
    total = torch.zeros_like(group.stats.gram)
    for name in group.names:
        weight = view.linear(name).weight
        total += weight.T @ weight / ((weight @ group.stats.gram) * weight).sum().clamp_min(1e-30)
    return total


def percentile_ends(x: Tensor, counts: Tensor, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """low, high [K]: of the percentiles of each channel of x [T, K], those of least squared error; token t counts counts[t]."""
    best = torch.full_like(x[0], torch.inf)
    low, high = torch.zeros_like(best), torch.zeros_like(best)
    for p in PERCENTILES:
        upper, lower = x.quantile(p, dim=0), x.quantile(1 - p, dim=0)
        error = counts @ (on_grid(x, *channel_grid(lower, upper, levels, symmetric), levels) - x).square()
        better = error < best
        best, low, high = (torch.where(better, a, b) for a, b in ((error, best), (lower, low), (upper, high)))
    return low, high


def channel_grid(low: Tensor, high: Tensor, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and integer zero per channel; symmetric: the zero is levels / 2 and the larger end counts."""
    if not symmetric:
        return grid(low, high, levels)
    top = torch.maximum(-low, high)
    scale, _ = grid(-top, top, levels)
    return scale, torch.full_like(scale, levels / 2)


def dual_clip(
    x: Tensor, counts: Tensor, weight: Tensor, low: Tensor, high: Tensor, levels: int, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """low, high [K] whose sum_t counts_t e_t A e_t^T is no larger than before: e the rounding errors of x [T, K], A `weight`.

    Channel by channel, all others held; ends shrink towards 0, or towards the middle of a range that does not hold 0.
    """
    low, high = low.clone(), high.clone()
    error = on_grid(x, *channel_grid(low, high, levels, symmetric), levels) - x
    pull = error @ weight
    ratios = torch.tensor(RATIOS, device=x.device)
    for j in range(x.shape[1]):
        column, own = x[:, j], weight[j, j]
        rest = counts * (pull[:, j] - own * error[:, j])
        center = torch.where((low[j] <= 0) & (high[j] >= 0), 0.0, (low[j] + high[j]) / 2)
        for end in (high, low):
            tried = torch.lerp(center, end[j], ratios)
            ends = (low[j].expand_as(tried), tried) if end is high else (tried, high[j].expand_as(tried))
            scale, zero = channel_grid(*ends, levels, symmetric)
            errors = on_grid(column, scale.unsqueeze(1), zero.unsqueeze(1), levels) - column  # [ratios, T]
            best = (own * (errors.square() @ counts) + 2 * (errors @ rest)).argmin()
            end[j] = tried[best]
        pull.addr_(errors[best] - error[:, j], weight[j])
        error[:, j] = errors[best]
    return low, high


def to_layer(scale: Tensor, zero: Tensor, middle: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """st [], zt [], r [K] and z [K] of a layer from its channels' scale and zero [K] and the middle of their ranges [K].

    A channel that never moves has no scale of its own: it gets that of the layer, and its value the code zt. Where r had to be
    clamped, z is such that the middle of the range stays in the middle.
    """
    dead = scale <= scale.max() * 1e-6
    st = scale[~dead].mean() if not dead.all() else torch.ones_like(scale[0])
    zt = torch.round(zero[~dead].mean()) if not dead.all() else torch.round(zero.new_tensor(levels / 2))
    r = torch.where(dead, 1.0, scale / st)
    held = r.clamp(1 / LARGEST_R, LARGEST_R)
    z = torch.where(held == r, zero, torch.round((levels - 1) / 2 - middle / (held * st)))
    return st, zt, held, torch.where(dead, zt - torch.round(middle / st), z)


def layer_grid(view: BlockView, group: InputGroup, rule: IntStatic) -> dict[str, Tensor]:
    """Stored tensors of one grid for all channels, its ends searched for the readers' relative squared output error."""
    x, counts = searched(group, GRID_TOKENS)
    weights = [view.linear(name).weight for name in group.names]
    weight = torch.cat([w / (x @ w.T).norm().clamp_min(1e-15) for w in weights])
    x, weight = by_matrix(x, rule.rotate), by_matrix(weight, rule.rotate).T

    def loss(low: Tensor, high: Tensor) -> Tensor:
        error = on_grid(x, *grid(low, high, rule.levels), rule.levels) - x
        return counts @ (error @ weight).square().sum(1)

    return rule.stored(*grid(*search_ends(x.amin(), x.amax(), loss), rule.levels), x.shape[1])
