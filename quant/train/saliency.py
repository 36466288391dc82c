"""A penalty on errors of weights that the model's loss feels: lam * R, R = mean over the block of F (W_q - W)^2.

F is the Fisher diagonal (`quant/fisher.py`), each layer's capped at a quantile, for it is heavy-tailed, then divided by its
mean over the block. lam is such that lam * R = share * loss before the first step: neither the size of the loss nor that of F
then matters, and one share serves every block. (Saliency-aware partial retraining, Cao and Aref, 2025, with R before low-rank
terms; theirs is a sum with a fixed lam, and has no cap.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.train.layer import Trained


def normalized(fisher: Mapping[str, Tensor], cap: float) -> dict[str, Tensor]:
    """Each F [N, K] at most its own `cap`-quantile, and all divided by their common mean; zeros stay zeros."""
    capped = {name: f.clamp_max(quantile(f, cap)) for name, f in fisher.items()}
    total, count = sum(float(f.sum()) for f in capped.values()), sum(f.numel() for f in capped.values())
    return {name: f * (count / max(total, 1e-30)) for name, f in capped.items()}


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile, without interpolation; of any number of values."""
    flat = values.flatten()
    return flat.kthvalue(max(1, int(q * flat.numel()))).values


class Saliency:
    """fisher: F of each layer as `normalized` gives it, weights: W, float32 [N, K], both rotated as the codes are."""

    def __init__(self, fisher: Mapping[str, Tensor], weights: Mapping[str, Tensor], share: float) -> None:
        self.fisher, self.weights, self.share = fisher, weights, share
        self.count = sum(f.numel() for f in fisher.values())
        self.lam = 0.0

    def value(self, layers: Mapping[str, Trained]) -> float:
        """R."""
        lost = (float((f * (layers[n].dense.detach() - self.weights[n]).square()).sum()) for n, f in self.fisher.items())
        return sum(lost) / self.count

    @torch.no_grad()
    def begin(self, layers: Mapping[str, Trained], loss: float) -> None:
        """Choose lam."""
        self.lam = self.share * loss / max(self.value(layers), 1e-30)

    @torch.no_grad()
    def add_gradient(self, layers: Mapping[str, Trained]) -> None:
        """Add d(lam R)/dW_q = 2 lam F (W_q - W) / count."""
        for name, f in self.fisher.items():
            layer = layers[name]
            grad = (layer.dense - self.weights[name]).mul_(f).mul_(2 * self.lam / self.count)
            layer.dense.grad = grad if layer.dense.grad is None else layer.dense.grad.add_(grad)
