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

import inspect
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from transformers import AutoProcessor, StoppingCriteria

from quant.eval import loading
from quant.eval.speech import RATE, Recognizer

PAUSE_S = 0.05  # between turns, for the other side's OpenMP threads to fall asleep

Measure = Callable[[], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one measured repeat does. `clips` (float32 at 16 kHz) are for speech models only; empty means noise."""

    prompt: int = 512
    new: int = 64
    clips: tuple[np.ndarray, ...] = ()
    language: str = "en"
    seed: int = 0


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


@torch.inference_mode()
def text_repeat(model: Any, ids: torch.Tensor, new: int) -> dict[str, float]:
    """Prefill `ids` [1, prompt] and decode `new` greedy tokens with the model's own cache; tokens/s and ms."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _now(ids.device)
    out = model(input_ids=ids, use_cache=True, **last)
    token = out.logits[:, -1:].argmax(-1)  # [1, 1]
    first = _now(ids.device)
    for _ in range(new):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    end = _now(ids.device)
    return {
        "prefill_tokens_per_s": ids.shape[1] / (first - start),
        "first_token_ms": (first - start) * 1e3,
        "decode_tokens_per_s": new / (end - first),
    }


class FirstToken(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Never stops `generate`; notes when the first new token was there, so one run gives both prefill and decode."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.at is None:
            self.at = _now(input_ids.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def speech_repeat(recognizer: Recognizer, clips: tuple[np.ndarray, ...], exactly: int | None) -> dict[str, float]:
    """Transcribe every clip once, `exactly` so many tokens each if given; real-time factor, ms to the first token, tokens/s."""
    limits = {"min_new_tokens": exactly, "max_new_tokens": exactly} if exactly else {}
    first_s = decode_s = 0.0
    decoded = 0  # tokens after the first
    for samples in clips:
        watch = FirstToken()
        start = _now(recognizer.device)
        ids = recognizer.greedy(recognizer.features(samples), stopping_criteria=[watch], **limits)
        end = _now(recognizer.device)
        assert watch.at is not None, "generate made no token"
        first_s, decode_s = first_s + watch.at - start, decode_s + end - watch.at
        decoded += len(ids) - recognizer.prompt_length(ids) - 1
    return {
        "rtf": (first_s + decode_s) * RATE / sum(len(samples) for samples in clips),
        "first_token_ms": first_s / len(clips) * 1e3,
        "decode_tokens_per_s": decoded / decode_s,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _measure(folder: Path, dtype: str, device: str, work: Workload) -> Measure:
    """Load the model and bind it to the workload."""
    model = loading.load(folder, loading.DTYPES[dtype], device)
    if loading.kind(folder) == "speech":
        recognizer = Recognizer(model, AutoProcessor.from_pretrained(folder), work.language)
        if work.clips:
            return lambda: speech_repeat(recognizer, work.clips, None)
        noise = np.random.default_rng(work.seed).normal(0, 0.1, 30 * RATE).astype(np.float32)
        return lambda: speech_repeat(recognizer, (noise,), work.new)
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and work.prompt + work.new > room:
        raise ValueError(f"--prompt {work.prompt} and --new {work.new} exceed the model's {room} positions: lower one of them")
    generator = torch.Generator().manual_seed(work.seed)
    ids = torch.randint(0, model.config.vocab_size, (1, work.prompt), generator=generator).to(device)
    return lambda: text_repeat(model, ids, work.new)


def _serve(pipe: Connection, folder: Path, dtype: str, device: str, threads: int, work: Workload) -> None:
    """A worker's life: load, report, then one repeat per message until the pipe closes."""
    torch.set_num_threads(threads)
    loading.quiet()
    bare = psutil.Process().memory_info().rss
    try:
        start = time.perf_counter()
        measure = _measure(folder, dtype, device, work)
        load_s = time.perf_counter() - start
        pipe.send({"load_s": load_s, "bare_rss_bytes": bare, "loaded_rss_bytes": psutil.Process().memory_info().rss})
        while pipe.recv() == "run":
            metrics = measure()
            memory = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
            pipe.send({"metrics": metrics, "peak_rss_bytes": loading.peak_rss_bytes(), "device_bytes": memory})
    except EOFError:
        return
    except ValueError as error:
        pipe.send({"refused": str(error)})


class Worker:
    """A model in its own process; `repeat()` runs the workload once there."""

    def __init__(self, folder: Path, dtype: str, device: str, threads: int, work: Workload) -> None:
        self.folder = folder
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, folder, dtype, device, threads, work), daemon=True)
        settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}
        with _environment(settings):  # read once, when OpenMP is loaded
            self._process.start()
        theirs.close()
        self.repeats: list[dict[str, float]] = []
        self._loaded = self._receive()
        self._last: dict[str, Any] = {}

    def _receive(self) -> dict[str, Any]:
        try:
            message: dict[str, Any] = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process that measures {self.folder} ended with code {self._process.exitcode}") from None
        if "refused" in message:
            raise ValueError(message["refused"])
        return message

    def repeat(self, *, keep: bool) -> None:
        """One repeat; recorded unless it is a warm-up."""
        time.sleep(PAUSE_S)
        self._pipe.send("run")
        self._last = self._receive()
        if keep:
            self.repeats.append(self._last["metrics"])

    def summary(self) -> Side:
        """Everything measured so far."""
        return Side(
            model=str(self.folder),
            weight_bytes=loading.weight_bytes(self.folder),
            load_s=self._loaded["load_s"],
            bare_rss_bytes=self._loaded["bare_rss_bytes"],
            loaded_rss_bytes=self._loaded["loaded_rss_bytes"],
            peak_rss_bytes=self._last["peak_rss_bytes"],
            device_bytes=self._last["device_bytes"],
            metrics={name: Spread.of([r[name] for r in self.repeats]) for name in self.repeats[0]},
        )

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()


@contextmanager
def _environment(settings: dict[str, str | None]) -> Iterator[None]:
    """Environment variables for children started inside; None removes one."""
    before = {name: os.environ.get(name) for name in settings}
    try:
        _set(settings)
        yield
    finally:
        _set(before)


def _set(settings: dict[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def compare(
    folder: Path,
    against: Path | None,
    work: Workload,
    *,
    threads: int,
    dtype: str = "bfloat16",
    device: str = "cpu",
    repeats: int = 7,
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
        sides = [worker.summary() for worker in workers]
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
@click.option("--repeats", type=int, default=7, show_default=True)
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
