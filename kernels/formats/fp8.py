"""`fp8`: 8-bit floats E4M3 under one scale per row, the bytes that engines call FP8.

    w[n, k] = scale[n] * weight_packed[n, k]        weight_packed torch.float8_e4m3fn, up to 448; scale float32

Codes are its bits. `fp_channel` with four exponent bits is another format: it has no NaN and reaches 480. (FP8 Formats for
Deep Learning, Micikevicius et al., 2022.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.format import Codes, Field, Fields, Format, register, storable

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def encode(values: Tensor) -> Tensor:
    """The codes uint8 of the nearest E4M3, ties to even; what is too large becomes 448."""
    return values.clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8)


@register
@dataclass(frozen=True, kw_only=True)
class Fp8(Format):
    """No parameters."""

    name: ClassVar[str] = "fp8"

    @property
    def group(self) -> int:
        """One scale per row."""
        return -1

    def refuses(self, n: int, k: int) -> str | None:
        return None

    def fields(self, n: int, k: int) -> dict[str, Field]:
        return {"weight_packed": Field((n, k), E4M3), "weight_scale": Field((n, 1), torch.float32)}

    def pack(self, codes: Codes) -> Fields:
        return {"weight_packed": codes.codes.contiguous().view(E4M3), "weight_scale": codes.params["weight_scale"].contiguous()}

    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        return Codes(fields["weight_packed"].view(torch.uint8).clone(), {"weight_scale": fields["weight_scale"]})

    def dequantize(self, codes: Codes) -> Tensor:
        return codes.codes.view(E4M3).float() * codes.params["weight_scale"]

    def nearest(self, weight: Tensor) -> Codes:
        """The largest weight of a row becomes 448."""
        scale = storable(weight.abs().amax(1, keepdim=True) / LARGEST, torch.float32)
        return Codes(encode(weight / scale), {"weight_scale": scale})
