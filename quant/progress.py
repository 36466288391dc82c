"""What the user sees while a run goes on: a bar on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from quant.compile import BlockReport


class Reporter:
    """A context manager whose `block` is the pipeline's listener."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.began = time.monotonic()
        self.first = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self.task = self.bar.add_task("calibrating", total=None)

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def block(self, done: int, total: int, report: BlockReport) -> None:
        """A block is finished."""
        error = sum(layer.error for layer in report.layers) / len(report.layers)
        rtn = sum(layer.rtn_error for layer in report.layers) / len(report.layers)
        line = f"{report.name}  error {error:.4f} (round-to-nearest {rtn:.4f})"
        if self.console.is_terminal:
            self.bar.update(self.task, total=total, completed=done, description=line)
        elif not self.quiet:
            self.first = self.first or done
            spent = time.monotonic() - self.began
            left = spent / (done - self.first + 1) * (total - done)
            self.console.print(f"[{done}/{total}] {line}  {spent:.0f} s, {left:.0f} s left", highlight=False, soft_wrap=True)
        for layer, reason in report.refused_folds.items():
            if done == 1 and not self.quiet:
                self.console.print(f"  {layer} is not smoothed: {reason}", highlight=False, soft_wrap=True)

    def training(self, done: int, total: int, loss: float) -> None:
        """A training step is finished."""
        line = f"step {done}  loss {loss:.4f}"
        if self.console.is_terminal:
            self.bar.update(self.task, total=total, completed=done, description=line)
        elif not self.quiet and (done % 10 == 0 or done == total):
            self.console.print(f"[{done}/{total}] {line}", highlight=False, soft_wrap=True)

    def evaluation(self, done: int, total: int) -> None:
        """So many windows or clips have been measured."""
        if self.console.is_terminal:
            self.bar.update(self.task, total=total, completed=done, description="evaluating")
