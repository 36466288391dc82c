"""What an end-to-end training has done so far, kept in a folder: a killed run goes on from its last step, bit for bit."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.train.folder import Student
from quant.train.processes import Processes


@dataclass
class Progress:
    """losses: of each step, nats per token. held: mean KL on held-out samples at each look, the first before training.

    codes: how many tiles changed theirs. skipped: steps whose gradient was not finite.
    """

    losses: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    codes: int = 0
    skipped: int = 0

    @property
    def waited(self) -> int:
        """Looks since the best one."""
        return len(self.held) - 1 - self.held.index(min(self.held))


def packed_values(student: Student) -> dict[str, Tensor]:
    """All that the packed model is made of and that training changes."""
    found = {f"value.{name}": value.detach() for name, value in student.parameters().items() if not name.endswith(".steps")}
    return found | {f"codes.{name}": layer.codes for name, layer in student.latents.items()}


@torch.no_grad()
def put(student: Student, tensors: dict[str, Tensor]) -> None:
    """Give the student values and codes by the names of `packed_values`."""
    for name, value in student.parameters().items():
        if f"value.{name}" in tensors:
            value.copy_(tensors[f"value.{name}"])
    for name, layer in student.latents.items():
        layer.codes = tensors[f"codes.{name}"].to(layer.codes.device)


def keep(student: Student, state: Path, crew: Processes) -> None:
    """Make the student as it is the one that `take` brings back."""
    if crew.main:
        state.mkdir(parents=True, exist_ok=True)
        write(packed_values(student), state / "best.safetensors")
    crew.wait()


def take(student: Student, state: Path) -> None:
    """Bring back what `keep` kept. Latents stay where they are: training is over."""
    put(student, load_file(state / "best.safetensors"))


def save(student: Student, optimizer: torch.optim.Adam, progress: Progress, state: Path, crew: Processes) -> None:
    """Make all of the run so far permanent, in one step."""
    if crew.main:
        done = len(progress.losses)
        tensors = packed_values(student)
        for name, value in student.parameters().items():
            tensors[f"value.{name}"] = value.detach()
            tensors |= {f"memory.{name}.{key}": held for key, held in optimizer.state.get(value, {}).items()}
        write(tensors, state / f"step-{done}.safetensors")
        temporary = state / "progress.tmp"
        temporary.write_text(json.dumps(asdict(progress)), encoding="utf-8")
        os.replace(temporary, state / "progress.json")
        for old in state.glob("step-*.safetensors"):
            if old.name != f"step-{done}.safetensors":
                old.unlink()
    crew.wait()


def write(tensors: dict[str, Tensor], file: Path) -> None:
    """As safetensors, in place of what was there."""
    temporary = file.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    os.replace(temporary, file)


def restore(student: Student, optimizer: torch.optim.Adam, state: Path) -> Progress:
    """What `save` wrote, put back; a new Progress where there is nothing."""
    file = state / "progress.json"
    if not file.is_file():
        return Progress()
    progress = Progress(**json.loads(file.read_text(encoding="utf-8")))
    tensors = load_file(state / f"step-{len(progress.losses)}.safetensors")
    put(student, tensors)
    for name, value in student.parameters().items():
        start = f"memory.{name}."
        if memory := {key.removeprefix(start): held for key, held in tensors.items() if key.startswith(start)}:
            optimizer.state[value] = {key: held if key == "step" else held.to(value.device) for key, held in memory.items()}
    return progress
