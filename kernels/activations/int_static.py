"""`int_static`: asymmetric integers on a grid that calibration fixed, the same for every token.

    code = clamp(round(x / scale) + zero, 0, 2^bits - 1)        x is read as (code - zero) * scale

One scale per layer; one integer zero per layer, or one per input channel. In the product either costs a constant per output,
    y_n = scale * sum_k (code_k - zero_k) w_nk = scale * (sum_k code_k w_nk - c_n),    c_n = sum_k zero_k w_nk,
so a kernel multiplies codes and subtracts c_n. (RepQuant, Li et al., 2024. The code of its predecessor RepQ-ViT keeps the zero
fractional; then codes are no integers.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import Activation, register
from quant.kernels.format import Field, Fields

BITS = (4, 6, 8)
RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)  # of either end of the range
SEARCHED = 1024  # tokens that ends of a range are searched on
SMALLEST = 1e-8  # a scale, where all tokens are zero


@register
@dataclass(frozen=True, kw_only=True)
class IntStatic(Activation):
    """bits: 4, 6 or 8. zeros: "layer" or "channel", how many zero points a layer has."""

    name: ClassVar[str] = "int_static"
    bits: int = 8
    zeros: str = "layer"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"int_static has no {self.bits}-bit codes; allowed: {', '.join(map(str, BITS))}")
        if self.zeros not in ("layer", "channel"):
            raise ValueError(f"int_static: zeros is {self.zeros!r}; allowed: layer, channel")

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return int(2**self.bits)

    def fields(self, k: int) -> dict[str, Field]:
        zeros = k if self.zeros == "channel" else 1
        return {"input_scale": Field((1,), torch.float32), "input_zero": Field((zeros,), torch.int32)}

    def fit(self, tokens: Tensor, absmax: Tensor) -> Fields:
        """The grid of least squared error on `tokens`, up to SEARCHED of them, one for all channels."""
        x = tokens[evenly(len(tokens), tokens.device)]

        def loss(low: Tensor, high: Tensor) -> Tensor:
            return (on_grid(x, *grid(low, high, self.levels), self.levels) - x).square().sum()

        return self.stored(*grid(*search_ends(tokens.amin(), tokens.amax(), loss), self.levels), tokens.shape[-1])

    def stored(self, scale: Tensor, zero: Tensor, k: int) -> Fields:
        """The fields for a scale [] and a zero [] or [K]."""
        zeros = zero.to(torch.int32).expand(k if self.zeros == "channel" else 1).clone()
        return {"input_scale": scale.float().view(1), "input_zero": zeros}

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return on_grid(x.float(), fields["input_scale"], fields["input_zero"], self.levels)

    def check(self, fields: Mapping[str, Tensor], n: int, k: int) -> None:
        super().check(fields, n, k)
        if not bool((fields["input_scale"] > 0).all()):
            raise ValueError(f"input_scale is {float(fields['input_scale'])}; it must be positive: quantize again")


def evenly(count: int, device: torch.device, most: int = SEARCHED) -> Tensor:
    """Indices of up to `most` of `count` tokens, evenly spread."""
    return torch.linspace(0, count - 1, min(most, count), device=device).round().long()


def grid(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale > 0 and integer zero of the grid whose codes 0 and levels - 1 stand for low and high; any shape, float32."""
    scale = ((high - low) / (levels - 1)).clamp_min(SMALLEST)
    return scale, torch.round(-low / scale)


def on_grid(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """x [..., K] as its codes are read; scale and zero broadcast to it."""
    return ((torch.round(x / scale) + zero).clamp(0, levels - 1) - zero) * scale


def search_ends(low: Tensor, high: Tensor, loss: Callable[[Tensor, Tensor], Tensor], rounds: int = 2) -> tuple[Tensor, Tensor]:
    """The ends [] of least loss(low, high) among RATIOS of each: the upper end first, then the lower, `rounds` times."""
    ends, best = [low, high], loss(low, high)
    for end in (1, 0) * rounds:
        whole = (low, high)[end]
        for ratio in RATIOS:
            tried = list(ends)
            tried[end] = whole * ratio
            if (found := loss(*tried)) < best:
                ends, best = tried, found
    return ends[0], ends[1]
