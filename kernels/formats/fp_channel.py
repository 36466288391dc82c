"""`fp_channel`: 4- or 8-bit floats EeMm under one scale per row, or per group of G weights along K.

    w[n, k] = scale[n, k // G] * value(code[n, k])        value as in `minifloat.py`, e + m = bits - 1

e is chosen per weight and stored beside it, so a model may mix E1M2, E2M1 and E3M0. Codes are a little-endian bit stream
along each row, as in `int_group`: two 4-bit codes per byte, even k in the low nibble. Scales are float32, but float16 for
groups of 4-bit codes (E5M2 reaches to 114688: its scales would be too small). (LLM-FP4, Liu et al., 2023; groups are ours.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.format import Codes, Field, Fields, Grouped, register, storable
from quant.kernels.formats.int_group import pack_bits, unpack_bits
from quant.kernels.minifloat import EXPONENTS, PLAIN, Minifloat, exponents_error, value_table


@register
@dataclass(frozen=True, kw_only=True)
class FpChannel(Grouped):
    """bits: 4 or 8. group: any divisor of K, or -1 for one scale per row."""

    name: ClassVar[str] = "fp_channel"
    whole: ClassVar[frozenset[str]] = frozenset({"weight_exponents"})
    bits: int = 4
    group: int = -1

    def __post_init__(self) -> None:
        if self.bits not in EXPONENTS:
            raise ValueError(f"fp_channel has no {self.bits}-bit codes; allowed: {', '.join(map(str, EXPONENTS))}")
        super().__post_init__()

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of `weight_scale` on disk. Quantizers round to it before they choose codes."""
        return torch.float32 if self.group == -1 or self.bits == 8 else torch.float16

    def kind(self, exponents: int) -> Minifloat:
        """The number format with that many exponent bits."""
        return Minifloat(exponents, self.bits - 1 - exponents)

    def fields(self, n: int, k: int) -> dict[str, Field]:
        return {
            "weight_packed": Field((n, k * self.bits // 8), torch.uint8),
            "weight_scale": Field((n, self.groups(k)), self.scale_dtype),
            "weight_exponents": Field((1,), torch.uint8),
        }

    def pack(self, codes: Codes) -> Fields:
        out = {"weight_packed": pack_bits(codes.codes, self.bits)}
        return out | {name: t.contiguous() for name, t in codes.params.items()}

    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        params = {name: fields[name] for name in self.fields(n, k) if name != "weight_packed"}
        return Codes(unpack_bits(fields["weight_packed"], self.bits, k), params)

    def dequantize(self, codes: Codes) -> Tensor:
        n, k = codes.codes.shape
        exponents, scale = codes.params["weight_exponents"].long(), codes.params["weight_scale"].float()
        values = value_table(self.bits).to(scale.device)[exponents].view(-1)[codes.codes.int()]
        return values.view(n, scale.shape[1], -1).mul_(scale.unsqueeze(-1)).view(n, k)

    def range_step(self, weight: Tensor, exponents: int) -> Tensor:
        """Scale, float32 [N, K // G], that maps each group's absmax to the largest value; as it will be read back."""
        grouped = weight.view(weight.shape[0], self.groups(weight.shape[1]), -1)
        return self.storable(grouped.abs().amax(-1) / self.kind(exponents).largest)

    def storable(self, step: Tensor) -> Tensor:
        """A scale as it will be read back: rounded to `scale_dtype`, positive, 1 where the group is all zero."""
        return storable(step, self.scale_dtype)

    def params(self, step: Tensor, exponents: int) -> dict[str, Tensor]:
        """The stored tensors for scales [N, K // G] that are `storable`."""
        return {
            "weight_scale": step.to(self.scale_dtype),
            "weight_exponents": torch.tensor([exponents], dtype=torch.uint8, device=step.device),
        }

    def encode(self, weight: Tensor, step: Tensor, exponents: int) -> Codes:
        """Round a float32 [N, K] weight to the nearest codes under given scales [N, K // G]."""
        params = self.params(step, exponents)
        return Codes(self.project(weight, params), params)

    def steps(self, params: Mapping[str, Tensor]) -> Tensor:
        """`weight_scale` in float32: what the value 1 stands for."""
        return params["weight_scale"].float()

    def project(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """As `encode`."""
        kind, step = self.kind(int(params["weight_exponents"])), self.steps(params)
        grouped = weight.view(*step.shape, -1) / step.unsqueeze(-1)
        return kind.encode(kind.round(grouped)).view(weight.shape)

    def nearest(self, weight: Tensor) -> Codes:
        """Full range, E2M1 or E4M3."""
        return self.encode(weight, self.range_step(weight, PLAIN[self.bits]), PLAIN[self.bits])

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        super().check(fields, n, k)
        if reason := exponents_error("weight_exponents", int(fields["weight_exponents"]), self.bits):
            raise ValueError(reason)
