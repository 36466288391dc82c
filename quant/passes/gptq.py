"""GPTQ on `int_group` grids (Frantar et al., 2023): searched static groups, act-order, symmetric or asymmetric."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from quant.grid import Affine
from quant.kernels.format import Codes, Format
from quant.kernels.formats.int_group import IntGroup
from quant.passes.base import GridRounder
from quant.refit import refit
from quant.search import by_rows, gram_blocks, search_grid
from quant.stats import InputStats


class Pass(GridRounder):
    """search: clip each group by its Gram block (else cover the full range). refits: rounds of fitted steps and new codes."""

    search: bool = True
    refits: int = Field(0, ge=0, le=100)

    def refuses(self, fmt: Format) -> str | None:
        if isinstance(fmt, IntGroup):
            return None
        return f"gptq writes int_group, not {fmt.name}; use the pass dgq for int4_dual, fp4 for fp4_block"

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        assert isinstance(fmt, IntGroup)
        levels, gram = 2**fmt.bits, self.gram(stats)
        step, zero = fmt.range_grid(weight)
        if self.search:
            blocks = gram_blocks(gram, weight.shape[1] // step.shape[1])
            step, zero = by_rows(lambda rows: search_grid(rows, blocks, levels, fmt.symmetric), weight)
            step = fmt.storable(step)
        codes = self.codes(weight, gram, step, zero, levels)
        codes, grid = refit(weight, gram, codes, Affine(step, zero, levels), fmt.storable, self.refits)
        return Codes(codes, fmt.params(grid.step, zero))
