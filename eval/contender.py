"""What takes part in a speed comparison: our folder, the float model, and rivals made from it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from quant.eval import loading
from quant.eval.rivals.base import Choice
from quant.eval.speed_worker import Loader, open_model


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A side before it runs."""

    name: str  # "model", "against" or a rival's
    model: str
    numbers: str  # the number types it computes with, and the version of a rival
    weight_bytes: int  # on disk
    load: Loader
    rival: bool = False  # its failure does not end the comparison


def ours(name: str, folder: Path, dtype: str, device: str, eager: bool = False) -> Contender:
    """A packed folder, compiled unless `eager`, or a float checkpoint, run by transformers."""
    numbers = dtype
    if loading.is_ours(folder):
        recipe = loading.read_json(folder / "report.json").get("recipe") if (folder / "report.json").is_file() else "packed"
        numbers = f"{recipe}, the rest {dtype}" + (", eager" if eager else "")
    load = partial(open_model, folder, dtype, device, compile=not eager)
    return Contender(name=name, model=str(folder), numbers=numbers, weight_bytes=loading.weight_bytes(folder), load=load)


def rivals(
    choices: Sequence[Choice], source: Path, scratch: Path, threads: int, say: Callable[[str], None]
) -> tuple[list[Contender], dict[str, str]]:
    """Those that can run `source`, converted into folders under `scratch`; name -> one line of reason of the others."""
    kind = loading.kind(source)
    found, absent = [], {}
    for choice in choices:
        rival, name = choice.rival(), str(choice)
        why = choice.missing()
        if rival.kind != kind:
            why = f"it runs {rival.kind} models here, {source} is a {kind} model"
        if why is not None:
            absent[name] = why
            continue
        out = scratch / name.replace(":", "-")
        out.mkdir()
        say(f"{name}: converting {source}")
        try:
            size = _apart(partial(choice.convert, source, out))
        except ValueError as error:
            absent[name] = str(error)
            continue
        found.append(
            Contender(
                name=name,
                model=str(source),
                numbers=f"{rival.distribution} {rival.version()}: {rival.variants[choice.variant]}",
                weight_bytes=size or loading.weight_bytes(source),
                load=partial(choice.open, source, out, threads),
                rival=True,
            )
        )
    return found, absent


def _apart(convert: Callable[[], int]) -> int:
    """The conversion in a process of its own, which may crash without us."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(convert).result()
        except BrokenProcessPool as error:
            raise ValueError("its conversion ended the process it ran in") from error
