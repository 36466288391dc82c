"""AQLM (Egiazarian et al., 2024): weights as sums of vectors from codebooks, both chosen by the inputs' Gram matrix.

Its authors train codebooks and scales by Adam and search codes with a beam; here they are least squares, and codes are searched
tile by tile (`quant/codebooks.py`). On a [576, 1536] weight with correlated inputs the output error of 1x8g4 was 0.053 of the
signal, of 2x8g8 0.061, of gptq's affine grid of two bits in groups of 64 (15 % more bits) 0.068. Starting from codes that pass
their errors on, as GPTQ does, ended where nearest codes did.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from quant.codebooks import fit
from quant.kernels.format import Codes, Format
from quant.kernels.formats.codebook import Codebook
from quant.passes.base import Quantizer
from quant.search import shrunk
from quant.stats import InputStats


class Pass(Quantizer):
    """sweeps: of codes, codebooks and scales, at most. rounds: of conjugate gradients on the codebooks in each.

    tolerance: gain of a sweep below which it was the last. shrink: see `search.shrunk`. damp: of the mean diagonal, added to
    it, so that channels that no token has reached keep their nearest entries.
    """

    sweeps: int = Field(6, ge=1)
    rounds: int = Field(8, ge=1)
    tolerance: float = Field(0.01, ge=0)
    shrink: float = Field(0.2, ge=0, le=1)
    damp: float = Field(1e-3, gt=0)

    def refuses(self, fmt: Format) -> str | None:
        return None if isinstance(fmt, Codebook) else f"aqlm writes codebook, not {fmt.name}; use gptq or rtn"

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        assert isinstance(fmt, Codebook)
        gram = shrunk(stats.gram, self.shrink)
        gram.diagonal().add_(self.damp * float(gram.diagonal().mean()) or 1.0)  # without data the weights alone count
        return fit(weight, gram, fmt, self.sweeps, self.rounds, self.tolerance)
