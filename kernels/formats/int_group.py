"""`int_group`: b-bit integers with one scale (and zero point) per group of G weights along K.

    w[n, k] = scale[n, k // G] * (code[n, k] - zero)       zero = 2^(b-1) when symmetric, stored when not

Codes are a little-endian bit stream along each row: code k occupies bits k*b .. k*b+b-1. G = -1 is one group
per row. Group scales are float16 on disk, row scales float32: a row scale costs next to nothing. A scale may be negative,
which lets a symmetric grid reach one level further on the positive side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.format import Codes, Field, Fields, Grouped, register, storable

BITS = (2, 3, 4, 6, 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [N, K] -> little-endian bit stream, uint8 [N, K * bits / 8]. K * bits must divide by 8."""
    n, k = codes.shape
    if bits == 8:
        return codes.contiguous()
    planes = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1  # [N, K, bits]
    octets = planes.reshape(n, k * bits // 8, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (octets * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 [N, K]."""
    if bits == 8:
        return packed.clone()
    n = packed.shape[0]
    planes = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    planes = planes.view(n, k, bits)
    weights = 1 << torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (planes * weights).sum(-1, dtype=torch.uint8)


@register
@dataclass(frozen=True, kw_only=True)
class IntGroup(Grouped):
    """bits: 2, 3, 4, 6 or 8. group: any divisor of K, or -1. symmetric: no stored zero point."""

    name: ClassVar[str] = "int_group"
    bits: int = 4
    group: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"int_group has no {self.bits}-bit codes; allowed: {', '.join(map(str, BITS))}")
        super().__post_init__()

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of `weight_scale` on disk. Quantizers round to it before they choose codes."""
        return torch.float32 if self.group == -1 else torch.float16

    def fields(self, n: int, k: int) -> dict[str, Field]:
        groups = self.groups(k)
        out = {
            "weight_packed": Field((n, k * self.bits // 8), torch.uint8),
            "weight_scale": Field((n, groups), self.scale_dtype),
        }
        if not self.symmetric:
            out["weight_zero"] = Field((n, groups), torch.uint8)
        return out

    def pack(self, codes: Codes) -> Fields:
        out = {"weight_packed": pack_bits(codes.codes, self.bits)}
        return out | {name: t.contiguous() for name, t in codes.params.items()}

    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        params = {name: fields[name] for name in self.fields(n, k) if name != "weight_packed"}
        return Codes(unpack_bits(fields["weight_packed"], self.bits, k), params)

    def dequantize(self, codes: Codes) -> Tensor:
        n, k = codes.codes.shape
        scale = self.steps(codes.params)
        grouped = codes.codes.view(n, scale.shape[1], k // scale.shape[1]).float()
        return ((grouped - self.zeros(codes.params)) * scale.unsqueeze(-1)).view(n, k)

    def steps(self, params: Mapping[str, Tensor]) -> Tensor:
        """`weight_scale` in float32."""
        return params["weight_scale"].float()

    def zeros(self, params: Mapping[str, Tensor]) -> Tensor:
        """Zero points, float32 [N, K // G, 1], or one for all."""
        middle = torch.tensor(2.0 ** (self.bits - 1), device=params["weight_scale"].device)
        return middle if self.symmetric else params["weight_zero"].float().unsqueeze(-1)

    def project(self, weight: Tensor, params: Mapping[str, Tensor], least: int = 0) -> Tensor:
        """least: the smallest code that is used."""
        step = self.steps(params)
        grouped = torch.round(weight.view(*step.shape, -1) / step.unsqueeze(-1)) + self.zeros(params)
        return grouped.clamp_(least, 2**self.bits - 1).to(torch.uint8).view(weight.shape)

    def range_grid(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point, float32 [N, K // G], that just cover each group's range (0 included).

        The step is already rounded to the dtype it is stored in.
        """
        grouped = weight.view(weight.shape[0], self.groups(weight.shape[1]), -1)
        if self.symmetric:
            step = grouped.abs().amax(-1) / (2 ** (self.bits - 1) - 1)
            return self.storable(step), torch.full_like(step, 2.0 ** (self.bits - 1))
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        step = self.storable((high - low) / (2**self.bits - 1))
        return step, torch.round(-low / step).clamp_(0, 2**self.bits - 1)

    def storable(self, step: Tensor) -> Tensor:
        """A step as it will be read back: rounded to `scale_dtype`, never 0, and 1 where the group is all zero."""
        return storable(step, self.scale_dtype)

    def params(self, step: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """The stored tensors for a grid of steps and zero points [N, K // G]."""
        out = {"weight_scale": step.to(self.scale_dtype)}
        return out if self.symmetric else out | {"weight_zero": zero.to(torch.uint8)}

    def nearest(self, weight: Tensor) -> Codes:
        params = self.params(*self.range_grid(weight))
        return Codes(self.project(weight, params, least=1 if self.symmetric else 0), params)  # -absmax .. absmax if symmetric

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        super().check(fields, n, k)
        if not self.symmetric and self.bits < 8 and (top := int(fields["weight_zero"].max())) >= 2**self.bits:
            raise ValueError(f"weight_zero holds {top}; {self.bits} bits allow 0 to {2**self.bits - 1}")
