"""`cross_token`: CrossQuant's step as published, from the maxima of the very tokens it is given. For evaluation only.

A token's codes depend on the other tokens of the call, so this cannot be served: one token alone has c_j = |x_j| and keeps
every value. `quant/passes/crossquant.py` is the form that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import Activation, register


def cross_steps(x: Tensor, alpha: float, top: int) -> Tensor:
    """D [M, K] = t^alpha c^(1 - alpha) / top for tokens x [M, K]; t the absmax of rows, c of columns."""
    size = x.abs()
    t, c = (size.amax(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) for dim in (1, 0))
    return t**alpha * c ** (1 - alpha) / top


@register
@dataclass(frozen=True, kw_only=True)
class CrossToken(Activation):
    """alpha: share of the token's maximum, 1 is plain per-token and 0 per-channel rounding. bits: of a symmetric code."""

    name: ClassVar[str] = "cross_token"
    alpha: float = 0.15
    bits: int = 8

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).float()
        steps = cross_steps(tokens, self.alpha, 2 ** (self.bits - 1) - 1)
        return (torch.round(tokens / steps) * steps).view(x.shape)
