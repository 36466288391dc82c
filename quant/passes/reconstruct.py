"""Weight reconstruction: aim at what the layer would put out if its inputs were not rounded.

    W* = W + W D (H + damp mean(diag H) I)^-1,   H = Xq^T Xq,   D = (X - Xq)^T Xq,   Xq the inputs as the packed layer sees

W* minimizes ||W X - W* Xq||^2, and later passes round it with the same H, so rounding weights repairs some of what rounding
inputs broke. (RepQuant, Li et al., 2024, whose abstract names the step; this form is ours: the ridge pulls to W, not to 0.)
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from quant.passes.base import Corrector
from quant.passes.qep import ridge_move
from quant.stats import InputStats


class Pass(Corrector):
    """strength: 0 to 1, how far towards W*. damp: of the mean diagonal of H."""

    strength: float = Field(1.0, ge=0, le=1)
    damp: float = Field(0.01, gt=0)

    @property
    def rounded(self) -> bool:
        return True

    @property
    def needs_float(self) -> bool:
        return False

    def correct(self, weight: Tensor, stats: InputStats) -> Tensor:
        return weight + self.strength * ridge_move(weight, stats, self.damp)
