"""Speech recognition quality: word error rate free-running, fidelity teacher-forced, loops, and speed.

Both models transcribe each clip greedily at batch 1. The decoder is then compared token by token on the *reference
model's* greedy ids, which needs no normalizer and no transcript and resolves changes that WER cannot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from quant.eval.divergence import Divergence, Fidelity, ratio_error
from quant.eval.journal import Journal
from quant.eval.paired import bootstrap
from quant.eval.perplexity import Progress
from quant.eval.wer import Edits, edits, loops, normalizer

RATE = 16_000  # Hz, of every clip


class Clip(Protocol):
    """What is read of a clip; `quant.audio.Clip` is one."""

    @property
    def path(self) -> Path | str: ...
    @property
    def samples(self) -> Any: ...  # float32 [S] at 16 kHz, numpy or torch
    @property
    def text(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Transcription:
    """One model over all clips. Edits count normalized words of the clips that have a transcript."""

    words: int  # of the transcripts
    substitutions: int
    deletions: int
    insertions: int
    wer: float | None  # None when no clip has a transcript
    wer_error: float | None  # standard error over clips
    loops: int  # transcripts that repeat a phrase without end or run into the length limit
    seconds: float  # features, encoder and decoder, all clips
    rtf: float  # seconds / seconds of audio; below 1 is faster than real time


@dataclass(frozen=True, kw_only=True)
class Line:
    """One clip: what was said, and what each model heard (texts before normalization)."""

    file: str
    text: str | None
    transcript: str
    reference_transcript: str | None


@dataclass(frozen=True, kw_only=True)
class SpeechResult:
    """A model on a set of clips and, where a reference was given, how it differs from it."""

    clips: int
    audio_seconds: float
    normalizer: str
    model: Transcription
    lines: tuple[Line, ...]
    reference: Transcription | None = None
    wer_change: float | None = None  # model minus reference
    wer_change_error: float | None = None  # paired over clips
    wer_change_interval: list[float] | None = None  # [low, high] of 95 %, paired bootstrap over clips
    changed: int | None = None  # clips whose transcript is not the reference model's, letter by letter
    fidelity: Fidelity | None = None  # teacher-forced on the reference's greedy ids, end-of-text included


class Recognizer:
    """A speech sequence-to-sequence model with its processor: greedy ids, decoder logits, text."""

    def __init__(self, model: Module, processor: Any, language: str) -> None:
        self.model: Any = model.eval()
        self.processor = processor
        self.window: int | None = getattr(getattr(processor, "feature_extractor", None), "n_samples", None)
        weight = next(p for p in model.parameters() if p.is_floating_point())
        self.device, self.dtype = weight.device, weight.dtype
        config: Any = self.model.generation_config
        self.options = {"language": language, "task": "transcribe"} if getattr(config, "is_multilingual", False) else {}
        eos = config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])
        self.special = set(processor.tokenizer.all_special_ids)

    def is_long(self, samples: Any) -> bool:
        """True for a clip that does not fit Whisper's window of 30 s."""
        return self.window is not None and len(samples) > self.window

    def features(self, samples: Any) -> dict[str, Tensor]:
        """Inputs of the model for one clip: `input_features` [1, bins, frames], or what its processor makes."""
        whole = {"truncation": False, "padding": "longest", "return_attention_mask": True} if self.is_long(samples) else {}
        made = self.processor(np.asarray(samples, dtype=np.float32), sampling_rate=RATE, return_tensors="pt", **whole)
        return {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in made.items()
        }

    def greedy(self, features: dict[str, Tensor], **options: Any) -> Tensor:
        """Ids [T] of the greedy transcript: prompt, text, and end-of-text unless the length limit came first.

        `options` go to `generate` as well (length limits, a stop watch).
        """
        out = self.model.generate(
            **features, **self.options, **options, num_beams=1, do_sample=False, return_dict_in_generate=True
        )
        ids: Tensor = out.sequences[0]
        return ids

    def long_form(self, features: dict[str, Tensor]) -> Tensor:
        """Ids [T] of a clip longer than the window, window after window by timestamps; text and timestamps only."""
        ids: Tensor = self.model.generate(**features, **self.options, num_beams=1, do_sample=False, return_timestamps=True)[0]
        return ids

    def prompt_length(self, ids: Tensor) -> int:
        """How many leading ids were given, not predicted (start, language, task, no-timestamps)."""
        size = 0
        for token in ids.tolist():
            if token not in self.special or token in self.eos:
                break
            size += 1
        return size

    def logits(self, features: dict[str, Tensor], ids: Tensor) -> Tensor:
        """Decoder logits [T - 1, V] for ids[1:] given the audio and ids[:-1]."""
        out: Tensor = self.model(**features, decoder_input_ids=ids[None, :-1].to(self.device), use_cache=False).logits[0]
        return out

    def text(self, ids: Tensor) -> str:
        """The transcript, without special tokens."""
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def warm_up(self, clips: Sequence[Clip]) -> None:
        """Transcribe a second of sound: set-up happens in the first call, which must not count as time of the first clip."""
        self.greedy(self.features(clips[0].samples[:RATE]))

    def finished(self, ids: Tensor) -> bool:
        """False when decoding stopped at the length limit."""
        return int(ids[-1]) in self.eos


@dataclass(frozen=True)
class Heard:
    """What one model made of one clip.

    ids [T]: of its greedy transcript. given: how many of them were the prompt. finished: it ended before the length limit.
    logits [T - given, V]: of ids[given:], teacher-forced; None for a clip longer than the window.
    """

    text: str
    ids: Tensor
    given: int
    finished: bool
    seconds: float
    logits: Tensor | None = None


SAID = ("text", "given", "finished", "seconds")  # of a Heard, what a journal keeps
NO_IDS = torch.empty(0, dtype=torch.int64)


class _Tally:
    """Edits, loops and seconds of one model, clip by clip."""

    def __init__(self, normalize: Callable[[str], str]) -> None:
        self.normalize = normalize
        self.edits: list[Edits] = []
        self.loops = 0
        self.seconds = 0.0

    def add(self, text: str | None, heard: Heard) -> None:
        plain = self.normalize(heard.text).strip()
        expected = self.normalize(text).strip() if text is not None else ""
        if text is not None:
            self.edits.append(edits(expected, plain))
        self.loops += (loops(plain) and not loops(expected)) or not heard.finished
        self.seconds += heard.seconds

    def errors(self) -> np.ndarray:
        return np.array([e.errors for e in self.edits], dtype=np.float64)

    def words(self) -> np.ndarray:
        return np.array([e.words for e in self.edits], dtype=np.float64)

    def summary(self, audio_seconds: float) -> Transcription:
        words = sum(e.words for e in self.edits)
        return Transcription(
            words=words,
            substitutions=sum(e.substitutions for e in self.edits),
            deletions=sum(e.deletions for e in self.edits),
            insertions=sum(e.insertions for e in self.edits),
            wer=sum(e.errors for e in self.edits) / words if words else None,
            wer_error=ratio_error(self.errors(), self.words()),
            loops=self.loops,
            seconds=self.seconds,
            rtf=self.seconds / audio_seconds,
        )


def listen(
    reference: Module, processor: Any, clips: Sequence[Clip], language: str = "en", progress: Progress | None = None
) -> Iterator[Heard]:
    """What a reference makes of each clip. As a list it serves any number of evaluations: some 0.2 MB a token."""
    recognizer = Recognizer(reference, processor, language)
    recognizer.warm_up(clips)
    for at, clip in enumerate(clips):
        with torch.inference_mode():  # a generator's body runs outside its decorator
            features, heard = _transcribe(recognizer, clip)
            if not recognizer.is_long(clip.samples):
                heard = replace(heard, logits=recognizer.logits(features, heard.ids)[heard.given - 1 :])
        yield heard
        if progress is not None:
            progress(at + 1, len(clips))


@torch.inference_mode()
def evaluate(
    model: Module,
    reference: Module | Sequence[Heard] | None,
    processor: Any,
    clips: Sequence[Clip],
    *,
    language: str = "en",
    folder: Path | None = None,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> SpeechResult:
    """Transcribe `clips` with `model` and, if given, `reference`; both use `processor` and the language code `language`.

    `folder` is where a `normalizer.json` may lie. A clip longer than Whisper's window is transcribed by its sequential
    long-form procedure; such clips count for word errors but not for the teacher-forced comparison. Clips that `journal`
    holds are not run again. Raises ValueError for no clips.
    """
    if not clips:
        raise ValueError("no clips to evaluate: give --audio a folder or jsonl that lists at least one")
    normalize, normalizer_name = normalizer(processor, language, folder)
    ours = Recognizer(model, processor, language)
    ours.warm_up(clips)
    journal = journal or Journal()
    left = [clip for at, clip in enumerate(clips) if f"clip {at}" not in journal]
    theirs: Iterator[Heard | None] = repeat(None)
    if reference is not None:
        theirs = listen(reference, processor, left, language) if isinstance(reference, Module) else iter(reference)
    tally, ref_tally = _Tally(normalize), _Tally(normalize)
    divergence = Divergence()
    lines: list[Line] = []

    for at, clip in enumerate(clips):
        one = journal.once(f"clip {at}", partial(score, ours, clip, theirs, at))
        here, there = (None if said is None else Heard(**said, ids=NO_IDS) for said in (one["here"], one["there"]))
        assert here is not None
        tally.add(clip.text, here)
        if there is not None:
            ref_tally.add(clip.text, there)
        divergence.extend(one["tokens"])
        heard = None if there is None else there.text
        lines.append(Line(file=str(clip.path), text=clip.text, transcript=here.text, reference_transcript=heard))
        if progress is not None:
            progress(at + 1, len(clips))

    audio_seconds = sum(len(clip.samples) for clip in clips) / RATE
    summary = tally.summary(audio_seconds)
    result = SpeechResult(
        clips=len(clips), audio_seconds=audio_seconds, normalizer=normalizer_name, model=summary, lines=tuple(lines)
    )
    if reference is None:
        return result
    ref_summary = ref_tally.summary(audio_seconds)
    return replace(
        result,
        reference=ref_summary,
        wer_change=None if summary.wer is None or ref_summary.wer is None else summary.wer - ref_summary.wer,
        wer_change_error=ratio_error(tally.errors() - ref_tally.errors(), tally.words()),
        wer_change_interval=bootstrap(tally.errors() - ref_tally.errors(), tally.words()),
        changed=changed(lines),
        fidelity=None if all(ours.is_long(clip.samples) for clip in clips) else divergence.fidelity(),
    )


def score(ours: Recognizer, clip: Clip, theirs: Iterator[Heard | None], at: int) -> dict[str, Any]:
    """What the model makes of clip number `at`, what the next of the reference is, and what `Divergence` has of each token."""
    divergence = Divergence()
    there = next(theirs)
    features, here = _transcribe(ours, clip)
    if there is not None and there.logits is not None:
        wanted = there.ids[there.given :].to(ours.device)
        if len(wanted):
            logits = ours.logits(features, there.ids)[there.given - 1 :]
            divergence.add(there.logits.to(ours.device), logits, wanted, group=at)
    said = (None if one is None else {name: getattr(one, name) for name in SAID} for one in (here, there))
    return {"here": next(said), "there": next(said), "tokens": divergence.columns()}


def changed(lines: Sequence[Line]) -> int:
    """Clips on which the two models wrote different text."""
    return sum(line.transcript != line.reference_transcript for line in lines)


def _transcribe(recognizer: Recognizer, clip: Clip) -> tuple[dict[str, Tensor], Heard]:
    """Features of one clip and its greedy transcript, without logits."""
    start = time.perf_counter()
    features = recognizer.features(clip.samples)
    long = recognizer.is_long(clip.samples)
    ids = (recognizer.long_form(features) if long else recognizer.greedy(features)).cpu()
    seconds = time.perf_counter() - start
    given = max(recognizer.prompt_length(ids), 1)
    return features, Heard(recognizer.text(ids), ids, given, long or recognizer.finished(ids), seconds)
