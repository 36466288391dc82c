"""End-to-end distillation of a packed model from its float source, after all blocks are packed (quant/train).

The last pass of a recipe. It needs both models in memory, unlike everything before it: two bytes per weight for the teacher,
about five for the student, five more where codes move (four, nine and five on a CPU without bfloat16).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from quant.passes.base import Tell, Tuner
from quant.resources import compute_dtype

if TYPE_CHECKING:
    from quant.plan import Plan


class Pass(Tuner):
    """steps of `windows` samples each. scales, vectors, codes: learning rates, see train.distill.Rates; 0 leaves codes alone.

    tau: the largest share of a layer's codes that changes in one step. lam, gamma: how much more tokens count that the float
    model is unsure of, see train.distill; held-out KL counts all alike. held: samples kept to measure on. save_every: steps.

    SmolLM2-135M, W4A16 of quarot-gptq-w4a16, 60 steps of 2048 tokens, scales 0.002, vectors 0.001: held-out KL 0.071 to 0.066,
    perplexity on WikiText-2 +6.9 to +4.3 %; 100 steps with greater rates gave the same. codes 0.03 raised the loss from 0.05
    to 0.29 within ten steps: few steps are no time to change codes that GPTQ chose well.
    """

    steps: int = Field(100, ge=1)
    windows: int = Field(4, ge=1)
    scales: float = Field(1e-3, ge=0)
    vectors: float = Field(1e-3, ge=0)
    codes: float = Field(0.0, ge=0)
    tau: float = Field(0.01, gt=0, le=1)
    lam: float = Field(0.0, ge=0, le=1)
    gamma: float = Field(1.0, ge=0)
    held: int = Field(8, ge=1)
    save_every: int = Field(20, ge=1)

    def tune(self, folder: Path, plan: Plan, device: torch.device, state: Path, tell: Tell) -> dict[str, Any]:
        from quant.models import model_class
        from quant.samples import make_samples
        from quant.train.distill import Rates, train
        from quant.train.folder import open_student, write_back

        wanted = plan.recipe.calibration
        count = self.steps * self.windows + self.held
        more = wanted.model_copy(update={"tokens": max(wanted.tokens, count * wanted.length)})
        samples, line = make_samples(replace(plan, recipe=plan.recipe.model_copy(update={"calibration": more})), device)
        if len(samples) <= self.held:
            raise ValueError(f"distill keeps {self.held} samples to measure on and {line} has no more; give more data")
        _, cls = model_class(plan.source)
        teacher = cls.from_pretrained(plan.source, dtype=compute_dtype(device)).to(device).eval().requires_grad_(False)
        student = open_student(folder, plan, device, codes=self.codes > 0)
        rates = Rates(scales=self.scales, vectors=self.vectors, codes=self.codes, tau=self.tau)
        progress = train(
            teacher,
            student,
            samples[: -self.held],
            samples[-self.held :],  # the first ones are those that calibrated the passes before
            steps=self.steps,
            windows=self.windows,
            rates=rates,
            state=state,
            save_every=self.save_every,
            lam=self.lam,
            gamma=self.gamma,
            tell=tell,
        )
        write_back(student, folder, plan)
        return {
            "pass": "distill",
            "data": line,
            "steps": self.steps,
            "held_out_kl": progress.held,
            "codes_changed": progress.codes,
            "steps_skipped": progress.skipped,
        }
