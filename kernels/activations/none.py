"""`none`: tokens stay in floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quant.kernels.activation import Activation, register


@register
@dataclass(frozen=True, kw_only=True)
class Unquantized(Activation):
    """No rounding."""

    name: ClassVar[str] = "none"

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return x.float()
