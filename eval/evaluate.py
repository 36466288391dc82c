"""`quantize eval`: what a quantized model lost, measured against the model it came from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor

from quant.eval import harness, loading, masked, perplexity, report, speech
from quant.resources import peak_memory_bytes


def text_part(
    folder: Path, model: Any, reference: Any, source: str | None, length: int, limit: int | None, bar: perplexity.Progress
) -> tuple[str, perplexity.TextResult, Any]:
    """Name of the corpus, result, and tokenizer of a text model."""
    corpus, tokens, tokenizer = read_windows(folder, model.config, source, length, limit)
    return corpus, perplexity.evaluate(model, tokens, reference, progress=bar), tokenizer


def read_windows(folder: Path, config: Any, source: str | None, length: int, limit: int | None) -> tuple[str, Tensor, Any]:
    """Name of the corpus, its windows [W, L] in the order of the text, and the tokenizer of `folder` that made them."""
    from transformers import AutoTokenizer

    from quant.text import documents, windows

    room = getattr(config, "max_position_embeddings", None)
    if length < 2 or (room is not None and length > room):
        raise ValueError(f"--length {length}; the model of {folder} takes windows of 2 to {room} tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = documents(source, "evaluation")
    cut = windows(tokenizer, corpus, length, limit, seed=None)
    return f"{corpus.name} ({cut.available} tokens)", cut.tokens, tokenizer


def speech_part(
    folder: Path, model: Any, reference: Any, source: str, limit: int | None, language: str, bar: perplexity.Progress
) -> tuple[str, speech.SpeechResult]:
    """Name of the clips and result of a speech recognizer."""
    from transformers import AutoProcessor

    from quant.audio import clips

    processor = AutoProcessor.from_pretrained(folder)
    found = clips(source, limit, seconds=None)  # whole: a cut clip would lose its transcript
    return source, speech.evaluate(model, reference, processor, found, language=language, folder=folder, progress=bar)


def require_data(folder: Path, text: Any, audio: str | None, limit: int | None) -> loading.Kind:
    """The kind of model in `folder`; ValueError unless the data to measure it on are of that kind."""
    kind = loading.kind(folder)
    wrong = {"speech": ("--text or --tasks", text)}.get(kind, ("--audio", audio))
    if wrong[1]:
        raise ValueError(f"{wrong[0]} does not apply: {folder} holds a {kind} model")
    if kind == "speech" and audio is None:
        raise ValueError(
            "a speech model is evaluated on recordings: give --audio a folder of clips or a jsonl with file and text"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}; it must be at least 1")
    return kind


def evaluate(
    folder: Path,
    against: Path | None,
    *,
    text: str | None = None,
    audio: str | None = None,
    length: int = 2048,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    language: str = "en",
    dtype: str = "float32",
    device: str = "cpu",
    progress: perplexity.Progress = lambda done, total: None,
) -> report.Evaluation:
    """Evaluate the model in `folder`, in the same pass `against` the one it came from; see `quantize eval --help`."""
    kind = require_data(folder, text or tasks, audio, limit)
    if against is not None and loading.kind(against) != kind:
        raise ValueError(f"{folder} holds a {kind} model, {against} a {loading.kind(against)} model: they cannot be compared")
    start = time.perf_counter()
    model = loading.load(folder, loading.DTYPES[dtype], device)
    reference = loading.load(against, loading.DTYPES[dtype], device) if against is not None else None
    text_result = masked_result = speech_result = None
    found: dict[str, dict[str, float | str]] = {}
    reference_found: dict[str, dict[str, float | str]] = {}
    if audio is not None:
        corpus, speech_result = speech_part(folder, model, reference, audio, limit, language, progress)
    elif kind == "masked":
        if tasks:
            raise ValueError(f"--tasks does not apply: {folder} holds a masked-diffusion model, not a next-token one")
        corpus, tokens, _ = read_windows(folder, model.config, text, length, limit)
        masked_result = masked.evaluate(model, tokens, loading.masking_of(folder), reference, progress=progress)
    else:
        corpus, text_result, tokenizer = text_part(folder, model, reference, text, length, limit, progress)
        if tasks:
            found = harness.evaluate(model, tokenizer, tasks, max_length=length)
            if reference is not None:
                reference_found = harness.evaluate(reference, tokenizer, tasks, max_length=length)
    return report.Evaluation(
        model=str(folder),
        against=str(against) if against is not None else None,
        corpus=corpus,
        dtype=dtype,
        device=device,
        weight_bytes=loading.weight_bytes(folder),
        reference_weight_bytes=loading.weight_bytes(against) if against is not None else None,
        peak_rss_bytes=peak_memory_bytes(),
        seconds=time.perf_counter() - start,
        versions=loading.versions(),
        text=text_result,
        masked=masked_result,
        speech=speech_result,
        tasks=found,
        reference_tasks=reference_found,
    )


@click.command("eval")
@click.argument("out")
@click.option("--against", help="The float model to compare with; default: the source recorded in OUT.")
@click.option("--text", help="Text to score: a text or jsonl file, or a data set; default: the built-in evaluation text.")
@click.option("--audio", help="Folder or jsonl of clips with transcripts, for speech models.")
@click.option("--length", type=int, default=2048, show_default=True, help="Window length in tokens.")
@click.option("--limit", type=int, help="Use so many windows or clips.")
@click.option("--tasks", default="", help="lm-eval tasks, separated by commas: names or YAML paths.")
@click.option("--language", default="en", show_default=True, help="Language code of the clips.")
@click.option("--dtype", type=click.Choice([*loading.DTYPES]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def command(
    out: str,
    against: str | None,
    text: str | None,
    audio: str | None,
    length: int,
    limit: int | None,
    tasks: str,
    language: str,
    dtype: str,
    device: str,
    json_path: Path | None,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of OUT; word error rate for speech; lm-eval tasks.

    A masked-diffusion model has a bound of its likelihood in place of perplexity, and agreement at masked positions.
    """
    loading.quiet()
    folder, other = loading.sides(out, against, click.echo)
    with Bar(console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("evaluating", total=None)
        result = evaluate(
            folder,
            other,
            text=text,
            audio=audio,
            length=length,
            limit=limit,
            tasks=[task.strip() for task in tasks.split(",") if task.strip()],
            language=language,
            dtype=dtype,
            device=device,
            progress=lambda done, total: bar.update(job, completed=done, total=total),
        )
    report.show(result)
    if json_path is not None:
        report.write_json(result, json_path)
