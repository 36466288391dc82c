"""Quantization error propagation: aim at the float chain's output although the inputs come from quantized blocks.

    W' = W + strength * W D (H + damp * mean(diag H) * I)^-1,   H = X^T X,  D = (X_float - X)^T X

W' minimizes ||W X_float - W' X||^2, so a layer repairs some of what earlier blocks lost (Arai and Ichikawa, 2025;
GPTAQ, Li et al., 2025, uses the same term inside the rounding). strength 0 is plain layer-wise quantization.

Experts are left as they are: the two chains may send different tokens to them, so there is no X_float to aim at.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from quant.passes.base import Corrector
from quant.stats import InputStats


class Pass(Corrector):
    """strength: 0 to 1, how much of the correction to apply. damp: ridge, as a share of the mean Gram diagonal."""

    strength: float = Field(0.5, ge=0, le=1)
    damp: float = Field(0.1, gt=0)

    def correct(self, weight: Tensor, stats: InputStats) -> Tensor:
        if stats.drift is None:
            return weight
        return weight + self.strength * ridge_move(weight, stats, self.damp)


def ridge_move(weight: Tensor, stats: InputStats, damp: float) -> Tensor:
    """W D (H + damp * mean(diag H) * I)^-1, [N, K]: how the weight has to move to meet the output that the drift D leads to."""
    assert stats.drift is not None
    ridge = damp * stats.gram.diagonal().mean().clamp_min(1e-12)
    factor = torch.linalg.cholesky(stats.gram + ridge * torch.eye(len(stats.gram), device=weight.device))
    moved: Tensor = torch.cholesky_solve((weight @ stats.drift).T, factor).T
    return moved
