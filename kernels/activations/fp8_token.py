"""`fp8_token`: tokens as E4M3 floats with one scale per token, measured as the token comes; "FP8 dynamic" of engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quant.kernels.activation import ABSMAX_FLOOR, Activation, register
from quant.kernels.formats.fp8 import E4M3, LARGEST, encode


@register
@dataclass(frozen=True, kw_only=True)
class Fp8Token(Activation):
    """The largest value of a token becomes 448."""

    name: ClassVar[str] = "fp8_token"

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp_min(ABSMAX_FLOOR) / LARGEST
        return encode(wide / scale).view(E4M3).float() * scale
