"""Evaluation results as tables for people and JSON for programs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quant.eval.divergence import Fidelity
from quant.eval.masked import MaskedResult
from quant.eval.paired import LEVEL
from quant.eval.perplexity import TextResult
from quant.eval.speech import SpeechResult, Transcription
from quant.eval.speed import Side, SpeedResult, Spread

CHANGES_SHOWN = 5
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
    seconds: float
    versions: dict[str, str]
    text: TextResult | None = None
    masked: MaskedResult | None = None
    speech: SpeechResult | None = None
    tasks: dict[str, dict[str, float | str]] = field(default_factory=dict)
    reference_tasks: dict[str, dict[str, float | str]] = field(default_factory=dict)


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


def show(result: Evaluation, console: Console | None = None) -> None:
    """Print an evaluation."""
    console = console or Console()
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    console.print(f"{result.model} against {result.against or 'nothing'}; {result.dtype} on {result.device}; {versions}")
    if result.text is not None:
        console.print(
            f"text: {result.corpus}, {result.text.windows} windows of {result.text.length} tokens, "
            f"{result.text.tokens} predictions"
        )
        console.print(_text_table(result.text))
    if result.masked is not None:
        masked = result.masked
        console.print(
            f"text: {result.corpus}, {masked.windows} windows of {masked.length} tokens, masked by token {masked.mask_token} "
            f"(seed {masked.seed})"
        )
        console.print(_masked_table(masked))
        if masked.fidelity:
            console.print(_masks_table(masked))
    if result.speech is not None:
        speech = result.speech
        console.print(
            f"speech: {result.corpus}, {speech.clips} clips, {speech.audio_seconds:.1f} s, {speech.model.words} words; "
            f"normalizer: {speech.normalizer}"
        )
        console.print(_speech_table(speech))
        _show_changes(speech, console)
    fidelity = (result.text or result.speech).fidelity if result.text or result.speech else None  # type: ignore[union-attr]
    if fidelity is not None:
        console.print(_fidelity_table(fidelity))
    if result.tasks:
        console.print(_task_table(result))
    sizes = f"safetensors {_mb(result.weight_bytes)}"
    if result.reference_weight_bytes:
        share = result.weight_bytes / result.reference_weight_bytes
        sizes += f" against {_mb(result.reference_weight_bytes)} ({share:.1%})"
    console.print(
        f"{sizes}; peak RSS {_mb(result.peak_rss_bytes)}, everything evaluated in one process; {result.seconds:.1f} s"
    )


def show_speed(result: SpeedResult, console: Console | None = None) -> None:
    """Print a speed comparison, one row per side: medians, quartiles in brackets; below them the first row's ratio to it."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    sides = [result.model, *result.others]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    console.print(f"{result.workload}; {result.threads} threads on {result.device}; {versions}")
    console.print(f"median [quartiles] of {result.repeats} alternating repeats after {result.warmup} warm-up", markup=False)
    for side in sides:
        console.print(f"{side.name}: {side.model}, {side.numbers}", markup=False, highlight=False)
    for name, why in result.absent.items():
        console.print(f"{name}: not measured, {why}", markup=False, highlight=False)
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
    console.print(table)


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


def _show_changes(speech: SpeechResult, console: Console) -> None:
    changes = [line for line in speech.lines if line.reference_transcript not in (None, line.transcript)]
    for line in changes[:CHANGES_SHOWN]:
        console.print(f"  {Path(line.file).name}", highlight=False, markup=False)
        console.print(f"    reference: {line.reference_transcript}", highlight=False, markup=False)
        console.print(f"    model:     {line.transcript}", highlight=False, markup=False)
    if len(changes) > CHANGES_SHOWN:
        console.print(f"  and {len(changes) - CHANGES_SHOWN} more; --json lists all")


def _task_table(result: Evaluation) -> Table:
    table = table_of("lm-eval task", "metric", "model", "reference")
    for task, values in result.tasks.items():
        reference = result.reference_tasks.get(task, {})
        for metric, value in values.items():
            if metric != "version" and "_stderr" not in metric:
                table.add_row(
                    task, metric, _task_value(values, metric, value), _task_value(reference, metric, reference.get(metric))
                )
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
