"""`int6_group`: `int4_group` with codes of 6 bits, -32 to 31."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quant.kernels.activation import register
from quant.kernels.activations.int4_group import Int4Group


@register
@dataclass(frozen=True, kw_only=True)
class Int6Group(Int4Group):
    """As Int4Group."""

    name: ClassVar[str] = "int6_group"
    half: ClassVar[int] = 32
