"""Small floating-point numbers EeMm without infinities: how their values, codes and rounding follow from e and m.

A code is sign, e bits p, m bits M, b = max(1, 2^(e-1) - 1):

    value = +-2^(p - b) (1 + M / 2^m)        p >= 1
            +-2^(1 - b) M / 2^m              p = 0

A real exponent bias is the same grid times a power of two that need not be whole, so one scale and this one table hold
for any bias. (LLM-FP4, Liu et al., 2023, eq. 3 and 8; E2M1 is that of OCP Microscaling, E1M2 is evenly spaced.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

EXPONENTS = {4: (1, 2, 3), 8: (1, 2, 3, 4, 5)}  # bits of a code -> exponent bits there are
PLAIN = {4: 2, 8: 4}  # where nothing was searched: E2M1 and E4M3


@dataclass(frozen=True)
class Minifloat:
    """exponent, mantissa: e and m, at least 1 and 0."""

    exponent: int
    mantissa: int

    @property
    def bias(self) -> int:
        """b."""
        return max(1, (1 << self.exponent - 1) - 1)

    @property
    def largest(self) -> float:
        """The value of the last positive code."""
        return (2 - 2.0**-self.mantissa) * 2.0 ** ((1 << self.exponent) - 1 - self.bias)

    @property
    def reach(self) -> int:
        """2^e - 1: binades by which a channel's grid may lie below that of the largest channel (eq. 15)."""
        return (1 << self.exponent) - 1

    @property
    def magnitudes(self) -> Tensor:
        """Values of the positive codes in their order, which is rising: float32 [2^(e + m)]."""
        return _magnitudes(self.exponent, self.mantissa)

    def round(self, x: Tensor) -> Tensor:
        """The nearest value for each float32 of x; a tie goes to the even mantissa, what is too large to the largest.

        The sign stays, that of zero too.
        """
        return round_to(x, *constants(self))

    def encode(self, values: Tensor) -> Tensor:
        """Codes uint8 of values of the grid; inverse of `decode`."""
        found = torch.bucketize(values.abs().contiguous(), self.magnitudes.to(values.device)).to(torch.uint8)
        return found | values.signbit().to(torch.uint8) << self.exponent + self.mantissa

    def decode(self, codes: Tensor) -> Tensor:
        """Values float32 of uint8 codes."""
        return torch.cat((self.magnitudes, -self.magnitudes)).to(codes.device)[codes.int()]


E2M1 = Minifloat(2, 1)  # 0, .5, 1, 1.5, 2, 3, 4, 6


@cache
def _magnitudes(e: int, m: int) -> Tensor:
    kind = Minifloat(e, m)
    code = torch.arange(1 << e + m)
    p, fraction = code >> m, (code & (1 << m) - 1) / 2.0**m
    return torch.ldexp(torch.where(p > 0, 1 + fraction, fraction), p.clamp_min(1) - kind.bias)


def constants(kind: Minifloat) -> tuple[float, float, float]:
    """What `round_to` needs: the lowest binade with a spacing of its own, the shift in binades, the largest value."""
    return 2.0 ** (1 - kind.bias), 1.5 * 2.0 ** (23 - kind.mantissa), kind.largest


def round_to(x: Tensor, floor: float | Tensor, half_steps: float | Tensor, largest: float | Tensor) -> Tensor:
    """`Minifloat.round` with its constants given as numbers or as tensors that broadcast.

    Adding and taking off 1.5 * 2^(23 - m) binades leaves m bits of x's mantissa, rounded half to even by the addition.
    """
    largest = torch.as_tensor(largest, device=x.device)
    x = torch.minimum(torch.maximum(x, -largest), largest)
    binade = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |x|)
    shift = torch.maximum(binade, torch.as_tensor(floor, device=x.device)).mul_(half_steps).copysign_(x)
    return (x + shift).sub_(shift).copysign_(x)


@cache
def constant_table(bits: int) -> Tensor:
    """`constants` by number of exponent bits, float32 [bits, 3]; rows that do not exist hold NaN."""
    table = torch.full((bits, 3), torch.nan)
    for e in EXPONENTS[bits]:
        table[e] = torch.tensor(constants(Minifloat(e, bits - 1 - e)))
    return table


@cache
def value_table(bits: int) -> Tensor:
    """The value of each code by number of exponent bits, float32 [bits, 2^bits]; rows that do not exist hold NaN."""
    table = torch.full((bits, 1 << bits), torch.nan)
    for e in EXPONENTS[bits]:
        table[e] = Minifloat(e, bits - 1 - e).decode(torch.arange(1 << bits))
    return table


def exponents_error(field: str, given: int, bits: int) -> str | None:
    """Why a stored number of exponent bits cannot be, or None."""
    if given in EXPONENTS[bits]:
        return None
    return f"{field} holds {given}; {bits} bits allow {', '.join(map(str, EXPONENTS[bits]))}; quantize again"
