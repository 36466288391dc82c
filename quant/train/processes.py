"""The processes of one training under `accelerate launch`; one process without it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # the others wait while the first one quantizes all blocks


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `count`."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of the work."""
        return items[self.rank :: self.count]

    def total(self, value: float) -> float:
        """The sum over all processes."""
        if self.count == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return float(tensor)

    def sum_gradients(self, values: Iterable[nn.Parameter]) -> None:
        """Make every .grad the sum over all processes; one without counts as zeros."""
        for value in values if self.count > 1 else ():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
            torch.distributed.all_reduce(value.grad)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()


def launched() -> Processes:
    """What `accelerate launch` says of this process, before it has joined the others."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def own_device(device: torch.device) -> torch.device:
    """Of several processes on one machine each has a GPU of its own."""
    count = launched().count
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" and count > 1 else device


def joined(device: torch.device) -> Processes:
    """Join the other processes, if there are any."""
    here = launched()
    if here.count == 1:
        return here
    from accelerate import PartialState

    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    return Processes(here.rank, here.count, str(device))
