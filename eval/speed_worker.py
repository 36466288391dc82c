"""One side of a speed comparison: a process that holds a model and runs the workload when told to."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoProcessor, StoppingCriteria

from quant.eval import loading
from quant.eval.speech import RATE, Recognizer
from quant.resources import peak_memory_bytes

PAUSE_S = 0.25  # between turns, for the other side's threads to fall asleep: GNU's spin some ms, Intel's OpenMP 200 ms


@dataclass(frozen=True, kw_only=True)
class Repeat:
    """What one pass over the workload gave: numbers by name, and what was said (ids of text, transcripts of speech)."""

    metrics: dict[str, float]
    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


Measure = Callable[[], Repeat]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one measured repeat does. `clips` (float32 at 16 kHz) are for speech models only; empty means noise."""

    prompt: int = 512
    new: int = 64
    clips: tuple[np.ndarray, ...] = ()
    transcripts: tuple[str | None, ...] = ()  # of the clips
    language: str = "en"
    seed: int = 0


Loader = Callable[[Workload], Measure]  # run in the process of the side; pickled, so a partial of a module's function


@torch.inference_mode()
def compiled_repeat(runtime: Any, ids: torch.Tensor, new: int) -> Repeat:
    """`text_repeat` with the compiled graphs of a quant.runtime.Session."""
    start = time.perf_counter()
    said = [runtime.prefill(ids, room=new).float().argmax(-1)]  # [1]; in bfloat16 argmax is several times slower
    first = time.perf_counter()
    for _ in range(new):
        said.append(runtime.step(said[-1]).float().argmax(-1))
    end = time.perf_counter()
    metrics = text_metrics(ids.shape[1], new, first - start, end - first)
    return Repeat(metrics=metrics, ids=tuple(torch.cat(said).tolist()))


@torch.inference_mode()
def text_repeat(model: Any, ids: torch.Tensor, new: int) -> Repeat:
    """Prefill `ids` [1, prompt] and decode `new` greedy tokens with the model's own cache; tokens/s and ms."""
    if (runtime := getattr(model, "runtime", None)) is not None:
        return compiled_repeat(runtime, ids, new)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _now(ids.device)
    out = model(input_ids=ids, use_cache=True, **last)
    token = out.logits[:, -1:].argmax(-1)  # [1, 1]
    first, said = _now(ids.device), [token]
    for _ in range(new):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        said.append(token)
    end = _now(ids.device)
    metrics = text_metrics(ids.shape[1], new, first - start, end - first)
    return Repeat(metrics=metrics, ids=tuple(torch.cat(said, 1)[0].tolist()))


def text_metrics(prompt: int, new: int, prefill_s: float, decode_s: float) -> dict[str, float]:
    """What is reported of `prompt` tokens read and one predicted in `prefill_s`, then `new` tokens in `decode_s`."""
    return {
        "prefill_tokens_per_s": prompt / prefill_s,
        "first_token_ms": prefill_s * 1e3,
        "decode_tokens_per_s": new / decode_s,
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
def speech_repeat(recognizer: Recognizer, clips: tuple[np.ndarray, ...], exactly: int | None) -> Repeat:
    """Transcribe every clip once, `exactly` so many tokens each if given; real-time factor, ms to the first token, tokens/s."""
    limits = {"min_new_tokens": exactly, "max_new_tokens": exactly} if exactly else {}
    first_s = decode_s = 0.0
    decoded = 0  # tokens after the first
    texts = []
    for samples in clips:
        watch = FirstToken()
        start = _now(recognizer.device)
        ids = recognizer.greedy(recognizer.features(samples), stopping_criteria=[watch], **limits)
        end = _now(recognizer.device)
        assert watch.at is not None, "generate made no token"
        first_s, decode_s = first_s + watch.at - start, decode_s + end - watch.at
        decoded += len(ids) - recognizer.prompt_length(ids) - 1
        texts.append(recognizer.text(ids))
    metrics = {
        "rtf": (first_s + decode_s) * RATE / sum(len(samples) for samples in clips),
        "first_token_ms": first_s / len(clips) * 1e3,
        "decode_tokens_per_s": decoded / decode_s,
    }
    return Repeat(metrics=metrics, texts=tuple(texts))


def prompt_ids(vocabulary: int, work: Workload) -> torch.Tensor:
    """The prompt [1, work.prompt] every side reads: random ids below `vocabulary`."""
    return torch.randint(0, vocabulary, (1, work.prompt), generator=torch.Generator().manual_seed(work.seed))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def open_model(folder: Path, dtype: str, device: str, work: Workload, compile: bool = False) -> Measure:  # noqa: A002
    """Load the transformers or packed model of `folder`, compiled if asked, and bind it to the workload."""
    model = loading.load(folder, loading.DTYPES[dtype], device, compile)
    if loading.kind(folder) == "speech":
        recognizer = Recognizer(model, AutoProcessor.from_pretrained(folder), work.language)
        if work.clips:
            return lambda: speech_repeat(recognizer, work.clips, None)
        noise = np.random.default_rng(work.seed).normal(0, 0.1, 30 * RATE).astype(np.float32)
        return lambda: speech_repeat(recognizer, (noise,), work.new)
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and work.prompt + work.new > room:
        raise ValueError(f"--prompt {work.prompt} and --new {work.new} exceed the model's {room} positions: lower one of them")
    ids = prompt_ids(model.config.vocab_size, work).to(device)
    return lambda: text_repeat(model, ids, work.new)


def _serve(pipe: Connection, load: Loader, device: str, threads: int) -> None:
    """A worker's life: get the workload, load, report, then one repeat per message until the pipe closes."""
    torch.set_num_threads(threads)
    loading.quiet()
    bare = psutil.Process().memory_info().rss
    try:
        work = pipe.recv()
        start = time.perf_counter()
        measure = load(work)
        load_s = time.perf_counter() - start
        pipe.send({"load_s": load_s, "bare_rss_bytes": bare, "loaded_rss_bytes": psutil.Process().memory_info().rss})
        while pipe.recv() == "run":
            done = measure()
            memory = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
            pipe.send({"repeat": done, "peak_rss_bytes": peak_memory_bytes(), "device_bytes": memory})
    except EOFError:
        return
    except ValueError as error:
        pipe.send({"refused": str(error)})


class Worker:
    """A model in its own process, where `load` opens it; `repeat()` runs the workload once there."""

    def __init__(self, name: str, load: Loader, device: str, threads: int, work: Workload) -> None:
        self.name = name
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, load, device, threads), daemon=True)
        settings = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}
        with _environment(settings):  # read once, when OpenMP is loaded
            self._process.start()
        theirs.close()
        # not among the arguments: megabytes of clips would block for ever on a process that dies before it reads them
        with suppress(OSError):
            self._pipe.send(work)
        self.repeats: list[dict[str, float]] = []
        self.coldest: dict[str, float] = {}  # what the first turn measured, a warm-up or not
        self.loaded = self._receive()
        self.last: dict[str, Any] = {}

    def _receive(self) -> dict[str, Any]:
        try:
            message: dict[str, Any] = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process that measures {self.name} ended with code {self._process.exitcode}") from None
        if "refused" in message:
            raise ValueError(message["refused"])
        return message

    def repeat(self, *, keep: bool) -> None:
        """One repeat; recorded unless it is a warm-up."""
        time.sleep(PAUSE_S)
        self._pipe.send("run")
        self.last = self._receive()
        self.coldest = self.coldest or self.last["repeat"].metrics
        if keep:
            self.repeats.append(self.last["repeat"].metrics)

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
