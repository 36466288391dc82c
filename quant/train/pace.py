"""How many steps a training takes when the user gives a time instead: `quantize --budget 1h`.

Half of the time goes to the blocks where there is training after them, nearly all of it where there is none; training after the
blocks gets what they left. The steps of a training are chosen once, from the time of its own first step, and kept in a file: a
killed run goes on with the same schedule. The recipe.yaml of the result says them, so the result can be made again without a
clock.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LEAST, MOST = 8, 4000  # steps
KEPT = 0.05  # of the budget, for held-out samples and for writing
UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """ "90s", "10m", "1h" or "1.5h" in seconds. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"budget {text!r} is no time; give one like 10m, 1h or 8h")
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Pace:
    """seconds: for all steps of one training. file: where their number is kept, one for all trainings that share it."""

    seconds: float
    file: Path

    def known(self) -> int | None:
        """The number of steps, where it was chosen before."""
        return int(json.loads(self.file.read_text(encoding="utf-8"))) if self.file.is_file() else None

    def steps(self, once: Callable[[], object], besides: float = 0.0) -> int:
        """The number of steps; once: what a step does. besides: seconds that the training takes however many they are."""
        if (chosen := self.known()) is not None:
            return chosen
        once()  # the first one makes its buffers
        began = time.monotonic()
        once()
        steps = fitting(self.seconds - besides, time.monotonic() - began)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(steps), encoding="utf-8")
        os.replace(temporary, self.file)
        return steps


def fitting(seconds: float, step: float) -> int:
    """How many steps of `step` seconds fit, at least LEAST, at most MOST."""
    return max(LEAST, min(MOST, int(seconds / max(step, 1e-6))))


def block_seconds(budget: float, blocks: int, fixed: float, more: bool) -> float:
    """For the training of one block; fixed: what the rest of a block takes. more: whether training follows the blocks."""
    return budget * (1 - KEPT) * (0.5 if more else 1.0) / blocks - fixed


def left_seconds(budget: float, spent: float, trainings: int) -> float:
    """For one of the trainings after the blocks."""
    return (budget * (1 - KEPT) - spent) / trainings
