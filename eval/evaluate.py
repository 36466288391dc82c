"""`quantize eval`: what a quantized model lost, measured against the model it came from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor

from quant.eval import drawing, harness, loading, masked, page, perplexity, report, speech, speed
from quant.eval.journal import Journal
from quant.eval.samples import Sample, write
from quant.eval.speed_worker import Workload
from quant.resources import peak_memory_bytes
from quant.wheels import cache_folder


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
    folder: Path,
    model: Any,
    reference: Any,
    source: str,
    limit: int | None,
    language: str,
    bar: perplexity.Progress,
    journal: Journal,
) -> tuple[str, speech.SpeechResult]:
    """Name of the clips and result of a speech recognizer."""
    from transformers import AutoProcessor

    from quant.audio import clips

    processor = AutoProcessor.from_pretrained(folder)
    found = clips(source, limit, seconds=None)  # whole: a cut clip would lose its transcript
    return source, speech.evaluate(
        model, reference, processor, found, language=language, folder=folder, progress=bar, journal=journal
    )


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
    tasks: str = "",
    samples: int = 0,
    language: str = "en",
    dtype: str = "float32",
    device: str = "cpu",
    progress: perplexity.Progress = lambda done, total: None,
    journal: Journal | None = None,
) -> report.Evaluation:
    """Evaluate the model in `folder`, in the same pass `against` the one it came from; see `quantize eval --help`."""
    kind = require_data(folder, text or tasks, audio, limit)
    if against is not None and loading.kind(against) != kind:
        raise ValueError(f"{folder} holds a {kind} model, {against} a {loading.kind(against)} model: they cannot be compared")
    if kind == "masked" and tasks:
        raise ValueError(f"--tasks does not apply: {folder} holds a masked-diffusion model, not a next-token one")
    if samples and (kind != "text" or against is None):
        reason = "there is no model to compare with; give --against" if kind == "text" else f"{folder} holds a {kind} model"
        raise ValueError(f"--samples does not apply: {reason}")
    names, efficiency = harness.split_tasks(tasks)
    chosen = harness.Harness(names) if names else None
    start = time.perf_counter()
    journal = journal or Journal()
    ran = None
    if efficiency:  # in processes of its own, before this one holds models
        work = Workload(prompt=min(Workload.prompt, length))
        ran = speed.compare(folder, against, work, threads=torch.get_num_threads(), dtype=dtype, device=device)
    model = loading.load(folder, loading.DTYPES[dtype], device)
    reference = loading.load(against, loading.DTYPES[dtype], device) if against is not None else None
    text_result = masked_result = speech_result = None
    written: list[Sample] = []
    found: list[tuple[harness.Results, harness.Items]] = []
    if audio is not None:
        corpus, speech_result = speech_part(folder, model, reference, audio, limit, language, progress, journal)
    else:
        corpus, windows, tokenizer = read_windows(folder, model.config, text, length, limit)
        if samples > len(windows):
            raise ValueError(f"--samples {samples}, but the text has {len(windows)} windows; give fewer, or a greater --limit")
        if kind == "masked":
            masked_result = masked.evaluate(
                model, windows, loading.masking_of(folder), reference, progress=progress, journal=journal
            )
        else:
            text_result = perplexity.evaluate(model, windows, reference, progress=progress, journal=journal)
        written = write(model, reference, tokenizer, windows[:samples], journal)
        if chosen is not None:
            sides = {"model": model} | ({} if reference is None else {"reference": reference})
            for side, live in sides.items():
                found.append(chosen.run(live, tokenizer, side, journal, max_length=length, items=reference is not None))
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
        resumed=journal.resumed,
        versions=loading.versions() | ({"lm-eval": version("lm_eval")} if found else {}),
        text=text_result,
        masked=masked_result,
        speech=speech_result,
        samples=written,
        tasks=found[0][0] if found else {},
        reference_tasks=found[1][0] if len(found) == 2 else {},
        task_tests=harness.compare(found[0][1], found[1][1]) if len(found) == 2 else {},
        efficiency=ran,
    )


def identity(folder: Path, against: Path | None, data: Sequence[str | None], options: Sequence[Any]) -> str:
    """A digest of all that decides what an evaluation's units are: options, and the files of models, data and tasks."""
    places = [folder, against, *(Path(name) for name in data if name)]
    files = [sorted(place.iterdir()) if place.is_dir() else [place] for place in places if place is not None and place.exists()]
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for group in files for file in group]
    return report.identity_of([list(data), list(options), stats, loading.versions()])


@click.command("eval")
@click.argument("out")
@click.option("--against", help="The float model to compare with; default: the source recorded in OUT.")
@click.option("--text", help="Text to score: a text or jsonl file, or a data set; default: the built-in evaluation text.")
@click.option("--audio", help="Folder or jsonl of clips with transcripts, for speech models.")
@click.option("--length", type=int, default=2048, show_default=True, help="Window length in tokens.")
@click.option("--limit", type=int, help="Use so many windows or clips.")
@click.option(
    "--tasks",
    default="",
    metavar="A,B,...",
    help=f"lm-eval tasks: names, YAML files, folders of them, or groups: {', '.join(harness.DIMENSIONS)}.",
)
@click.option("--samples", type=click.IntRange(min=0), default=0, help="Greedy continuations of so many windows' openings.")
@click.option("--language", default="en", show_default=True, help="Language code of the clips.")
@click.option("--dtype", type=click.Choice([*loading.DTYPES]), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page with tables and figure; needs matplotlib.")
@click.option("--fresh", is_flag=True, help="Measure everything again, also what a killed run had finished.")
def command(
    out: str,
    against: str | None,
    text: str | None,
    audio: str | None,
    length: int,
    limit: int | None,
    tasks: str,
    samples: int,
    language: str,
    dtype: str,
    device: str,
    json_path: Path | None,
    html: Path | None,
    fresh: bool,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of OUT; word error rate for speech; lm-eval tasks.

    A masked-diffusion model has a bound of its likelihood in place of perplexity, and agreement at masked positions. A run
    that is killed goes on when the same command is given again.
    """
    loading.quiet()
    if html is not None:
        drawing.require_matplotlib("--html")
    report.require_writable(json_path, html)
    folder, other = loading.sides(out, against, click.echo)
    options = [length, limit, tasks, samples, language, dtype, device]
    cache = cache_folder() / "eval"
    cache.mkdir(parents=True, exist_ok=True)
    journal = Journal(cache / f"{identity(folder, other, [text, audio, *tasks.split(',')], options)}.jsonl", fresh)
    if journal.resumed:
        click.echo(f"{journal.resumed} parts were measured by a run that was stopped; --fresh measures them again", err=True)
    with Bar(console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("evaluating", total=None)
        result = evaluate(
            folder,
            other,
            text=text,
            audio=audio,
            length=length,
            limit=limit,
            tasks=tasks,
            samples=samples,
            language=language,
            dtype=dtype,
            device=device,
            progress=lambda done, total: bar.update(job, completed=done, total=total),
            journal=journal,
        )
    report.show(result)
    if json_path is not None:
        report.write_json(result, json_path)
    if html is not None:
        page.write(result, html)
    journal.finish()
