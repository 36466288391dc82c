"""Activation quantization in reference form: what every kernel must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("none", "int8_token")
ABSMAX_FLOOR = 1e-5  # an all-zero token gets this absmax, so its scale is never zero


def quantize_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per token: x [M, K] float -> codes int8 [M, K] in [-127, 127], scale float32 [M].

    scale = max(absmax, 1e-5) / 127; code = round-half-even(x * (1 / scale)), all in float32.
    """
    x = x.float()
    scale = x.abs().amax(-1).clamp_min(ABSMAX_FLOOR) / 127
    codes = torch.round(x * scale.reciprocal().unsqueeze(-1)).clamp_(-127, 127).to(torch.int8)
    return codes, scale


def fake_quantize(x: Tensor, activation: str) -> Tensor:
    """x [..., K] as the integer kernels see it, in float32. `activation`: "none" or "int8_token"."""
    if activation == "none":
        return x.float()
    codes, scale = quantize_token(x.reshape(-1, x.shape[-1]))
    return (codes.float() * scale.unsqueeze(-1)).view(x.shape)
