"""`mxfp4`: tokens in blocks of 32 E2M1 values under a power of two, chosen as each block comes (rule EVEN)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant.kernels.activation import Activation, register
from quant.kernels.formats.fp4_block import BIAS, BLOCKS, e8m0_value, even_exponent
from quant.kernels.minifloat import E2M1

BLOCK = BLOCKS["mxfp4"]


@register
@dataclass(frozen=True, kw_only=True)
class MxFp4(Activation):
    """As weights of the same name (`formats/fp4_block.py`); nothing is stored."""

    name: ClassVar[str] = "mxfp4"

    def refuses(self, k: int) -> str | None:
        if k % BLOCK:
            return f"mxfp4 has blocks of {BLOCK} along K, which do not divide K = {k}"
        return super().refuses(k)

    def quantize(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
        step = e8m0_value((even_exponent(blocks.abs().amax(-1, keepdim=True)) + BIAS).to(torch.uint8))
        return (E2M1.round(blocks / step) * step).view(x.shape)
