"""`int8_token`, `int4_token`: symmetric integers with one scale per token, measured as the token comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import ABSMAX_FLOOR, Activation, register


def quantize_token(x: Tensor, top: int = 127, reach: float | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric integers per token: x [M, K] float -> codes int8 [M, K] in [-top, top], scale float32 [M].

    scale = max(absmax, 1e-5) / reach; code = round-half-even(x * (1 / scale)), all in float32. reach: None for top, which then
    holds the largest value; more clips it.
    """
    x = x.float()
    scale = x.abs().amax(-1).clamp_min(ABSMAX_FLOOR) / (top if reach is None else reach)
    codes = torch.round(x * scale.reciprocal().unsqueeze(-1)).clamp_(-top, top).to(torch.int8)
    return codes, scale


@dataclass(frozen=True, kw_only=True)
class IntToken(Activation):
    """Codes from -top to top. The A8W4 kernel multiplies these codes as they are."""

    top: ClassVar[int]

    @property
    def reach(self) -> float:
        """A token's largest value, in steps of its scale."""
        return float(self.top)

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        codes, scale = quantize_token(x.reshape(-1, x.shape[-1]), self.top, self.reach)
        return (codes.float() * scale.unsqueeze(-1)).view(x.shape)


@register
@dataclass(frozen=True, kw_only=True)
class Int8Token(IntToken):
    """8 bits; the W8A8 kernels multiply these codes as well."""

    name: ClassVar[str] = "int8_token"
    top: ClassVar[int] = 127


@register
@dataclass(frozen=True, kw_only=True)
class Int4Token(IntToken):
    """4 bits. clip: the part of a token's range that codes cover; larger values become the last code.

    Of rotated tokens, whose channels are nearly Gaussian, the outermost are few, and 15 codes are better spent on the others.
    """

    name: ClassVar[str] = "int4_token"
    top: ClassVar[int] = 7
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.clip <= 1:
            raise ValueError(f"{self.name} has clip {self.clip}; allowed: above 0, up to 1")

    @property
    def reach(self) -> float:
        return self.top / self.clip
