"""Round to nearest: the baseline. Any format."""

from __future__ import annotations

from torch import Tensor

from quant.kernels.format import Codes, Format
from quant.passes.base import Quantizer
from quant.stats import InputStats


class Pass(Quantizer):
    """No options."""

    def refuses(self, fmt: Format) -> str | None:
        return None

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        return fmt.nearest(weight)
