"""`fp_shift`: 4- or 8-bit float tokens under one scale, every channel moved into range by a power of two first.

    xq[t, j] = s[t] * 2^-n[j] * round(x[t, j] * 2^n[j] / s[t])        round to the values of EeMm, `minifloat.py`

n is stored per channel, 0 to 2^e - 1, and e per layer. s is one stored number for all tokens (static), or with `dynamic`
the stored number times the token's largest |x 2^n|. As 2^-n only moves an exponent, xq / s times a weight's code is exact
in bfloat16, and it is what one would get from codes of 2^-n W, or from an exponent bias per channel.
(LLM-FP4, Liu et al., 2023: pre-shifted exponent bias, eq. 13-15. `dynamic` is ours.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import ABSMAX_FLOOR, Activation, register
from quant.kernels.format import Field, Fields
from quant.kernels.minifloat import EXPONENTS, PLAIN, Minifloat, constant_table, exponents_error, round_to


@register
@dataclass(frozen=True, kw_only=True)
class FpShift(Activation):
    """bits: 4 or 8. dynamic: a scale per token."""

    name: ClassVar[str] = "fp_shift"
    bits: int = 8
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.bits not in EXPONENTS:
            raise ValueError(f"fp_shift has no {self.bits}-bit codes; allowed: {', '.join(map(str, EXPONENTS))}")

    def kind(self, exponents: int) -> Minifloat:
        """The number format with that many exponent bits."""
        return Minifloat(exponents, self.bits - 1 - exponents)

    def fields(self, k: int) -> dict[str, Field]:
        return {
            "input_scale": Field((1,), torch.float32),
            "input_shift": Field((k,), torch.uint8),
            "input_exponents": Field((1,), torch.uint8),
        }

    def fit(self, tokens: Tensor, absmax: Tensor) -> Fields:
        """Full range, E2M1 or E4M3, no channel moved."""
        top = torch.ones((), device=absmax.device) if self.dynamic else absmax.amax().clamp_min(ABSMAX_FLOOR)
        return self.stored(top / self.kind(PLAIN[self.bits]).largest, torch.zeros_like(absmax), PLAIN[self.bits])

    def stored(self, scale: Tensor, shift: Tensor, exponents: int) -> Fields:
        """The stored tensors: scale [], shift [K]."""
        return {
            "input_scale": scale.float().view(1),
            "input_shift": shift.to(torch.uint8),
            "input_exponents": torch.tensor([exponents], dtype=torch.uint8, device=shift.device),
        }

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        super().check(fields, n, k)
        exponents = int(fields["input_exponents"])
        if reason := exponents_error("input_exponents", exponents, self.bits):
            raise ValueError(reason)
        reach = self.kind(exponents).reach
        if (most := int(fields["input_shift"].max())) > reach:
            raise ValueError(f"input_shift holds {most}; {exponents} exponent bits allow 0 to {reach}; quantize again")
        if not (scale := float(fields["input_scale"])) > 0:
            raise ValueError(f"input_scale is {scale:g}; it divides the tokens, so it must be positive; quantize again")

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        codes, scale = self.codes(x, fields)
        return codes * scale

    def codes(self, x: Tensor, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """x [..., K] -> xq / s [..., K] and s, [1] or [..., 1], float32: what is multiplied and what is applied after."""
        factor = (fields["input_shift"].int() + 127 << 23).view(torch.float32)  # 2^n
        moved, scale = x.float() * factor, fields["input_scale"]
        if self.dynamic:
            scale = moved.abs().amax(-1, keepdim=True).clamp_min(ABSMAX_FLOOR) * scale
        floor, half_steps, largest = constant_table(self.bits).to(x.device)[fields["input_exponents"].long()].unbind(-1)
        return round_to(moved / scale, floor, half_steps, largest) / factor, scale
