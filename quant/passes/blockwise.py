"""Block-wise reconstruction of a packed block from its float outputs (quant/train/block.py), after its quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from quant.passes.base import BlockTuner

if TYPE_CHECKING:
    from quant.train.block import PackedBlock, Penalty
    from quant.train.pace import Pace


class Pass(BlockTuner):
    """steps of `windows` samples each; 0 trains nothing. codes, scales, vectors: rates, see train.block.Rates; 0 leaves its
    kind alone.

    same: weight of the term on equal inputs. held, looks, patience: see train.block.Schedule.
    """

    steps: int = Field(96, ge=0)
    windows: int = Field(1, ge=1)
    codes: float = Field(0.015, ge=0)
    scales: float = Field(5e-3, ge=0)
    vectors: float = Field(1e-3, ge=0)
    same: float = Field(0.0, ge=0)
    held: int = Field(6, ge=1)
    looks: int = Field(2, ge=1)
    patience: int = Field(2, ge=1)

    def penalty(self, block: PackedBlock, folder: Path) -> Penalty | None:
        """A further term of the loss."""
        return None

    def tune(self, block: PackedBlock, folder: Path, pace: Pace | None) -> dict[str, Any]:
        from quant.train.block import Rates, Reconstruction, Schedule

        rates, penalty = Rates(codes=self.codes, scales=self.scales, vectors=self.vectors), self.penalty(block, folder)
        training = Reconstruction(block, rates, self.same)
        schedule = Schedule(
            steps=self.steps if pace is None else training.fitting(pace, self.windows, self.held, self.looks, penalty),
            windows=self.windows,
            held=self.held,
            looks=self.looks,
            patience=self.patience,
            seed=torch.initial_seed(),  # of this block, however the run got to it
        )
        outcome = training.fit(schedule, penalty)
        training.finish()
        return {
            "steps": schedule.steps,
            "held_out_error": outcome.held,
            "codes_changed": outcome.codes,
            "steps_skipped": outcome.skipped,
        }
