"""A packed folder trained on: the same bytes as training in the first run, from any start, resumable, the start untouched."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import quant
from quant.passes.distill import Pass
from quant.recipe import load_recipe
from quant.retrain import retrain

TRAINING = {"steps": 8, "windows": 1, "held": 2, "scales": 0.01, "save_every": 3}
FORMAT = {"name": "int_group", "bits": 3, "group": 32}


def recipe(folder: Path, name: str, *passes: object) -> str:
    file = folder / f"{name}.yaml"
    text = {"name": name, "description": "t", "format": FORMAT, "activation": "none", "passes": list(passes)}
    file.write_text(yaml.safe_dump(text))
    return str(file)


@pytest.fixture(scope="module")
def start(llama: Path, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    quant.quantize(str(llama), recipe(root, "plain", {"rtn": None}), root / "out", overrides=tiny.SMALL)
    return root / "out"


def test_it_is_the_training_of_one_run(start: Path, llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    both = recipe(tmp_path, "both", {"rtn": None}, {"distill": TRAINING})
    before = (start / "model.safetensors").read_bytes()
    quant.quantize(str(llama), both, tmp_path / "one", overrides=tiny.SMALL)
    out = retrain(start, both, tmp_path / "two")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    assert (start / "model.safetensors").read_bytes() == before
    assert load_recipe(str(out / "recipe.yaml")).passes == load_recipe(str(tmp_path / "one" / "recipe.yaml")).passes
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "one", out)]
    assert reports[0]["tuned"] == reports[1]["tuned"]
    assert "held-out mean KL" in (out / "README.md").read_text()
    ids = torch.arange(20).view(1, -1)
    assert torch.equal(quant.load(out)(ids).logits, quant.load(tmp_path / "one")(ids).logits)
    again = retrain(out, both, tmp_path / "three", ["distill.steps=4"])
    assert [entry["steps"] for entry in json.loads((again / "report.json").read_text())["tuned"]] == [8, 4]


def test_a_killed_training_goes_on(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = recipe(tmp_path, "both", {"rtn": None}, {"distill": TRAINING})
    whole = retrain(start, both, tmp_path / "whole")

    def stop(done: int, total: int, loss: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrain(start, both, tmp_path / "out", tell=stop)
    seen = []
    retrain(start, both, tmp_path / "out", tell=lambda done, total, loss: seen.append(done))
    assert seen == [4, 5, 6, 7, 8]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert Pass.name() == "distill"


def test_what_cannot_be_trained_is_one_line(start: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe rtn has no training of packed models"):
        retrain(start, "rtn", tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no report\.json and recipe\.yaml; give the folder that quantize wrote"):
        retrain(llama, "distill-w4a16", tmp_path / "b")
    assert not list(tmp_path.iterdir())
