"""CTranslate2 on a Whisper: features from the model's own processor, then its encoder and greedy decoder in one call.

The features are part of the time, as they are for our side. CTranslate2 returns a transcript when it is whole, so there
is no time to first token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quant.eval.rivals.base import Rival
from quant.eval.speech import RATE
from quant.eval.speed_worker import Repeat, Workload

NEEDS_CLIPS = "it cannot be held to a count of tokens, so it is measured on clips only: give --audio"


class CTranslate2(Rival):
    """The weights of a Whisper as int8 per row, or float."""

    distribution, pinned, module, kind = "ctranslate2", ">=4.6,<5", "ctranslate2", "speech"
    variants = {"int8": "weights and activations 8 bit, the rest float32", "float32": "float32"}  # noqa: RUF012

    def convert(self, source: Path, variant: str, out: Path) -> int:
        from ctranslate2.converters import TransformersConverter

        converter = TransformersConverter(str(source), copy_files=["tokenizer.json", "preprocessor_config.json"])
        converter.convert(str(out), quantization=variant, force=True)
        return (out / "model.bin").stat().st_size

    def open(self, source: Path, made: Path, variant: str, work: Workload, threads: int) -> Callable[[], Repeat]:
        import ctranslate2
        from transformers import AutoProcessor, GenerationConfig

        if not work.clips:
            raise ValueError(NEEDS_CLIPS)
        rules = GenerationConfig.from_pretrained(source)
        processor = AutoProcessor.from_pretrained(source)
        model = ctranslate2.models.Whisper(str(made), compute_type=variant, intra_threads=threads, inter_threads=1)
        prompt = [rules.decoder_start_token_id]
        if rules.is_multilingual:
            prompt += [rules.lang_to_id[f"<|{work.language}|>"], rules.task_to_id["transcribe"]]
        prompt.append(rules.no_timestamps_token_id)

        def transcribe(samples: np.ndarray) -> list[int]:
            features = processor.feature_extractor(samples, sampling_rate=RATE, return_tensors="np").input_features
            view = ctranslate2.StorageView.from_array(np.ascontiguousarray(features, dtype=np.float32))
            found = model.generate(view, [prompt], beam_size=1, max_length=rules.max_length)
            ids: list[int] = found[0].sequences_ids[0]
            return ids

        def repeat() -> Repeat:
            start = time.perf_counter()
            said = [transcribe(samples) for samples in work.clips]
            seconds = time.perf_counter() - start
            texts = tuple(processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said)
            return Repeat(metrics={"rtf": seconds * RATE / sum(map(len, work.clips))}, texts=texts)

        return repeat


RIVAL = CTranslate2()
