"""Evaluation results as tables for people and JSON for programs."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quant.eval import tables
from quant.eval.harness import Results, TaskTest
from quant.eval.masked import MaskedResult
from quant.eval.perplexity import TextResult
from quant.eval.samples import Sample
from quant.eval.speech import SpeechResult
from quant.eval.speed import SpeedResult
from quant.eval.tables import mb

CHANGES_SHOWN = 5
SIDES = "Side by side"  # the section of texts


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything one `quantize eval` found out. Absent parts were not asked for or do not apply."""

    model: str
    against: str | None
    corpus: str  # name of the text or of the clips
    dtype: str
    device: str
    weight_bytes: int
    reference_weight_bytes: int | None
    peak_rss_bytes: int  # of the evaluating process, both models in it
    seconds: float  # of a run that went on where another was stopped, its own part
    versions: dict[str, str]
    resumed: int = 0  # windows, clips, samples and tasks that a stopped run had measured
    text: TextResult | None = None
    masked: MaskedResult | None = None
    speech: SpeechResult | None = None
    samples: list[Sample] = field(default_factory=list)
    tasks: Results = field(default_factory=dict)
    reference_tasks: Results = field(default_factory=dict)
    task_tests: dict[str, dict[str, TaskTest]] = field(default_factory=dict)  # task -> metric
    efficiency: SpeedResult | None = None


@dataclass(frozen=True)
class Section:
    """One part of a report: a title, sentences, tables."""

    title: str
    lines: list[str]
    tables: list[Table]


@dataclass(frozen=True)
class Pair:
    """What two models wrote: `shared` characters, then each its own. title: of what. note: on the difference."""

    title: str
    note: str
    shared: str
    reference: str
    model: str


def as_json(result: Evaluation | SpeedResult) -> str:
    """The result as JSON, field names as in the dataclasses, numbers unrounded."""
    return json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n"


def identity_of(facts: Any) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_json(result: Evaluation | SpeedResult, path: Path) -> None:
    """Write `as_json(result)`; ValueError when the place cannot be written."""
    try:
        path.write_text(as_json(result), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; give --json a path in a folder that exists") from error


def require_writable(*paths: Path | None) -> None:
    """ValueError, before hours of work, for a file that could not be written at the end."""
    for path in paths:
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise ValueError(f"{path} cannot be written; give a file name in a folder that exists")


def show(result: Evaluation, console: Console | None = None) -> None:
    """Print an evaluation."""
    console = console or Console()
    for section in sections(result):
        for line in section.lines:
            console.print(line, markup=False)
        for table in section.tables:
            console.print(table)
        if section.title == SIDES:
            _show_pairs(pairs(result), console, len(result.samples) or CHANGES_SHOWN)


def sections(result: Evaluation) -> list[Section]:
    """All but the texts of an evaluation."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    about = f"{result.model} against {result.against or 'nothing'}; {result.dtype} on {result.device}; {versions}"
    out = [Section("What was compared", [about], [])]
    if result.text is not None:
        text = result.text
        line = f"text: {result.corpus}, {text.windows} windows of {text.length} tokens, {text.tokens} predictions"
        out.append(Section("Text", [line], [tables.text_table(text)]))
    if result.masked is not None:
        masked = result.masked
        line = (
            f"text: {result.corpus}, {masked.windows} windows of {masked.length} tokens, masked by token {masked.mask_token} "
            f"(seed {masked.seed})"
        )
        out.append(
            Section("Masked text", [line], [tables.masked_table(masked)] + [tables.masks_table(masked)] * bool(masked.fidelity))
        )
    if result.speech is not None:
        speech = result.speech
        line = (
            f"speech: {result.corpus}, {speech.clips} clips, {speech.audio_seconds:.1f} s, {speech.model.words} words; "
            f"normalizer: {speech.normalizer}"
        )
        out.append(Section("Speech", [line], [tables.speech_table(speech)]))
    fidelity = (result.text or result.speech).fidelity if result.text or result.speech else None  # type: ignore[union-attr]
    if fidelity is not None:
        out.append(Section("Divergence", [], [tables.fidelity_table(fidelity, truth=result.speech is None)]))
    out.append(Section(SIDES, [], []))
    if result.tasks:
        how = "± standard errors; paired tests: McNemar's where items are right or wrong, else Student's t"
        out.append(Section("Tasks", [how], [tables.task_table(result.tasks, result.reference_tasks, result.task_tests)]))
    sizes = f"safetensors {mb(result.weight_bytes)}"
    if result.reference_weight_bytes:
        share = result.weight_bytes / result.reference_weight_bytes
        sizes += f" against {mb(result.reference_weight_bytes)} ({share:.1%})"
    lines = [f"{sizes}; peak RSS {mb(result.peak_rss_bytes)}, everything evaluated in one process; {result.seconds:.1f} s"]
    if result.resumed:
        lines.append(f"{result.resumed} parts were measured by an earlier run that was stopped")
    speed = result.efficiency
    out.append(
        Section("Efficiency", lines + (speed_lines(speed) if speed else []), [tables.speed_table(speed)] if speed else [])
    )
    return out


def pairs(result: Evaluation) -> list[Pair]:
    """Continuations of the same prompts, and clips on which the two models wrote different text."""
    out = []
    for sample in result.samples:
        note = "the same" if sample.same is None else f"they part at token {sample.same + 1}"
        out.append(_pair(f"{sample.prompt} ...", note, sample.reference, sample.model))
    for line in result.speech.lines if result.speech is not None else ():
        if line.reference_transcript not in (None, line.transcript):
            assert line.reference_transcript is not None
            said = "" if line.text is None else f"said: {line.text}"
            out.append(_pair(Path(line.file).name, said, line.reference_transcript, line.transcript))
    return out


def _pair(title: str, note: str, reference: str, model: str) -> Pair:
    shared = os.path.commonprefix([reference, model])  # noqa: RUF071 (of characters is what is wanted)
    return Pair(title, note, shared, reference[len(shared) :], model[len(shared) :])


def _show_pairs(found: list[Pair], console: Console, shown: int) -> None:
    for pair in found[:shown]:
        texts = {"reference": pair.shared + pair.reference, "model": pair.shared + pair.model}
        lines = [f"  {pair.title}", f"    {pair.note}", *(f"    {f'{side}:':10} {text}" for side, text in texts.items())]
        for line in filter(str.strip, lines):
            console.print(line.replace("\n", " "), highlight=False, markup=False)
    if len(found) > shown:
        console.print(f"  and {len(found) - shown} more; --json and --html list all")


def show_speed(result: SpeedResult, console: Console | None = None) -> None:
    """Print a speed comparison."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    for line in speed_lines(result):
        console.print(line, markup=False, highlight=False)
    console.print(tables.speed_table(result))


def speed_lines(result: SpeedResult) -> list[str]:
    """What was run, and how."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return [
        f"{result.workload}; {result.threads} threads on {result.device}; {versions}",
        f"median [quartiles] of {result.repeats} alternating repeats after {result.warmup} warm-up",
        *(f"{side.name}: {side.model}, {side.numbers}" for side in (result.model, *result.others)),
        *(f"{name}: not measured, {why}" for name, why in result.absent.items()),
    ]
