"""`quantize bench`: how fast and how large a model runs, beside another one, in one command.

Each side lives in a process of its own, so that its peak memory is its own. The two never run at the same time, and
measured repeats alternate between them (A B, B A, A B, ...): a machine that slows down slows both. Ratios are taken
inside each pair; medians with quartiles are printed. OpenMP keeps its default: threads spin for some milliseconds after
their work and then sleep, and a pause between turns outlasts the spinning. (OMP_WAIT_POLICY=passive would make the
pause needless, but it cost SmolLM2-135M 40 % of its decode speed, and nobody serves that way.)

Text: one prompt of `prompt` random tokens (prefill, time to first token), then `new` greedy tokens, batch 1.
Speech: clips one by one, features to last token; without clips, 30 s of noise decoded to exactly `new` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch

from quant.eval import loading
from quant.eval.speech import RATE
from quant.eval.speed_worker import Worker, Workload


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
    """One model. Peak memory covers loading and running; on CUDA `device_bytes` is the allocator's peak, elsewhere None."""

    model: str
    weight_bytes: int
    load_s: float
    bare_rss_bytes: int  # interpreter and libraries, before the model
    loaded_rss_bytes: int
    peak_rss_bytes: int
    device_bytes: int | None
    metrics: dict[str, Spread]


@dataclass(frozen=True, kw_only=True)
class SpeedResult:
    """Both sides under the same workload; `ratios` are model / against, paired by repeat."""

    workload: str
    threads: int
    dtype: str
    device: str
    repeats: int
    warmup: int
    versions: dict[str, str]
    model: Side
    against: Side | None = None
    ratios: dict[str, Spread] | None = None


def _summary(worker: Worker) -> Side:
    """Everything measured so far."""
    return Side(
        model=str(worker.folder),
        weight_bytes=loading.weight_bytes(worker.folder),
        load_s=worker.loaded["load_s"],
        bare_rss_bytes=worker.loaded["bare_rss_bytes"],
        loaded_rss_bytes=worker.loaded["loaded_rss_bytes"],
        peak_rss_bytes=worker.last["peak_rss_bytes"],
        device_bytes=worker.last["device_bytes"],
        metrics={name: Spread.of([r[name] for r in worker.repeats]) for name in worker.repeats[0]},
    )


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
) -> SpeedResult:
    """Measure `folder`, and `against` in alternation with it. ValueError for what a side refuses to run."""
    if min(threads, repeats, work.prompt, work.new) < 1 or warmup < 0:
        raise ValueError("--threads, --repeats, --prompt and --new must be at least 1, --warmup at least 0")
    workers: list[Worker] = []
    try:
        for side in [folder] if against is None else [folder, against]:
            workers.append(Worker(side, dtype, device, threads, work))
        for turn in range(warmup + repeats):
            for worker in workers if turn % 2 == 0 else reversed(workers):
                worker.repeat(keep=turn >= warmup)
        sides = [_summary(worker) for worker in workers]
        ratios = None
        if against is not None:
            mine, other = (worker.repeats for worker in workers)
            ratios = {name: Spread.of([a[name] / b[name] for a, b in zip(mine, other, strict=True)]) for name in mine[0]}
    finally:
        for worker in workers:
            worker.close()
    return SpeedResult(
        workload=describe(work, loading.kind(folder)),
        threads=threads,
        dtype=dtype,
        device=device,
        repeats=repeats,
        warmup=warmup,
        versions=loading.versions(),
        model=sides[0],
        against=sides[1] if against is not None else None,
        ratios=ratios,
    )


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
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def command(
    out: str,
    against: str | None,
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
    json_path: Path | None,
) -> None:
    """Tokens/s, time to first token, real-time factor and peak memory of OUT, beside its float source."""
    from quant.eval import report

    loading.quiet()
    folder, other = loading.sides(out, against, click.echo)
    clips: tuple[np.ndarray, ...] = ()
    if audio is not None:
        from quant.audio import clips as read

        clips = tuple(np.asarray(clip.samples, dtype=np.float32) for clip in read(audio, limit))
    work = Workload(prompt=prompt, new=new, clips=clips, language=language)
    result = compare(folder, other, work, threads=threads, dtype=dtype, device=device, repeats=repeats, warmup=warmup)
    report.show_speed(result)
    if json_path is not None:
        report.write_json(result, json_path)
