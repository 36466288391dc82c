"""`int4_dual`: dual-grained 4-bit weights whose integer step restores INT8, so the whole GEMM stays in integers.

    w8[n, k] = u[n, k] * s2[n, k // G] + o[n, k // G]      exactly representable: -128 <= w8 <= 127 for all 16 codes
    w[n, k]  = s1[n] * w8[n, k]

u: unsigned 4-bit codes, two per byte, even k in the low nibble. s2 = `group_scale` (uint8), o = `group_offset` (int8),
s1 = `row_scale` (float32). One storage form for DGQ (o = -z * s2), QoQ and LiquidQuant (o = group minimum).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.format import Codes, Field, Fields, Format, register
from quant.kernels.formats.int_group import pack_bits, unpack_bits


def largest_step(zero: Tensor) -> Tensor:
    """Largest s2 for which all 16 codes stay inside int8: (15 - z) * s2 <= 127 and z * s2 <= 128. At most 16."""
    above = torch.floor(127 / (15 - zero).clamp_min(0.5))
    below = torch.floor(128 / zero.clamp_min(0.5))
    return torch.minimum(above, below)


def factor_steps(step: Tensor, zero: Tensor, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Float steps [N, K // G] -> row_scale [N] and integer steps s2 [N, K // G] with step ~ row_scale * s2.

    With `ratio` 1 the row scale is the smallest that fits every group under `largest_step`; below 1 it is finer, and
    the widest groups are held at the largest step that cannot overflow. A group that is all zero has step 0: it must
    not widen the row scale of the others. A row of such groups gets row scale 1.
    """
    most = largest_step(zero)
    row_scale = ratio * (step / most).amax(-1)
    row_scale = torch.where(row_scale > 0, row_scale, 1.0)
    return row_scale, torch.minimum(torch.round(step / row_scale.unsqueeze(-1)).clamp_min_(1), most)


@register
@dataclass(frozen=True, kw_only=True)
class Int4Dual(Format):
    """group: a divisor of K (4 + 16/G + 32/K bits per weight)."""

    name: ClassVar[str] = "int4_dual"
    group: int = 64

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise ValueError(f"group {self.group} is not allowed; int4_dual needs an even group length")

    def refuses(self, n: int, k: int) -> str | None:
        return f"group {self.group} does not divide K = {k}" if k % self.group else None

    def fields(self, n: int, k: int) -> dict[str, Field]:
        return {
            "weight_packed": Field((n, k // 2), torch.uint8),
            "group_scale": Field((n, k // self.group), torch.uint8),
            "group_offset": Field((n, k // self.group), torch.int8),
            "row_scale": Field((n,), torch.float32),
        }

    def pack(self, codes: Codes) -> Fields:
        out = {"weight_packed": pack_bits(codes.codes, 4)}
        return out | {name: t.contiguous() for name, t in codes.params.items()}

    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        params = {name: fields[name] for name in ("group_scale", "group_offset", "row_scale")}
        return Codes(unpack_bits(fields["weight_packed"], 4, k), params)

    def integers(self, codes: Codes) -> Tensor:
        """w8: int8 [N, K], the first of the two dequantization steps."""
        n, k = codes.codes.shape
        s2 = codes.params["group_scale"].to(torch.int16).unsqueeze(-1)
        o = codes.params["group_offset"].to(torch.int16).unsqueeze(-1)
        return (codes.codes.view(n, -1, self.group).to(torch.int16) * s2 + o).to(torch.int8).view(n, k)

    def dequantize(self, codes: Codes) -> Tensor:
        return self.integers(codes).float() * codes.params["row_scale"].unsqueeze(-1)

    def nearest(self, weight: Tensor) -> Codes:
        grouped = weight.view(weight.shape[0], -1, self.group)
        low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
        step = (high - low) / 15
        zero = torch.round(-low / torch.where(step > 0, step, 1.0)).clamp_(0, 15)
        row_scale, s2 = factor_steps(step, zero)
        return self.encode(weight, row_scale, s2, zero)

    def encode(self, weight: Tensor, row_scale: Tensor, s2: Tensor, zero: Tensor) -> Codes:
        """Round a float32 [N, K] weight to the grid row_scale[n] * s2[n, g] * (u - zero[n, g])."""
        n, k = weight.shape
        step = (row_scale.unsqueeze(-1) * s2).unsqueeze(-1)
        u = (torch.round(weight.view(n, -1, self.group) / step) + zero.unsqueeze(-1)).clamp_(0, 15)
        return Codes(u.to(torch.uint8).view(n, k), self.params(row_scale, s2, zero))

    def steps(self, params: Mapping[str, Tensor]) -> Tensor:
        """row_scale * group_scale."""
        return params["row_scale"].unsqueeze(-1) * params["group_scale"].float()

    def project(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Under offsets that are no multiple of their step, too."""
        shift = params["group_offset"].float() / params["group_scale"].float()
        step = self.steps(params).unsqueeze(-1)
        grouped = torch.round(weight.view(*shift.shape, -1) / step - shift.unsqueeze(-1))
        return grouped.clamp_(0, 15).to(torch.uint8).view(weight.shape)

    def params(self, row_scale: Tensor, s2: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """The stored tensors for row scales [N] and integer steps and zero points [N, K // G]."""
        return {
            "group_scale": s2.to(torch.uint8),
            "group_offset": (-zero * s2).to(torch.int8),
            "row_scale": row_scale.float(),
        }

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        super().check(fields, n, k)
        top = 15 * fields["group_scale"].to(torch.int16) + fields["group_offset"].to(torch.int16)
        if int(top.max()) > 127:
            row = int(top.amax(1).argmax())
            raise ValueError(f"group_scale and group_offset of row {row} reach {int(top.max())}; int4_dual allows at most 127")
