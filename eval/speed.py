"""`quantize bench`: how fast and how large a model runs, beside another one, in one command.

Each side lives in a process of its own, so that its peak memory is its own. No two run at the same time, and
measured repeats alternate between them (A B, B A, A B, ...): a machine that slows down slows all. Ratios are taken
inside each turn; medians with quartiles are printed. OpenMP keeps its default: threads spin for some milliseconds after
their work and then sleep, and a pause between turns outlasts the spinning. (OMP_WAIT_POLICY=passive would make the
pause needless, but it cost SmolLM2-135M 40 % of its decode speed, and nobody serves that way.)

Text: one prompt of `prompt` random tokens (prefill, time to first token), then `new` greedy tokens, batch 1.
`--rivals` adds other programs (eval/rivals), which run the float source quantized their own way, in the same turns.
Speech: clips one by one, features to last token; without clips, 30 s of noise decoded to exactly `new` tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import numpy as np
import torch

from quant.eval import contender, loading
from quant.eval.contender import Contender
from quant.eval.rivals.base import FILES, Choice, choices
from quant.eval.speech import RATE
from quant.eval.speed_worker import Worker, Workload
from quant.eval.wer import edits, normalizer


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles over repeats."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
        return cls(median=float(median), q1=float(q1), q3=float(q3))


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model. Peak memory covers loading and running; on CUDA `device_bytes` is the allocator's peak, elsewhere None.

    `ratios` are the first side's numbers / this one's, paired by turn, of what both measure; None for the first side.
    """

    name: str  # "model", "against", or a rival's
    model: str
    numbers: str  # the number types it computes with
    weight_bytes: int
    load_s: float
    cold_s: float | None  # from the call that loads to the first token of the first turn, libraries imported before
    bare_rss_bytes: int  # interpreter and libraries, before the model
    loaded_rss_bytes: int
    peak_rss_bytes: int
    device_bytes: int | None
    metrics: dict[str, Spread]
    wer: float | None = None  # of the last turn's transcripts, where the clips have some
    ratios: dict[str, Spread] | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """All sides under the same workload: `model`, then `others`: the float source if there is one, then the rivals."""

    workload: str
    threads: int
    dtype: str
    device: str
    repeats: int
    warmup: int
    versions: dict[str, str]
    model: Side
    others: tuple[Side, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)  # rival -> in one line, why it has no numbers


def compare(
    folder: Path,
    against: Path | None,
    work: Workload,
    *,
    threads: int,
    dtype: str = "bfloat16",
    device: str = "cpu",
    repeats: int = 8,
    warmup: int = 2,
    eager: bool = False,
    rivals: Sequence[Choice] = (),
    say: Callable[[str], None] = lambda line: None,
) -> SpeedResult:
    """Measure `folder`, in alternation with the float model `against` and the `rivals` made from that float model.

    ValueError for what a side refuses to run; a rival that is missing or fails is named in `absent` and the rest goes on.
    `say` gets one line per step.
    """
    if min(threads, repeats, work.prompt, work.new) < 1 or warmup < 0:
        raise ValueError("--threads, --repeats, --prompt and --new must be at least 1, --warmup at least 0")
    loading.require_next_token(folder)
    sides = [contender.ours("model", folder, dtype, device, eager)]
    if against is not None:
        sides.append(contender.ours("against", against, dtype, device, eager))
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="lowbit-rivals-") as scratch:
        if rivals:
            if against is None or loading.is_ours(against):
                raise ValueError(f"rivals are made from a float model, which {against} is not; name it with --against")
            made, absent = contender.rivals(rivals, against, Path(scratch), threads, say)
            sides += made
        workers, failed = take_turns(sides, work, threads, device, warmup, repeats)
    ran = [summary(side, workers[side.name], workers["model"], work, folder) for side in sides if side.name in workers]
    return SpeedResult(
        workload=describe(work, loading.kind(folder)),
        threads=threads,
        dtype=dtype,
        device=device,
        repeats=repeats,
        warmup=warmup,
        versions=loading.versions(),
        model=ran[0],
        others=tuple(ran[1:]),
        absent=absent | failed,
    )


def take_turns(
    sides: Sequence[Contender], work: Workload, threads: int, device: str, warmup: int, repeats: int
) -> tuple[dict[str, Worker], dict[str, str]]:
    """The workers of the sides that ran to the end, closed; rival -> in one line, why it did not."""
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    excused = {side.name for side in sides if side.rival}
    try:
        for side in sides:
            try:
                workers[side.name] = Worker(side.name, side.load, device, threads, work)
            except (ValueError, RuntimeError) as error:
                if side.name not in excused:
                    raise
                failed[side.name] = str(error)
        for turn in range(warmup + repeats):
            for name in list(workers)[:: 1 if turn % 2 == 0 else -1]:
                try:
                    workers[name].repeat(keep=turn >= warmup)
                except (ValueError, RuntimeError) as error:
                    if name not in excused:
                        raise
                    failed[name] = str(error)
                    workers.pop(name).close()
    finally:
        for worker in workers.values():
            worker.close()
    return workers, failed


def summary(side: Contender, worker: Worker, first: Worker, work: Workload, folder: Path) -> Side:
    """Everything measured of one side, with ratios to the `first` of what both measure."""
    names = worker.repeats[0]
    waited = worker.coldest.get("first_token_ms")
    pairs = list(zip(first.repeats, worker.repeats, strict=True))
    ratios = {name: Spread.of([mine[name] / its[name] for mine, its in pairs]) for name in names if name in first.repeats[0]}
    return Side(
        name=side.name,
        model=side.model,
        numbers=side.numbers,
        weight_bytes=side.weight_bytes,
        load_s=worker.loaded["load_s"],
        cold_s=None if waited is None else worker.loaded["load_s"] + waited / 1e3,
        bare_rss_bytes=worker.loaded["bare_rss_bytes"],
        loaded_rss_bytes=worker.loaded["loaded_rss_bytes"],
        peak_rss_bytes=worker.last["peak_rss_bytes"],
        device_bytes=worker.last["device_bytes"],
        metrics={name: Spread.of([repeat[name] for repeat in worker.repeats]) for name in names},
        wer=word_error_rate(work, worker.last["repeat"].texts, folder),
        ratios=None if worker is first else ratios,
    )


def word_error_rate(work: Workload, heard: Sequence[str], folder: Path) -> float | None:
    """Of the clips that have a transcript, after Whisper's normalization; None without such clips."""
    if not any(work.transcripts):
        return None
    from transformers import AutoProcessor

    normalize, _ = normalizer(AutoProcessor.from_pretrained(folder), work.language, folder)
    pairs = [(text, said) for text, said in zip(work.transcripts, heard, strict=True) if text is not None]
    counts = [edits(normalize(text).strip(), normalize(said).strip()) for text, said in pairs]
    return sum(count.errors for count in counts) / sum(count.words for count in counts)


def describe(work: Workload, kind: loading.Kind) -> str:
    """The workload in words, for the report."""
    if kind == "text":
        return f"batch 1, prompt of {work.prompt} random tokens, {work.new} greedy tokens"
    if work.clips:
        return f"{len(work.clips)} clips, {sum(map(len, work.clips)) / RATE:.1f} s, greedy, one by one"
    return f"30 s of noise, exactly {work.new} greedy tokens"


@click.command("bench")
@click.argument("out")
@click.option("--against", help="The model to compare with; default: the float source recorded in OUT.")
@click.option("--rivals", default="", metavar="NAME[:VARIANT],...", help=f"Measure in the same turns: {', '.join(FILES)}.")
@click.option("--threads", type=int, default=torch.get_num_threads, show_default="physical cores")
@click.option("--prompt", type=int, default=512, show_default=True, help="Prompt length in tokens.")
@click.option("--new", type=int, default=64, show_default=True, help="Tokens to decode.")
@click.option("--audio", help="Folder or jsonl of clips for a speech model; default: noise.")
@click.option("--limit", type=int, default=8, show_default=True, help="Clips to use.")
@click.option("--language", default="en", show_default=True, help="Language code of the clips.")
@click.option("--repeats", type=int, default=8, show_default=True, help="Even numbers balance which side goes first.")
@click.option("--warmup", type=int, default=2, show_default=True)
@click.option("--dtype", type=click.Choice([*loading.DTYPES]), default="bfloat16", show_default=True)
@click.option("--device", default=lambda: "cuda" if torch.cuda.is_available() else "cpu", show_default="cuda if present")
@click.option("--eager", is_flag=True, help="Run OUT layer by layer from Python, not as compiled graphs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def command(
    out: str,
    against: str | None,
    rivals: str,
    threads: int,
    prompt: int,
    new: int,
    audio: str | None,
    limit: int,
    language: str,
    repeats: int,
    warmup: int,
    dtype: str,
    device: str,
    eager: bool,
    json_path: Path | None,
) -> None:
    """Tokens/s, time to first token, real-time factor and peak memory of OUT, beside its float source and rivals."""
    from quant.eval import report

    chosen = choices(rivals)
    loading.quiet()
    folder, other = loading.sides(out, against, click.echo)
    work = Workload(prompt=prompt, new=new, language=language)
    if audio is not None:
        from quant.audio import clips as read

        found = read(audio, limit)
        work = replace(work, clips=tuple(clip.samples for clip in found), transcripts=tuple(clip.text for clip in found))
    result = compare(
        folder,
        other,
        work,
        threads=threads,
        dtype=dtype,
        device=device,
        repeats=repeats,
        warmup=warmup,
        eager=eager,
        rivals=chosen,
        say=lambda line: click.echo(line, err=True),
    )
    report.show_speed(result)
    if json_path is not None:
        report.write_json(result, json_path)
