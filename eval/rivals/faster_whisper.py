"""faster-whisper: CTranslate2 behind its own feature extraction, tokenizer and window loop, greedy, without fallbacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quant.eval.rivals.base import Rival
from quant.eval.rivals.ctranslate2 import NEEDS_CLIPS, CTranslate2
from quant.eval.speech import RATE
from quant.eval.speed_worker import Repeat, Workload


class FasterWhisper(Rival):
    """The files of CTranslate2."""

    distribution, pinned, module, kind = "faster-whisper", ">=1.1,<2", "faster_whisper", "speech"
    variants = CTranslate2.variants

    def convert(self, source: Path, variant: str, out: Path) -> int:
        return CTranslate2().convert(source, variant, out)

    def open(self, source: Path, made: Path, variant: str, work: Workload, threads: int) -> Callable[[], Repeat]:
        from faster_whisper import WhisperModel

        if not work.clips:
            raise ValueError(NEEDS_CLIPS)
        model = WhisperModel(str(made), device="cpu", compute_type=variant, cpu_threads=threads)

        def transcribe(samples: np.ndarray) -> str:
            segments, _ = model.transcribe(
                samples, language=work.language, beam_size=1, temperature=0.0, without_timestamps=True, vad_filter=False
            )
            return "".join(segment.text for segment in segments).strip()

        def repeat() -> Repeat:
            start = time.perf_counter()
            texts = tuple(transcribe(samples) for samples in work.clips)
            seconds = time.perf_counter() - start
            return Repeat(metrics={"rtf": seconds * RATE / sum(map(len, work.clips))}, texts=texts)

        return repeat


RIVAL = FasterWhisper()
