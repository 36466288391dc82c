"""The main job on a GPU with tiny models. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quant
from quant.cli import main
from quant.recipe import available

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the main job was not run on one")


def assert_served_alike(folder: Path) -> None:
    """The GPU's logits are the CPU's, in float32 and after as many steps of generation."""
    ids = torch.arange(1, 65).view(2, 32)
    with torch.no_grad():
        here, there = (quant.load(folder, device=device, dtype=torch.float32) for device in ("cpu", DEVICE))
        wanted, got = here(input_ids=ids).logits, there(input_ids=ids.to(DEVICE)).logits.cpu()
    off = (got - wanted).norm() / wanted.norm()
    assert off < 0.02, off  # a token of 8 bits may fall on the other side of a rounding border
    assert there.generate(input_ids=ids.to(DEVICE), max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize("recipe", available())
def test_a_gpu_packs_and_serves(recipe, llama, tiny, tmp_path):
    quant.quantize(llama, recipe, tmp_path / "out", device=DEVICE, overrides=tiny.small(recipe))
    assert_served_alike(tmp_path / "out")


@pytest.mark.parametrize(("start", "recipe"), [("aqlm", "pv-tuning"), ("db-llm", "distill-w4a16"), ("rtn", "blockwise-w2")])
def test_a_gpu_trains_a_packed_folder(start, recipe, packed, tiny, tmp_path):
    name = recipe.split("-")[0].replace("pv", "pv_tuning")
    command = ["train", str(packed(start)), "--recipe", recipe, "-o", str(tmp_path / "out"), "--device", DEVICE]
    assert main([*command, "--set", f"{name}.steps=6"]) == 0
    assert_served_alike(tmp_path / "out")


@pytest.mark.parametrize("recipe", ["w8a8", "quarot-gptq-w4a16"])
def test_a_gpu_packs_speech(recipe, clips, tiny, tmp_path):
    folder = tiny.whisper_folder(tmp_path / "float")
    quant.quantize(folder, recipe, tmp_path / "out", calib=str(clips), device=DEVICE, overrides=["head=null"])
    assert quant.load(tmp_path / "out", device=DEVICE).device.type == DEVICE
