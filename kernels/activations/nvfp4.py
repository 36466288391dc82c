"""`nvfp4`: tokens in blocks of 16 E2M1 values, an E4M3 scale per block as it comes under one divisor from calibration.

    S = fp8(D * absmax / 6)        x is seen as e2m1(x * D / S) * S / D        D stored as `input_global_scale`

As weights of the same name (`formats/fp4_block.py`). D is a power of two, so the quotient is exact, and tokens up to 1.75 times
the largest that calibration saw are not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import Activation, register
from quant.kernels.format import Field, Fields
from quant.kernels.formats.fp4_block import BLOCKS, LARGEST_SCALE, power_divisor
from quant.kernels.minifloat import E2M1

BLOCK = BLOCKS["nvfp4"]
SMALLEST_SCALE = 2.0**-9  # of E4M3, subnormals included: only to never divide by zero


@register
@dataclass(frozen=True, kw_only=True)
class NvFp4(Activation):
    """four_six: map a block's absmax to 6 or to 4, whichever loses less (Four Over Six, arXiv 2512.02010)."""

    name: ClassVar[str] = "nvfp4"
    four_six: bool = False

    def refuses(self, k: int) -> str | None:
        if k % BLOCK:
            return f"nvfp4 has blocks of {BLOCK} along K, which do not divide K = {k}"
        return super().refuses(k)

    def fields(self, k: int) -> dict[str, Field]:
        return {"input_global_scale": Field((1,), torch.float32)}

    def fit(self, tokens: Tensor, absmax: Tensor) -> Fields:
        return {"input_global_scale": power_divisor(absmax.amax())}

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        divisor = fields["input_global_scale"]
        return self.multiples(x, divisor) / divisor

    def multiples(self, x: Tensor, divisor: Tensor) -> Tensor:
        """D times the quantized tokens, float32 [..., K]: e2m1 * S, six significant bits, exact in bfloat16."""
        blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK) * divisor
        top = blocks.abs().amax(-1, keepdim=True) / E2M1.largest
        seen = self.under(blocks, top)
        if self.four_six:
            other = self.under(blocks, 1.5 * top)
            loses = (other - blocks).square().sum(-1, keepdim=True) < (seen - blocks).square().sum(-1, keepdim=True)
            seen = torch.where(loses, other, seen)
        return seen.view(x.shape)

    @staticmethod
    def under(blocks: Tensor, scale: Tensor) -> Tensor:
        """Blocks [..., 16] rounded under scales [..., 1] that are rounded to E4M3 first."""
        stored = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float8_e4m3fn).float()
        return E2M1.round(blocks / stored) * stored
