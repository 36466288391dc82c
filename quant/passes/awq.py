"""AWQ: channels that carry large activations are scaled up before rounding, so that they lose less (Lin et al., 2024).

    r_j = mean|x_j|^ratio / sqrt(max r min r),    W' = W diag(r),  X' = X diag(1 / r)

per group of readers the ratio of least output error on kept calibration tokens (equations 4 and 5, a grid of 20 as in the
paper), with weights and activations rounded as they will be served. Folded into the layer before. The clipping search that
belongs to AWQ is the quantizer's (`gptq` with search, here on Gram blocks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.folds import BlockView, InputGroup
from quant.passes.base import Transform
from quant.passes.smooth import fold_best

RATIOS = tuple(i / 20 for i in range(20))  # 0 first: no scaling wins a tie


class Pass(Transform):
    """No options."""

    def apply(self, view: BlockView) -> dict[str, str]:
        def candidates(group: InputGroup) -> list[Tensor]:
            size = torch.cat(group.stats.rows).abs().mean(0)
            return [scales(size, ratio) for ratio in RATIOS]

        return fold_best(view, candidates)


def scales(size: Tensor, ratio: float) -> Tensor:
    """r [K] = size^ratio, divided by the geometric mean of its largest and smallest value, for mean absolute inputs [K]."""
    r = size.clamp_min(1e-4) ** ratio
    return r / (r.max() * r.min()).sqrt()
