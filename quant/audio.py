"""Speech clips to calibrate on and to measure on, their features, and the token ids a decoder is taught with.

There is no built-in audio: an audio model needs a folder of clips or a manifest from the user.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.text import read_rows, read_text

SAMPLE_RATE = 16_000
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
ENCODER_STRIDE = 2  # mel frames per encoder frame: the second convolution of a Whisper-like encoder


@dataclass(frozen=True)
class Clip:
    """One utterance: float32 [samples] mono at 16 kHz in -1..1, and its transcript if known."""

    path: Path
    samples: NDArray[np.float32]
    text: str | None

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.samples) / SAMPLE_RATE


@dataclass(frozen=True)
class Features:
    """input_features float32 [1, mels, mel frames], padded; the first `frames` encoder frames are speech, the rest padding."""

    input_features: Tensor
    frames: int


def clips(source: str | Path | None, limit: int | None = None, seconds: float | None = 30.0) -> list[Clip]:
    """Clips of a folder (.wav, .flac, .ogg, .mp3 at any depth) or of a .jsonl manifest with fields file and, optionally, text.

    In a folder, transcripts come from `<clip>.txt` or any .jsonl manifest beside the clips. `limit` takes that many, evenly
    spaced over the sorted names, so that a folder sorted by speaker still gives many speakers. A clip longer than `seconds`
    is cut there and loses its transcript, which no longer fits; None keeps it whole.
    Raises ValueError (one line) without a source, without clips, and naming the first clip that is unreadable or empty.
    """
    if source is None:
        raise ValueError(
            "an audio model needs speech to calibrate on and none is built in; give --calib FOLDER with .wav or .flac"
        )
    path = Path(source)
    if path.is_dir():
        texts: dict[Path, str | None] = dict.fromkeys(
            sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        )
        for manifest in sorted(path.rglob("*.jsonl")):
            texts |= {file: text for file, text in _manifest(manifest).items() if file in texts}
    elif path.suffix == ".jsonl":
        texts = _manifest(path)
    else:
        raise ValueError(f"{source} is neither a folder nor a .jsonl manifest; give a folder of {', '.join(SUFFIXES)} files")
    if not texts:
        raise ValueError(f"{source} holds no audio; give a folder of {', '.join(SUFFIXES)} files or a .jsonl with field file")
    files = list(texts)
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    return [read_clip(file, texts[file], seconds) for file in files]


def _manifest(path: Path) -> dict[Path, str | None]:
    """Audio file -> transcript or None; file names are relative to the manifest."""
    texts: dict[Path, str | None] = {}
    for number, row in read_rows(path):
        file, text = row.get("file"), row.get("text")
        if not isinstance(file, str) or not isinstance(text, str | None):
            raise ValueError(f"{path} line {number} has {', '.join(row)}; a string file and an optional string text are needed")
        texts[path.parent / file] = text
    return texts


def read_clip(path: Path, text: str | None = None, seconds: float | None = 30.0) -> Clip:
    """One file as a Clip; raises ValueError naming it when it is unreadable or empty."""
    beside = path.with_suffix(".txt")
    if text is None and beside.is_file():
        text = read_text(beside)
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"{path} cannot be read as audio ({error}); convert it to 16 kHz .wav or remove it") from error
    if not len(samples):
        raise ValueError(f"{path} is empty (0 samples); remove it")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds samples that are NaN or infinite; convert it again or remove it")
    mono = samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    if seconds is not None and len(mono) > seconds * SAMPLE_RATE:
        mono, text = mono[: int(seconds * SAMPLE_RATE)], None
    return Clip(path, np.ascontiguousarray(mono, dtype=np.float32), text.strip() if text and text.strip() else None)


def features(processor: Any, given: list[Clip]) -> list[Features]:
    """Model inputs of each clip, with the number of encoder frames that hold speech; the rest is padding to the full window."""
    extractor = processor.feature_extractor
    made = []
    for clip in given:
        values = extractor(clip.samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        samples_per_frame = extractor.hop_length * ENCODER_STRIDE
        frames = min(-(-len(clip.samples) // samples_per_frame), values.shape[-1] // ENCODER_STRIDE)
        made.append(Features(values, frames))
    return made


@torch.no_grad()  # not inference_mode: an embedding trained on these ids has to save them
def targets(model: Any, processor: Any, given: list[Clip]) -> list[Tensor]:
    """Decoder input ids int64 [1, tokens] of each clip, for teacher forcing: prefix, then text, without end of text.

    The text is the clip's transcript, or what `model` itself says greedily; so `model` is the float model.
    """
    end, room = model.generation_config.eos_token_id, model.config.max_target_positions
    made = []
    for clip, inputs in zip(given, features(processor, given), strict=True):
        values = inputs.input_features.to(model.device, model.dtype)
        start = prefix(model, values)
        if clip.text is not None:
            # Whisper's own output starts with a space
            ids = processor.tokenizer(f" {clip.text}", add_special_tokens=False).input_ids
        else:
            said = model.generate(values, do_sample=False, num_beams=1)[0].tolist()
            ids = [i for i in said if i < end]  # every special token, timestamps included, lies at or above end of text
        made.append(torch.tensor([(start + ids)[:room]], dtype=torch.int64))
    return made


def prefix(model: Any, input_features: Tensor) -> list[int]:
    """What `generate` feeds the decoder before text: start, language and task if multilingual, no timestamps."""
    rules = model.generation_config
    ids = [rules.decoder_start_token_id]
    if getattr(rules, "is_multilingual", False):
        language = getattr(rules, "language", None)
        if language is None:
            ids.append(int(model.detect_language(input_features)[0]))
        else:
            ids.append(rules.lang_to_id[_language_token(language)])
        ids.append(rules.task_to_id[getattr(rules, "task", None) or "transcribe"])
    no_timestamps = getattr(rules, "no_timestamps_token_id", None)
    return ids if no_timestamps is None else [*ids, no_timestamps]


def _language_token(language: str) -> str:
    """`en`, `English` or `<|en|>` -> `<|en|>`."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    code = language.lower().removeprefix("<|").removesuffix("|>")
    return f"<|{TO_LANGUAGE_CODE.get(code, code)}|>"
