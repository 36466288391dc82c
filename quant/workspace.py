"""The folder of an unfinished run: finished blocks, both chains, and what the run was for.

A block counts once `progress.json` names it; that file is replaced in one step after the block's tensors and the chains
are written. Whatever a killed run left besides is overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.kernels.format import Fields
from quant.models import Entry, read_header, read_json


def partial_folder(output: Path) -> Path:
    """Where the run that will make `output` keeps what it has so far."""
    return output.with_name(f"{output.name}.partial")


class Workspace:
    """reports: one dict per finished block, in order."""

    def __init__(self, output: Path, identity: str) -> None:
        """Open or create the workspace beside `output`. Raises ValueError when it belongs to another run, or one is at work."""
        self.folder = partial_folder(output)
        self.reports: list[dict[str, Any]] = []
        self.stacks_done = 0
        self._progress = self.folder / "progress.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / "lock")  # the system releases it when the process dies
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(f"another run is writing {output}; wait for it, or give another -o") from None
        if self._progress.is_file():
            state = read_json(self._progress)
            if state.get("identity") != identity:
                raise ValueError(
                    f"{self.folder} holds an unfinished run with another recipe, model or calibration data; "
                    "finish it with its own command, delete it, or give another -o"
                )
            self.reports, self.stacks_done = state["reports"], state["stacks_done"]
        self.identity = identity

    def commit(self, report: dict[str, Any], fields: Fields, hidden: dict[str, list[Tensor]], stack_ends: bool) -> None:
        """Make one finished block permanent; hidden: the states behind it, by chain."""
        done = len(self.reports)
        self._save(fields, f"block-{done:05d}.safetensors")
        name = f"final-{self.stacks_done}" if stack_ends else f"chain-{done}"
        for kind, states in hidden.items():
            self._save({f"{i:06d}": tensor.cpu() for i, tensor in enumerate(states)}, f"{name}-{kind}.safetensors")
        self.reports.append(report)
        self.stacks_done += stack_ends
        state = {"identity": self.identity, "stacks_done": self.stacks_done, "reports": self.reports}
        temporary = self._progress.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._progress)
        for old in self.folder.glob("chain-*"):
            if not old.name.startswith(f"chain-{done}-"):
                old.unlink()

    def chain(self, kind: str) -> list[Tensor]:
        """Hidden states after the last finished block."""
        return self._load(f"chain-{len(self.reports) - 1}-{kind}.safetensors")

    def final(self, stack: int, kind: str) -> list[Tensor]:
        """Outputs of a finished stack."""
        return self._load(f"final-{stack}-{kind}.safetensors")

    def keep_table(self, fields: Fields) -> None:
        """Write the packed table of the head, by name on disk. Every run makes it anew: the bytes are the same."""
        self._save(fields, "table.safetensors")

    def table(self) -> Fields:
        """What `keep_table` wrote; empty where the head stays in float."""
        file = self.folder / "table.safetensors"
        return load_file(file) if file.is_file() else {}

    def made(self) -> dict[str, Entry]:
        """Where each finished tensor lies, by name on disk."""
        file = self.folder / "table.safetensors"
        found = read_header(file) if file.is_file() else {}
        for i in range(len(self.reports)):
            found |= read_header(self.folder / f"block-{i:05d}.safetensors")
        return found

    def publish(self, final: Path, output: Path) -> None:
        """Move the finished folder to `output`, which is empty or not there, and delete the workspace."""
        if output.is_dir():
            output.rmdir()
        os.replace(final, output)
        self.remove()

    def remove(self) -> None:
        """Delete the workspace."""
        shutil.rmtree(self.folder)
        self._lock.release()

    def _save(self, tensors: dict[str, Tensor], name: str) -> None:
        temporary = self.folder / f"{name}.tmp"
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
        except SafetensorError as error:  # it wraps what the system said, for instance that the disk is full
            temporary.unlink(missing_ok=True)
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(temporary)) from error
        os.replace(temporary, self.folder / name)

    def _load(self, name: str) -> list[Tensor]:
        tensors = load_file(self.folder / name)
        return [tensors[key] for key in sorted(tensors)]
