"""CrossQuant: an activation step made of a token's and a channel's maximum, deployed as a fold of the channel's part.

The paper's step for element (i, j) is D_ij = t_i^alpha c_j^(1 - alpha) / qmax with t_i the token's and c_j the channel's
absmax (CrossQuant, Liu et al., 2024, step size; `activations/cross_token.py` is that form, for evaluation). c_j lies on the
axis that is summed over, so it cannot leave an integer product. Here the calibrated k_j = (c_j / gmean(c))^(1 - alpha) moves
into the layer before and the weight, and the token keeps a plain scale of its own:

    x'_j = x_j / k_j,    W'_nj = W_nj k_j,    step_i = max_j |x'_ij| / qmax  <=  t_i^alpha c_j^(1 - alpha) / qmax

so no value is clipped. Folding is not free, because W' is harder to round: alpha is searched per input on the error as it will
be served. alpha = 1 (no fold) is always tried.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quant.folds import BlockView, InputGroup
from quant.passes.base import Transform
from quant.passes.smooth import fold_best

ALPHAS = (0.85, 0.7, 0.55, 0.4, 0.25, 0.15, 0.0)
LIMIT = 1e3  # factors stay within this of 1 either way


class Pass(Transform):
    """alphas: candidates, the paper's default being 0.15. quantile: c_j is this quantile over samples of the sample's absmax.

    by: one factor per channel, or one per weight group (the largest of it), which leaves the weight's codes as they were
    where a float scale per group can absorb it.
    """

    alphas: tuple[float, ...] = ALPHAS
    quantile: float = 1.0
    by: Literal["channel", "group"] = "channel"

    def apply(self, view: BlockView) -> dict[str, str]:
        def candidates(group: InputGroup) -> list[Tensor]:
            tops = group.stats.channel_quantile(self.quantile)
            if self.by == "group":
                tops = by_group(tops, getattr(view.schemes[group.names[0]][0], "group", -1))
            return [cross_factors(tops, alpha) for alpha in (1.0, *self.alphas)]

        return fold_best(view, candidates)


def cross_factors(tops: Tensor, alpha: float) -> Tensor:
    """k [K] = (c / gmean(c))^(1 - alpha) for channel maxima c [K], held within [1e-3, 1e3]; 1 for a dead channel."""
    alive = tops > 0
    if not alive.any():
        return torch.ones_like(tops)
    log_c = tops.clamp_min(torch.finfo(tops.dtype).tiny).log()
    factors = ((1 - alpha) * (log_c - log_c[alive].mean())).exp().clamp(1 / LIMIT, LIMIT)
    return torch.where(alive, factors, 1.0)


def by_group(tops: Tensor, group: int) -> Tensor:
    """The largest of each group of `group` channels, for all of its channels; group -1: of all channels."""
    size = len(tops) if group == -1 else group
    return tops.view(-1, size).amax(-1, keepdim=True).expand(-1, size).reshape(-1)
