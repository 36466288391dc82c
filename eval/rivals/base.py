"""What a rival is, and which one a name means.

A rival gets the float checkpoint, makes its own files from it once (in a process that then ends), and is measured in a
process of its own under the same workload and thread count. It is optional software: a missing one is one line.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    from quant.eval.speed_worker import Repeat, Workload

T = TypeVar("T")

# name on the command line -> module that holds its RIVAL
FILES = {
    "llama.cpp": "quant.eval.rivals.llama_cpp",
    "torchao": "quant.eval.rivals.torchao",
    "ctranslate2": "quant.eval.rivals.ctranslate2",
    "faster-whisper": "quant.eval.rivals.faster_whisper",
}


class Rival(ABC):
    """One program; subclasses say how it converts, loads and runs."""

    distribution: ClassVar[str]  # on the package index
    pinned: ClassVar[str]  # version range, as in setup.py's extra `rivals`
    module: ClassVar[str]  # what is imported
    kind: ClassVar[str]  # "text" or "speech"
    variants: ClassVar[dict[str, str]]  # name -> number types it computes with; the first is the default

    def convert(self, source: Path, variant: str, out: Path) -> int:
        """Write the rival's files for the float checkpoint `source` into the empty folder `out`; their size in bytes.

        0 for a rival that quantizes the float checkpoint each time it loads. Raises ValueError for a model it cannot run.
        """
        return 0

    @abstractmethod
    def open(self, source: Path, made: Path, variant: str, work: Workload, threads: int) -> Callable[[], Repeat]:
        """Load what `convert` wrote into `made`; each call of the result runs the workload once."""

    def version(self) -> str:
        """As installed."""
        return importlib.metadata.version(self.distribution)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A rival in one of its variants."""

    name: str
    variant: str

    def __str__(self) -> str:
        return f"{self.name}:{self.variant}"

    def rival(self) -> Rival:
        """The program, which need not be installed."""
        found: Rival = importlib.import_module(FILES[self.name]).RIVAL
        return found

    def missing(self) -> str | None:
        """None if it is installed, else how to install it."""
        rival = self.rival()
        if importlib.util.find_spec(rival.module) is not None:
            return None
        return f"not installed; pip install '{rival.distribution}{rival.pinned}'"

    def convert(self, source: Path, out: Path) -> int:
        """`Rival.convert`, with every failure as below."""
        return _in_one_line(lambda: self.rival().convert(source, self.variant, out))

    def open(self, source: Path, made: Path, threads: int, work: Workload) -> Callable[[], Repeat]:
        """`Rival.open`; every failure, then or later, is a ValueError of one line: other programs may raise anything."""
        measure = _in_one_line(lambda: self.rival().open(source, made, self.variant, work, threads))
        return lambda: _in_one_line(measure)


def _in_one_line(call: Callable[[], T]) -> T:
    try:
        return call()
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}") from error


def choices(text: str) -> list[Choice]:
    """`llama.cpp,torchao:int4` -> choices; a bare name means its first variant, `NAME:all` every one.

    Raises ValueError for unknown names and variants.
    """
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, variant = item.partition(":")
        if name not in FILES:
            nearest = get_close_matches(name, FILES, n=1, cutoff=0.0)[0]
            raise ValueError(f"--rivals names {name!r}; known: {', '.join(FILES)}; did you mean {nearest}?")
        known = list(Choice(name=name, variant="").rival().variants)
        if variant not in (*known, "", "all"):
            raise ValueError(f"--rivals names {item!r}; variants of {name}: {', '.join(known)}, or all")
        wanted = known if variant == "all" else [variant or known[0]]
        found += [Choice(name=name, variant=each) for each in wanted]
    return list(dict.fromkeys(found))
