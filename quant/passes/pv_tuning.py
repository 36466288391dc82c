"""PV-Tuning (Malinovskii et al., 2024): end-to-end distillation that also changes codes, few of them at a time.

A P step moves what is continuous (scales, codebooks, norms), a V step moves codes along the gradient of the dense weight, in
the tiles only that want to move most. Its authors step by LAMB with a rate relative to the weight's size; here Adam moves
latents in steps of the grid, which for 2 bits is about the same. Works on every format whose codes can be rounded under given
parameters: scalar grids of 2 to 8 bits, two planes, small floats, codebooks.

A latent starts at its code, so codes move only once their rate has carried it half a gap. Their batches are a million tokens;
the gradient of a thousand says little about one code. SmolLM2-135M, aqlm 1x8g4 at perplexity 46.5, 24 steps of 1024 tokens:
40.2 with codes 0.01, where none moved; 40.9 with codes 0.03, tau 0.003 (11208 tiles moved); codes 0.06, tau 0.05 took the loss
from 0.7 to 1.8 in ten steps, for latents of tiles that wait for their turn run on.
"""

from __future__ import annotations

from pydantic import Field

from quant.passes import distill
from quant.train.distill import Rates
from quant.train.latent import Discrete


class Pass(distill.Pass):
    """codes: rate of the latents, in steps of the grid. tau, decay, trust: see train.latent; tau = 1 is straight-through."""

    codes: float = Field(5e-3, gt=0)
    tau: float = Field(0.01, gt=0, le=1)
    decay: float = Field(0.0, ge=0, le=1)
    trust: float = Field(0.0, ge=0, le=1)

    @property
    def rates(self) -> Rates:
        return Rates(scales=self.scales, vectors=self.vectors, codes=self.codes)

    @property
    def discrete(self) -> Discrete | None:
        return Discrete(self.tau, self.decay, self.trust)
