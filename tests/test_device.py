"""The main job on a GPU with tiny models. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quant
from quant import workspace
from quant.cli import main
from quant.recipe import available

DEVICE = "cuda"
BORDERS = {"fp8": 0.08}  # a token's value may fall on the other side of a rounding border, a step of 2^-4 of it for E4M3
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the main job was not run on one")


def assert_served_alike(folder: Path, bound: float = 0.02) -> None:
    """The GPU's logits are the CPU's, in float32, and it generates."""
    ids = torch.arange(1, 65).view(2, 32)
    with torch.no_grad():
        here, there = (quant.load(folder, device=device, dtype=torch.float32) for device in ("cpu", DEVICE))
        wanted, got = here(input_ids=ids).logits, there(input_ids=ids.to(DEVICE)).logits.cpu()
    off = (got - wanted).norm() / wanted.norm()
    assert off < bound, off
    assert there.generate(input_ids=ids.to(DEVICE), max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize("recipe", available())
def test_a_gpu_packs_and_serves(recipe, llama, tiny, tmp_path):
    quant.quantize(llama, recipe, tmp_path / "out", device=DEVICE, overrides=tiny.small(recipe))
    assert_served_alike(tmp_path / "out", BORDERS.get(recipe, 0.02))


@pytest.mark.parametrize(("start", "recipe"), [("aqlm", "pv-tuning"), ("db-llm", "distill-w4a16"), ("rtn", "blockwise-w2")])
def test_a_gpu_trains_a_packed_folder(start, recipe, packed, tiny, tmp_path):
    name = recipe.split("-")[0].replace("pv", "pv_tuning")
    command = ["train", str(packed(start)), "--recipe", recipe, "-o", str(tmp_path / "out"), "--device", DEVICE]
    assert main([*command, "--set", f"{name}.steps=6"]) == 0
    assert_served_alike(tmp_path / "out")


def test_a_gpu_packs_speech_and_goes_on_in_any_stack(clips, tiny, tmp_path, monkeypatch):
    """Stopped after every block of encoder and decoder, the folder has the bytes of an undisturbed run."""
    folder, out, whole = (tmp_path / name for name in ("float", "out", "whole"))
    command = [str(tiny.whisper_folder(folder)), "--recipe", "w8a8", "--calib", str(clips), "--device", DEVICE]
    assert main([*command, "--set", "head=null", "-o", str(whole)]) == 0
    commit = workspace.Workspace.commit

    def once(self: workspace.Workspace, *args: object) -> None:
        commit(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(workspace.Workspace, "commit", once)
    command += ["--set", "head=null", "-o", str(out)]
    assert [main(command) for _ in range(5)] == [130] * 4 + [0]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert quant.load(out, device=DEVICE).device.type == DEVICE
