"""One side of a speed comparison: a process that holds a model and runs the workload when told to."""

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

import numpy as np
import psutil
import torch
from transformers import AutoProcessor, StoppingCriteria

from quant.eval import loading
from quant.eval.speech import RATE, Recognizer
from quant.resources import peak_memory_bytes

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
            pipe.send({"metrics": metrics, "peak_rss_bytes": peak_memory_bytes(), "device_bytes": memory})
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
        self.loaded = self._receive()
        self.last: dict[str, Any] = {}

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
        self.last = self._receive()
        if keep:
            self.repeats.append(self.last["metrics"])

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
