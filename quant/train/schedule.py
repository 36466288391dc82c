"""What block-wise and end-to-end training share: Adam's constants and how rates rise, fall and follow a vector's size."""

from __future__ import annotations

import math

from torch import Tensor

WARM = 0.05  # share of the steps over which rates rise
BETAS = (0.9, 0.95)
EPSILON = 1e-12  # of Adam: one number of millions has a small gradient


def share_of_rate(step: int, steps: int) -> float:
    """A short rise, then a cosine down to 0."""
    rise = min(1.0, (step + 1) / max(1.0, WARM * steps))
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def vector_rate(vector: Tensor, rate: float) -> float:
    """A rate relative to the mean size of a norm or bias."""
    return rate * max(float(vector.detach().abs().mean()), 1e-3)
