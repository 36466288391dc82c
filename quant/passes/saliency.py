"""Saliency-aware partial retraining (Cao and Aref, 2025): `blockwise` with a penalty on errors of weights that the loss feels.

A small calibration set says little about most weights; the penalty keeps those that the float model's loss is sensitive to
near their values. Rank 0 of the method: no low-rank side path, so the layout and the kernels stay as they are.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file

from quant.passes import blockwise
from quant.passes.base import Transform

if TYPE_CHECKING:
    from quant.calibrate import Sample
    from quant.plan import Plan
    from quant.train.block import PackedBlock, Penalty


class Pass(blockwise.Pass):
    """share: the penalty before training, of the loss. samples: to measure saliency on. cap: see train.saliency.normalized."""

    share: float = Field(0.3, ge=0)
    samples: int = Field(8, ge=1)
    cap: float = Field(0.999, gt=0, le=1)

    def prepare(self, plan: Plan, samples: list[Sample], folder: Path, device: torch.device) -> None:
        from quant.fisher import fisher_diagonals

        if any(isinstance(step, Transform) for step in plan.recipe.build_passes()):
            raise ValueError("saliency measures the weights of the checkpoint, which folds change; take the fold's pass out")
        blocks = [name for stack in plan.stacks for name in stack.blocks]
        if all(file_of(folder, name).is_file() for name in blocks):
            return
        for name, fisher in fisher_diagonals(plan, samples[: self.samples], device):
            temporary = folder / "fisher.tmp"
            save_file({target: f.cpu() for target, f in fisher.items()}, temporary)
            os.replace(temporary, file_of(folder, name))

    def penalty(self, block: PackedBlock, folder: Path) -> Penalty | None:
        from quant.train.saliency import Saliency, normalized

        if not self.share:
            return None
        fisher = load_file(file_of(folder, block.name))
        on = {name: f.to(block.weights[name].device) for name, f in fisher.items()}
        return Saliency(normalized(on, self.cap), block.weights, self.share)


def file_of(folder: Path, block: str) -> Path:
    """Where a block's Fisher diagonals are kept until its turn."""
    return folder / f"fisher-{block}.safetensors"
