"""GPTQ on `int_group` grids (Frantar et al., 2023): searched static groups, act-order, symmetric or asymmetric."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from quant.kernels.format import Codes, Format
from quant.kernels.formats.int_group import IntGroup
from quant.passes.base import Quantizer
from quant.rounding import gptq_codes
from quant.search import by_rows, gram_blocks, search_grid, shrunk
from quant.stats import InputStats


class Pass(Quantizer):
    """search: clip each group by its Gram block (else cover the full range). damp: share of the mean Gram diagonal.

    shrink: 0 to 1, see `search.shrunk`; 0 is the published method.
    """

    act_order: bool = True
    search: bool = True
    damp: float = Field(0.01, gt=0, le=1)
    shrink: float = Field(0.0, ge=0, le=1)

    def refuses(self, fmt: Format) -> str | None:
        return None if isinstance(fmt, IntGroup) else f"gptq writes int_group, not {fmt.name}; use the dgq pass for int4_dual"

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        assert isinstance(fmt, IntGroup)
        levels, gram = 2**fmt.bits, shrunk(stats.gram, self.shrink)
        step, zero = fmt.range_grid(weight)
        if self.search:
            blocks = gram_blocks(gram, weight.shape[1] // step.shape[1])
            step, zero = by_rows(lambda rows: search_grid(rows, blocks, levels, fmt.symmetric), weight)
            step = fmt.storable(step)
        codes = gptq_codes(weight, gram, step, zero, levels, act_order=self.act_order, damp=self.damp)
        return Codes(codes.to(torch.uint8), fmt.params(step, zero))
