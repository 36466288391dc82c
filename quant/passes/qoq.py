"""QoQ: progressive quantization (Lin et al., 2024, QServe). INT8 per row inside a protective range, then u4 of the integers.

    Q8 = round(w / s1),  s1 = absmax / 119,  |Q8| <= 119
    s2 = round((max - min) / 15) in 1..16,  z = round(-min / s2) in 0..15
With |Q8| <= 119 no code that rounding to nearest picks leaves int8. GPTQ may pick any of the 16, so s2 is also held at
the largest step that is safe for all of them.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from quant.kernels.format import Codes, Format
from quant.kernels.formats.int4_dual import Int4Dual, largest_step
from quant.passes.base import Quantizer
from quant.rounding import gptq_codes
from quant.search import shrunk
from quant.stats import InputStats

PROTECTIVE_RANGE = 119


class Pass(Quantizer):
    """gptq: choose codes by GPTQ rounding on the progressive grid, as QoQ does, else to nearest. shrink: see gptq."""

    gptq: bool = True
    shrink: float = Field(0.0, ge=0, le=1)

    def refuses(self, fmt: Format) -> str | None:
        return None if isinstance(fmt, Int4Dual) else f"qoq writes int4_dual, not {fmt.name}"

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        assert isinstance(fmt, Int4Dual)
        q8, row_scale, s2, zero = progressive_grid(weight, fmt.group)
        params = fmt.params(row_scale, s2, zero)
        if self.gptq:
            return Codes(gptq_codes(weight, shrunk(stats.gram, self.shrink), row_scale.unsqueeze(-1) * s2, zero, 16), params)
        grouped = q8.view(weight.shape[0], -1, fmt.group)
        codes = (torch.round(grouped / s2.unsqueeze(-1)) + zero.unsqueeze(-1)).clamp_(0, 15)
        return Codes(codes.to(torch.uint8).view(weight.shape), params)


def progressive_grid(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First-level integers Q8 [N, K], row_scale [N], s2 and zero [N, K // G], all float32 holding integers but row_scale."""
    n = weight.shape[0]
    absmax = weight.abs().amax(-1)
    row_scale = torch.where(absmax > 0, absmax / PROTECTIVE_RANGE, 1.0)
    q8 = torch.round(weight / row_scale.unsqueeze(-1)).clamp_(-PROTECTIVE_RANGE, PROTECTIVE_RANGE)
    grouped = q8.view(n, -1, group)
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    s2 = torch.round((high - low) / 15).clamp_(1, 16)
    zero = torch.round(-low / s2).clamp_(0, 15)
    zero = torch.where(s2 == 16, 8.0, zero)  # the only zero point around which 16 codes of step 16 fit int8
    return q8, row_scale, torch.minimum(s2, largest_step(zero)), zero
