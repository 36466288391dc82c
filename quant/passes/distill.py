"""End-to-end distillation of a packed model from its float source, after all blocks are packed (quant/train).

The last pass of a recipe. It needs both models in memory, unlike everything before it: two bytes per weight for the teacher,
about five for the student (four and nine on a CPU without bfloat16). Under `accelerate launch` its processes share the steps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from quant.passes.base import Tell, Tuner
from quant.resources import compute_dtype
from quant.train.distill import Course, Objective, Rates, gradient, train
from quant.train.latent import Discrete
from quant.train.processes import Processes, joined

if TYPE_CHECKING:
    from quant.calibrate import Sample
    from quant.plan import Plan
    from quant.train.folder import Student
    from quant.train.pace import Pace


class Pass(Tuner):
    """steps of `windows` samples each; 0 trains nothing. scales, vectors: learning rates, see train.distill.Rates.

    lam, gamma: how much more tokens count that the float model is unsure of, see train.distill; held-out KL counts all alike.
    held: samples kept to measure on. looks, patience, save_every: see train.distill.Course.

    SmolLM2-135M, W4A16 of quarot-gptq-w4a16, 60 steps of 2048 tokens, scales 0.002, vectors 0.001: held-out KL 0.071 to 0.066,
    perplexity on WikiText-2 +6.9 to +4.3 %; 100 steps with greater rates gave the same.
    """

    steps: int = Field(100, ge=0)
    windows: int = Field(4, ge=1)
    scales: float = Field(1e-3, ge=0)
    vectors: float = Field(1e-3, ge=0)
    lam: float = Field(0.0, ge=0, le=1)
    gamma: float = Field(1.0, ge=0)
    held: int = Field(8, ge=1)
    looks: int = Field(1, ge=1)
    patience: int = Field(2, ge=1)
    save_every: int = Field(20, ge=1)

    @property
    def rates(self) -> Rates:
        """Of the continuous parameters."""
        return Rates(scales=self.scales, vectors=self.vectors)

    @property
    def discrete(self) -> Discrete | None:
        """How codes move."""
        return None

    def objective(self, teacher: Any, student: Student) -> Objective | None:
        """What is minimized; None for the KL of `train.distill`. Called before the two models first run."""
        return None

    def tune(
        self, folder: Path, plan: Plan, device: torch.device, state: Path, tell: Tell, pace: Pace | None
    ) -> dict[str, Any]:
        from quant.models import model_class
        from quant.train.folder import open_student, write_back

        _, cls = model_class(plan.source)
        teacher = cls.from_pretrained(plan.source, dtype=compute_dtype(device)).to(device).eval().requires_grad_(False)
        student, crew = open_student(folder, plan, device, self.discrete), joined(device)
        course = Course(
            steps=self.steps,
            windows=self.windows,
            looks=self.looks,
            patience=self.patience,
            save_every=self.save_every,
            lam=self.lam,
            gamma=self.gamma,
            objective=self.objective(teacher, student),
        )
        if pace is not None:
            some, _ = self.data(plan, device, 1)
            if crew.main:
                pace.steps(lambda: gradient(teacher, student, some, course, 0, Processes()))
            crew.wait()
            course = replace(course, steps=pace.steps(lambda: None))
        samples, line = self.data(plan, device, course.steps)
        given, held = samples[: -self.held], samples[-self.held :]
        progress = train(teacher, student, given, held, course, self.rates, state, tell, crew)
        if crew.main:
            write_back(student, folder, plan)
        return {
            "pass": self.name(),
            "data": line,
            "steps": course.steps,
            "steps_taken": len(progress.losses),
            "held_out_kl": [progress.held[0], min(progress.held)],
            "looks": progress.held,
            "codes_changed": progress.codes,
            "steps_skipped": progress.skipped,
        }

    def data(self, plan: Plan, device: torch.device, steps: int) -> tuple[list[Sample], str]:
        """Samples for so many steps and those held out, and what they are in words. Raises ValueError for too few.

        Those that calibrated the passes before come last of what is trained on: the model repeats them better than other text.
        """
        from quant.samples import make_samples

        wanted = plan.recipe.calibration
        more = wanted.model_copy(update={"tokens": wanted.tokens + (steps * self.windows + self.held) * wanted.length})
        samples, line = make_samples(replace(plan, recipe=plan.recipe.model_copy(update={"calibration": more})), device)
        if len(samples) <= self.held:
            raise ValueError(f"{self.name()} keeps {self.held} samples to measure on and {line} has no more; give more data")
        seen = min(wanted.tokens // wanted.length, len(samples) - self.held)
        return samples[seen : -self.held] + samples[:seen] + samples[-self.held :], line
