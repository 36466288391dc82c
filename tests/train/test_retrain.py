"""A packed folder trained on: the same bytes as training in the first run, from any start, resumable, the start untouched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file

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


BLOCKS = {"steps": 4, "held": 2, "codes": 0.001, "looks": 2}


def tensors(folder: Path, inside: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(folder / "model.safetensors").items() if inside in name}


def test_the_first_block_is_trained_as_in_one_run(start: Path, llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    """Later ones are not: their codes were chosen behind untrained blocks."""
    both = recipe(tmp_path, "both", {"rtn": None}, {"blockwise": BLOCKS})
    quant.quantize(str(llama), both, tmp_path / "one", overrides=tiny.SMALL)
    out = retrain(start, both, tmp_path / "two")
    one, two, first = (tensors(folder, "layers.0.") for folder in (tmp_path / "one", out, start))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(first[name], two[name]) for name in one)
    blocks = json.loads((out / "report.json").read_text())["blocks"]
    assert all(block["trained"][0]["held_out_error"][0] >= min(block["trained"][0]["held_out_error"]) for block in blocks)
    assert blocks[0]["layers"] == json.loads((start / "report.json").read_text())["blocks"][0]["layers"]
    assert quant.load(out)(torch.arange(20).view(1, -1)).logits.isfinite().all()


def test_blocks_are_trained_from_where_they_stand(start: Path, tmp_path: Path) -> None:
    """The second training begins at the loss that the first ended with, in front of the blocks that it trains itself."""
    both = recipe(tmp_path, "both", {"rtn": None}, {"blockwise": BLOCKS}, {"distill": TRAINING})
    once = retrain(start, both, tmp_path / "once")
    twice = retrain(once, both, tmp_path / "twice", ["blockwise.steps=2", "distill.steps=3"])
    report = json.loads((twice / "report.json").read_text())
    assert [len(block["trained"]) for block in report["blocks"]] == [2] * len(report["blocks"])
    assert [entry["steps"] for entry in report["tuned"]] == [8, 3]
    steps = [
        options["steps"] for entry in load_recipe(str(twice / "recipe.yaml")).passes for options in entry.values() if options
    ]
    assert steps == [4, 8, 2, 3]
    plain = recipe(tmp_path, "blocks", {"rtn": None}, {"blockwise": BLOCKS})
    blocks = retrain(start, plain, tmp_path / "blocks")
    again = retrain(blocks, plain, tmp_path / "again")
    held = [
        json.loads((folder / "report.json").read_text())["blocks"][0]["trained"][-1]["held_out_error"]
        for folder in (blocks, again)
    ]
    assert abs(held[1][0] - min(held[0])) < 0.1 * (held[0][0] - min(held[0]))  # norms were rounded to the checkpoint's dtype


def test_killed_blocks_go_on(start: Path, tmp_path: Path) -> None:
    both = recipe(tmp_path, "both", {"rtn": None}, {"blockwise": BLOCKS})
    whole = retrain(start, both, tmp_path / "whole")

    def stop(done: int, total: int, block: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrain(start, both, tmp_path / "out", listen=stop)
    seen: list[int] = []
    retrain(start, both, tmp_path / "out", listen=lambda done, total, block: seen.append(done))
    assert seen[0] == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


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
    with pytest.raises(ValueError, match="recipe rtn trains nothing; give one that does"):
        retrain(start, "rtn", tmp_path / "a")
    with pytest.raises(ValueError, match=r"has no report\.json and recipe\.yaml; give the folder that quantize wrote"):
        retrain(llama, "distill-w4a16", tmp_path / "b")
    assert not list(tmp_path.iterdir())
    folded = tmp_path / "folded"
    shutil.copytree(start, folded)
    again = load_recipe(str(folded / "recipe.yaml")).model_copy(update={"passes": ({"smooth": None}, {"rtn": None})})
    (folded / "recipe.yaml").write_text(again.dump())
    with pytest.raises(ValueError, match=r"pass smooth of .* changed the weights that blockwise compares with; quantize anew"):
        retrain(folded, "blockwise-w2", tmp_path / "c")
