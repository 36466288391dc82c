"""Peak memory does not grow with depth, and the plan foretells it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from quant.cli import main


def quantize(tiny: ModuleType, folder: Path, layers: int, recipe: str = "dgq", *sets: str) -> dict[str, Any]:
    """report.json's totals of a run, in a process of its own, over a random Llama of 512 channels."""
    config = LlamaConfig(
        vocab_size=tiny.WORDS,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    tiny.tokenizer().save_pretrained(folder / "source")
    text = folder / "text.txt"
    text.write_text(tiny.SENTENCE * 60)
    command = [sys.executable, "-m", "quant.cli", str(folder / "source"), "-o", str(folder / "out"), "--calib", str(text)]
    command += ["--recipe", recipe, *(f"--set={override}" for override in (*tiny.SMALL, *sets))]
    subprocess.run([*command, "--quiet"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    totals: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())["totals"]
    return totals


def test_peak_memory_does_not_grow_with_depth_and_is_foretold(tiny: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "shallow").mkdir()
    (tmp_path / "deep").mkdir()
    shallow, deep = quantize(tiny, tmp_path / "shallow", 6), quantize(tiny, tmp_path / "deep", 24)
    assert deep["packed_weights"] == 4 * shallow["packed_weights"]  # 245 MB of float32 weights more
    assert deep["peak_memory_bytes"] < 1.1 * shallow["peak_memory_bytes"]
    for totals in (shallow, deep):
        assert 0.75 < totals["predicted_peak_memory_bytes"] / totals["peak_memory_bytes"] < 1.25


def test_attention_maps_are_foretold(tiny: ModuleType, tmp_path: Path) -> None:
    sets = [f"edgeqat.{key}=1" for key in ("steps", "held", "windows", "looks")]
    data = ["calibration.tokens=1024", "calibration.length=512", "dgq.sweeps=0"]
    totals = quantize(tiny, tmp_path, 4, "edgeqat-w4a8", *sets, *data)
    assert 0.85 < totals["predicted_peak_memory_bytes"] / totals["peak_memory_bytes"] < 1.15  # 0.79 without the maps


def test_the_plan_prints_the_forecast(tiny: ModuleType, tmp_path: Path, capsys: Any) -> None:
    tiny.llama_folder(tmp_path / "source")
    assert main([str(tmp_path / "source"), "--plan"]) == 0
    assert "peak memory of the run: about" in capsys.readouterr().out
