"""What a long evaluation has finished, unit by unit (windows, clips, prompts, tasks), as lines of a file.

A killed evaluation goes on after the last whole line, and ends with the numbers that it would have had: JSON keeps every bit
of a float.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """resumed: units that an earlier run had finished. Without a path nothing is kept."""

    def __init__(self, path: Path | None = None, fresh: bool = False) -> None:
        """fresh: forget what the file at `path` holds. Its folder must exist."""
        self._path = path
        self._known: dict[str, Any] = {}
        if path is not None and fresh:
            path.unlink(missing_ok=True)
        elif path is not None and path.is_file():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(whole), encoding="utf-8")  # without the line that was being written
            self._known = dict(map(json.loads, whole))
        self.resumed = len(self._known)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The value of unit `name`, to be asked for once: as it was kept, else work(), of JSON's types."""
        if name in self._known:
            return self._known.pop(name)
        value = work()
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, value]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return value

    def finish(self) -> None:
        """Delete the file: the whole is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
