"""`fp_shift`: 4- or 8-bit float tokens under one scale, every channel moved into range by a power of two first.

    xq[t, j] = s[t] * 2^-n[j] * round(x[t, j] * 2^n[j] / s[t])        round to the values of EeMm, `minifloat.py`

n is stored per channel, 0 to 2^e - 1, and e per layer. s is one stored number for all tokens (static), or with `dynamic`
the stored number times the largest |x 2^n| of the token, or of each `group` of its channels. As 2^-n only moves an
exponent, xq / s times a weight's code is exact in bfloat16, and it is what one would get from codes of 2^-n W, or from an
exponent bias per channel.
So that this holds for groups too, their s is rounded to 7 - m significant bits: times a code's m + 1 that is 8.
(LLM-FP4, Liu et al., 2023: pre-shifted exponent bias, eq. 13-15. `dynamic` and `group` are ours.)
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

SHORT = 1.5**2 * 2.0**40  # over the half_steps of m mantissa bits: those of 6 - m


def shortened(x: Tensor, half_steps: Tensor) -> Tensor:
    """Positive x with fewer significant bits: half_steps = 1.5 * 2^(24 - bits), see `minifloat.round_to`."""
    shift = (x.view(torch.int32) & 0x7F800000).view(torch.float32) * half_steps
    return (x + shift).sub_(shift)


@register
@dataclass(frozen=True, kw_only=True)
class FpShift(Activation):
    """bits: 4 or 8. dynamic: a scale per token. group: a scale per so many channels of a token, -1 for all; needs `dynamic`."""

    name: ClassVar[str] = "fp_shift"
    bits: int = 8
    dynamic: bool = False
    group: int = -1

    def __post_init__(self) -> None:
        if self.bits not in EXPONENTS:
            raise ValueError(f"fp_shift has no {self.bits}-bit codes; allowed: {', '.join(map(str, EXPONENTS))}")
        if self.group != -1 and (self.group < 1 or not self.dynamic):
            raise ValueError(f"group {self.group} is not allowed; give a positive length with dynamic: true, or -1")

    def refuses(self, k: int) -> str | None:
        if self.group != -1 and k % self.group:
            return f"fp_shift has a scale per {self.group} channels, which do not divide K = {k}"
        return super().refuses(k)

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
        """x [..., K] -> xq / s [..., K] and s, [1] or [..., 1], float32: what is multiplied and what is applied after.

        With groups xq itself and 1.
        """
        factor = (fields["input_shift"].int() + 127 << 23).view(torch.float32)  # 2^n
        moved, scale = x.float() * factor, fields["input_scale"]
        numbers = constant_table(self.bits).to(x.device)[fields["input_exponents"].long()].unbind(-1)
        if self.group != -1:
            moved = moved.reshape(*x.shape[:-1], -1, self.group)
        if self.dynamic:
            scale = moved.abs().amax(-1, keepdim=True).clamp_min(ABSMAX_FLOOR) * scale
        if self.group == -1:
            return round_to(moved / scale, *numbers) / factor, scale
        scale = shortened(scale, SHORT / numbers[1])
        return (round_to(moved / scale, *numbers) * scale).view(x.shape) / factor, torch.ones_like(scale[..., 0, :])
