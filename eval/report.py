"""Evaluation results as tables for people and JSON for programs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quant.eval.divergence import Fidelity
from quant.eval.harness import Results, TaskTest
from quant.eval.masked import MaskedResult
from quant.eval.paired import LEVEL
from quant.eval.perplexity import TextResult
from quant.eval.samples import Sample
from quant.eval.speech import SpeechResult, Transcription
from quant.eval.speed import Side, SpeedResult, Spread

CHANGES_SHOWN = 5
SIDES = "Side by side"  # the section of texts
METRICS = {
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
    "first_token_ms": "time to first token, ms",
    "rtf": "real-time factor",
}


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
        out.append(Section("Text", [line], [_text_table(text)]))
    if result.masked is not None:
        masked = result.masked
        line = (
            f"text: {result.corpus}, {masked.windows} windows of {masked.length} tokens, masked by token {masked.mask_token} "
            f"(seed {masked.seed})"
        )
        out.append(Section("Masked text", [line], [_masked_table(masked)] + [_masks_table(masked)] * bool(masked.fidelity)))
    if result.speech is not None:
        speech = result.speech
        line = (
            f"speech: {result.corpus}, {speech.clips} clips, {speech.audio_seconds:.1f} s, {speech.model.words} words; "
            f"normalizer: {speech.normalizer}"
        )
        out.append(Section("Speech", [line], [_speech_table(speech)]))
    fidelity = (result.text or result.speech).fidelity if result.text or result.speech else None  # type: ignore[union-attr]
    if fidelity is not None:
        out.append(Section("Divergence", [], [_fidelity_table(fidelity)]))
    out.append(Section(SIDES, [], []))
    if result.tasks:
        out.append(Section("Tasks", [], [_task_table(result)]))
    sizes = f"safetensors {_mb(result.weight_bytes)}"
    if result.reference_weight_bytes:
        share = result.weight_bytes / result.reference_weight_bytes
        sizes += f" against {_mb(result.reference_weight_bytes)} ({share:.1%})"
    lines = [f"{sizes}; peak RSS {_mb(result.peak_rss_bytes)}, everything evaluated in one process; {result.seconds:.1f} s"]
    if result.resumed:
        lines.append(f"{result.resumed} parts were measured by an earlier run that was stopped")
    speed = result.efficiency
    out.append(Section("Efficiency", lines + (speed_lines(speed) if speed else []), [speed_table(speed)] if speed else []))
    return out


def pairs(result: Evaluation) -> list[Pair]:
    """Continuations of the same prompts, and clips on which the two models wrote different text."""
    out = []
    for sample in result.samples:
        note = "the same" if sample.same is None else f"the first {sample.same} tokens are the same"
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
    console.print(speed_table(result))


def speed_lines(result: SpeedResult) -> list[str]:
    """What was run, and how."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return [
        f"{result.workload}; {result.threads} threads on {result.device}; {versions}",
        f"median [quartiles] of {result.repeats} alternating repeats after {result.warmup} warm-up",
        *(f"{side.name}: {side.model}, {side.numbers}" for side in (result.model, *result.others)),
        *(f"{name}: not measured, {why}" for name, why in result.absent.items()),
    ]


def speed_table(result: SpeedResult) -> Table:
    """One row per side: medians, quartiles in brackets; below them the first row's ratio to it."""
    sides = [result.model, *result.others]
    sizes: dict[str, Callable[[Side], int | None]] = {
        "peak RSS": lambda side: side.peak_rss_bytes,
        "of it model": lambda side: side.peak_rss_bytes - side.bare_rss_bytes,
        "device peak": lambda side: side.device_bytes,
        "on disk": lambda side: side.weight_bytes,
    }
    sizes = {name: read for name, read in sizes.items() if read(result.model) is not None}
    wer = ["WER"] if any(side.wer is not None for side in sides) else []
    metrics = list(result.model.metrics)
    table = table_of("", *(METRICS[name] for name in metrics), "load to first token, s", *wer, *sizes)
    for side in sides:
        cells = ["" if side.cold_s is None else f"{side.cold_s:.2f}", *[pm(side.wer, None, ".2%")] * len(wer)]
        cells += ["" if (size := read(side)) is None else _mb(size) for read in sizes.values()]
        table.add_row(side.name, *(_spread(side.metrics.get(name)) for name in metrics), *cells)
        if side.ratios is not None:
            table.add_row("  model / it", *(_spread(side.ratios.get(name), ".3g") for name in metrics))
    return table


def table_of(*columns: str) -> Table:
    """An empty table, numbers to the right."""
    table = Table(show_edge=False, pad_edge=False)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at == 0 else "right", overflow="fold")
    return table


def _text_table(text: TextResult) -> Table:
    table = table_of("", "model", "reference", "ratio")
    table.add_row(
        "perplexity",
        pm(text.perplexity, text.perplexity_error, ".4f"),
        pm(text.reference_perplexity, None, ".4f"),
        pm(text.ratio, text.ratio_error, ".5f"),
    )
    if text.ratio is not None:
        table.add_row("paired t test over windows", "", "", verdict(text.p_value))
    return table


def _masked_table(masked: MaskedResult) -> Table:
    table = table_of(f"{masked.draws} masks of each window", "model", "reference", "difference")
    table.add_row(
        "bound of -log p, nats per token",
        pm(masked.bound, masked.bound_error, ".4f"),
        pm(masked.reference_bound, None, ".4f"),
        pm(masked.difference, masked.difference_error, "+.5f"),
    )
    if masked.difference is not None:
        table.add_row("paired t test over windows", "", "", verdict(masked.p_value))
    return table


def _masks_table(masked: MaskedResult) -> Table:
    table = table_of("against the reference, share of masks", *masked.fidelity)
    rows: dict[str, Callable[[Fidelity], str]] = {
        "masked tokens": lambda one: str(one.tokens),
        "mean KL divergence, nats": lambda one: pm(one.kl_mean, one.kl_error, ".6f"),
        "99 % KL": lambda one: f"{one.kl_p99:.5f}",
        "top-1 agreement": lambda one: pm(one.top1, one.top1_error, ".3%"),
    }
    for name, read in rows.items():
        table.add_row(name, *(read(one) for one in masked.fidelity.values()))
    return table


def _fidelity_table(fidelity: Fidelity) -> Table:
    table = table_of(f"against the reference, {fidelity.tokens} tokens", "")
    table.add_row("mean KL divergence, nats", pm(fidelity.kl_mean, fidelity.kl_error, ".6f"))
    table.add_row("median KL", f"{fidelity.kl_median:.6f}")
    percentiles = {"90": fidelity.kl_p90, "95": fidelity.kl_p95, "99": fidelity.kl_p99, "99.9": fidelity.kl_p999}
    for name, value in percentiles.items():
        table.add_row(f"{name} % KL", f"{value:.5f}")
    table.add_row("maximum KL", f"{fidelity.kl_max:.5f}")
    table.add_row("top-1 agreement", pm(fidelity.top1, fidelity.top1_error, ".3%"))
    table.add_row("top-1 flips", pm(1 - fidelity.top1, fidelity.top1_error, ".3%"))
    table.add_row("  from right to wrong", f"{fidelity.flips_lost:.3%}")
    table.add_row("  from wrong to right", f"{fidelity.flips_gained:.3%}")
    table.add_row("RMS delta-p of the correct token", f"{fidelity.rms_delta_p:.3%}")
    return table


def _speech_table(speech: SpeechResult) -> Table:
    sides: list[Transcription] = [speech.model] + ([speech.reference] if speech.reference is not None else [])
    table = table_of("", "model", *(["reference"] if speech.reference is not None else []))
    rows: dict[str, Callable[[Transcription], str]] = {
        "WER": lambda side: pm(side.wer, side.wer_error, ".2%"),
        "substitutions": lambda side: str(side.substitutions),
        "deletions": lambda side: str(side.deletions),
        "insertions": lambda side: str(side.insertions),
        "repetition loops": lambda side: str(side.loops),
        "real-time factor": lambda side: f"{side.rtf:.3f}",
    }
    for name, read in rows.items():
        table.add_row(name, *(read(side) for side in sides))
    if speech.changed is not None:
        table.add_row("WER change, paired", pm(speech.wer_change, speech.wer_change_error, "+.2%"))
        if speech.wer_change_interval is not None:
            low, high = speech.wer_change_interval
            table.add_row("95 % interval", f"{low:+.2%} to {high:+.2%}, {'not ' * (low <= 0 <= high)}significant")
        table.add_row("changed transcripts", f"{speech.changed} of {speech.clips}")
    return table


def _task_table(result: Evaluation) -> Table:
    table = table_of("lm-eval task", "metric", "model", "reference", "right to wrong", "wrong to right", "paired test")
    for task, values in result.tasks.items():
        reference = result.reference_tasks.get(task, {})
        for metric in values:
            if metric == "version" or "_stderr" in metric:
                continue
            cells = [_task_value(side, metric, side.get(metric)) for side in (values, reference)]
            test = result.task_tests.get(task, {}).get(metric)
            if test is not None:
                flips = ["" if count is None else f"{count} of {test.items}" for count in (test.lost, test.gained)]
                cells += [*flips, verdict(test.p_value)]
            table.add_row(task, metric, *cells)
    return table


def _task_value(values: dict[str, float | str], metric: str, value: Any) -> str:
    name, comma, rest = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{rest}")
    return pm(value, error if isinstance(error, float) else None, ".4f")


def pm(value: float | None, error: float | None, shape: str) -> str:
    """`value ± error` in one format; empty for None, without the error where there is none."""
    if value is None:
        return ""
    return f"{value:{shape}}" if error is None else f"{value:{shape}} ± {error:{shape.lstrip('+')}}"


def verdict(p_value: float | None) -> str:
    """A p value in words; None is a single unit."""
    if p_value is None:
        return "needs two or more"
    return f"p = {p_value:.2g}, {'not ' * (p_value >= LEVEL)}significant"


def _spread(spread: Spread | None, shape: str = ".4g") -> str:
    if spread is None:
        return ""
    # the backslash keeps rich from reading a style
    return f"{spread.median:{shape}} \\[{spread.q1:{shape}}, {spread.q3:{shape}}]"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
