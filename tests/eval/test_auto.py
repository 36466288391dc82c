"""auto stays within the budget, tells what it tried and why it chose, takes the best, and tries nothing twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quant.cli import main
from quant.eval import auto
from quant.plan import make_plan
from quant.recipe import load_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for the tests of this file, and few recipes, to save time."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path_factory.getbasetemp() / "auto-cache"))
    monkeypatch.setattr(auto, "available", lambda: {"rtn": "", "gptq": "", "w8a8": "", "distill-w4a16": ""})


@pytest.fixture
def run(llama: Path, tiny: ModuleType, tmp_path: Path) -> Callable[..., int]:
    sets = [part for override in tiny.SMALL for part in ("--set", override)]

    def call(*options: str) -> int:
        return main([str(llama), "--recipe", "auto", *sets, "-o", str(tmp_path / "out"), *options])

    return call


def test_it_takes_the_best_within_the_budget(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--bits", "4.5") == 0
    said = capsys.readouterr().out
    trials = {
        name: (float(bits), float(kl)) for name, bits, kl in re.findall(r"  (\S+): ([\d.]+) bits, .* about ([\d.]+)", said)
    }
    assert trials.keys() == {"rtn", "rtn:bits=4.5", "gptq", "gptq:bits=4.5"}  # 8 bits are too many
    assert all(bits <= 4.5 for bits, _ in trials.values())
    best = min(trials, key=lambda name: trials[name][1])
    assert f"chosen: {best}, the least KL of 4 within 4.5 bits" in said
    assert "not tried, since they train: distill-w4a16" in said
    assert best.startswith("gptq")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["totals"]["packed_bits_per_weight"] == pytest.approx(trials[best][0], abs=1e-3)

    def never(*args: object) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr(auto, "compile_folder", never)
    assert run("--bits", "4.5", "--plan") == 0
    assert f"chosen: {best}" in capsys.readouterr().out


def test_recipes_of_far_fewer_bits_are_left_out(llama: Path, tiny: ModuleType) -> None:
    found = auto.candidates(str(llama), 8.5, tiny.SMALL, torch.device("cpu"), lambda line: None)
    assert found.keys() == {"w8a8", "rtn:bits=8.5", "gptq:bits=8.5"}


def test_tried_blocks_are_spread(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.llama_folder(tmp_path / "deep", layers=12)
    plan = make_plan(str(model), load_recipe("gptq", tiny.SMALL))
    assert auto.tried_blocks(plan) == ("model.layers.2.", "model.layers.6.", "model.layers.10.")


@pytest.mark.parametrize(
    ("options", "said"),
    [((), "recipe auto needs a budget; give --bits"), (("--bits", "2"), "no recipe packs this model in 2 bits per weight")],
)
def test_bad_budgets_are_one_line(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert run(*options, "--quiet") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
