"""Smoothing: move activation outliers into the weights, by channel, folded into the layer before.

percentile  r_j = max(1, a_j / P), a_j the channel's absmax, P the k-th largest a_j, k = floor(top * K + 1.5); only outliers
            move (DGQ, official code; left alone when P < 1e-4).
migrate     r_j = a_j^strength / w_j^(1 - strength), w_j the absmax of column j over the readers (SmoothQuant, Xiao et al.,
            2023, equation 4).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from quant.folds import BlockView, InputGroup
from quant.passes.base import Transform


class Pass(Transform):
    """only: leaf names of the readers to smooth (empty: all that a fold can reach). skip: leaf names left alone."""

    method: Literal["percentile", "migrate"] = "percentile"
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
            reason = view.fold(group, self.factors(view, group))
            if reason:
                refused[group.names[0]] = reason
        return refused

    def factors(self, view: BlockView, group: InputGroup) -> Tensor:
        """r [K] for one input group."""
        if self.method == "percentile":
            return percentile_factors(group.stats.absmax, self.top)
        columns = torch.stack([view.linear(name).weight.abs().amax(0) for name in group.names]).amax(0)
        return migration_factors(group.stats.absmax, columns, self.strength)


def percentile_factors(absmax: Tensor, top: float = 0.005) -> Tensor:
    """r [K] >= 1 that brings every channel above the (1 - top) percentile down to it; ones when that is below 1e-4."""
    rank = int(top * len(absmax) + 1.5)
    level = absmax.sort(descending=True).values[rank - 1]
    return (absmax / level).clamp_min(1) if level >= 1e-4 else torch.ones_like(absmax)


def migration_factors(absmax: Tensor, columns: Tensor, strength: float) -> Tensor:
    """r [K] = absmax^strength / columns^(1 - strength); 1 for channels that are zero on either side."""
    r = absmax.clamp_min(1e-5) ** strength / columns.clamp_min(1e-5) ** (1 - strength)
    return torch.where((absmax > 0) & (columns > 0), r.clamp(1e-4, 1e4), 1.0)
