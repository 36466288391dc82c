"""The tables of a report, cells as text; what a terminal prints and an HTML page holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from quant.eval.divergence import Fidelity
from quant.eval.harness import Results, TaskTest
from quant.eval.masked import MaskedResult
from quant.eval.paired import LEVEL
from quant.eval.perplexity import TextResult
from quant.eval.speech import SpeechResult, Transcription
from quant.eval.speed import Side, SpeedResult, Spread

METRICS = {
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
    "first_token_ms": "time to first token, ms",
    "rtf": "real-time factor",
}


def table_of(*columns: str) -> Table:
    """An empty table, numbers to the right."""
    table = Table(show_edge=False, pad_edge=False)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at == 0 else "right", overflow="fold")
    return table


def text_table(text: TextResult) -> Table:
    """Perplexities and their ratio."""
    cells = pm(text.perplexity, text.perplexity_error, ".4f"), pm(text.reference_perplexity, None, ".4f")
    return windows_table(("", "ratio"), "perplexity", cells, pm(text.ratio, text.ratio_error, ".5f"), text.p_value)


def masked_table(masked: MaskedResult) -> Table:
    """Bounds of the likelihood and their difference."""
    cells = pm(masked.bound, masked.bound_error, ".4f"), pm(masked.reference_bound, None, ".4f")
    titles, change = (
        (f"{masked.draws} masks of each window", "difference"),
        pm(masked.difference, masked.difference_error, "+.5f"),
    )
    return windows_table(titles, "bound of -log p, nats per token", cells, change, masked.p_value)


def windows_table(titles: tuple[str, str], name: str, cells: tuple[str, str], change: str, p_value: float | None) -> Table:
    """One quantity of model and reference under the titles of its column and of the change; the test where there is one."""
    table = table_of(titles[0], "model", "reference", titles[1])
    table.add_row(name, *cells, change)
    if change:
        table.add_row("paired t test over windows", "", "", verdict(p_value))
    return table


def masks_table(masked: MaskedResult) -> Table:
    """Divergence by the share of masks."""
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


def fidelity_table(fidelity: Fidelity, truth: bool) -> Table:
    """Divergence and agreement. truth: the tokens are those of a text, not what the reference itself wrote."""
    table = table_of(f"against the reference, {fidelity.tokens} tokens", "")
    table.add_row("mean KL divergence, nats", pm(fidelity.kl_mean, fidelity.kl_error, ".6f"))
    table.add_row("median KL", f"{fidelity.kl_median:.6f}")
    percentiles = {"90": fidelity.kl_p90, "95": fidelity.kl_p95, "99": fidelity.kl_p99, "99.9": fidelity.kl_p999}
    for name, value in percentiles.items():
        table.add_row(f"{name} % KL", f"{value:.5f}")
    table.add_row("maximum KL", f"{fidelity.kl_max:.5f}")
    table.add_row("top-1 agreement", pm(fidelity.top1, fidelity.top1_error, ".3%"))
    table.add_row("top-1 flips", pm(1 - fidelity.top1, fidelity.top1_error, ".3%"))
    if truth:
        table.add_row("  from right to wrong", f"{fidelity.flips_lost:.3%}")
        table.add_row("  from wrong to right", f"{fidelity.flips_gained:.3%}")
    table.add_row("RMS delta-p of the correct token", f"{fidelity.rms_delta_p:.3%}")
    return table


def speech_table(speech: SpeechResult) -> Table:
    """Word errors of both models and their difference."""
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


def task_table(tasks: Results, references: Results, tests: Mapping[str, Mapping[str, TaskTest]]) -> Table:
    """Every metric of every task with its standard error, and how the two models compare item by item."""
    table = table_of("lm-eval task", "metric", "model", "reference", "right to wrong", "wrong to right", "paired test")
    for task, values in tasks.items():
        reference = references.get(task, {})
        for metric in values:
            if metric == "version" or "_stderr" in metric:
                continue
            cells = [_task_value(side, metric, side.get(metric)) for side in (values, reference)]
            test = tests.get(task, {}).get(metric)
            if test is not None:
                flips = ["" if count is None else f"{count} of {test.items}" for count in (test.lost, test.gained)]
                cells += [*flips, verdict(test.p_value)]
            table.add_row(task, metric, *cells)
    return table


def _task_value(values: dict[str, float | str], metric: str, value: Any) -> str:
    name, comma, rest = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{rest}")
    return pm(value, error if isinstance(error, float) else None, ".4f")


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
        cells += ["" if (size := read(side)) is None else mb(size) for read in sizes.values()]
        table.add_row(side.name, *(_spread(side.metrics.get(name)) for name in metrics), *cells)
        if side.ratios is not None:
            table.add_row("  model / it", *(_spread(side.ratios.get(name), ".3g") for name in metrics))
    return table


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


def mb(size: int) -> str:
    """Bytes as MB."""
    return f"{size / 1e6:.1f} MB"
