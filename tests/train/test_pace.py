"""A time instead of steps: chosen from the first step, kept for a killed run, written down so that no clock is needed again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import quant
from quant.recipe import load_recipe
from quant.train.pace import LEAST, MOST, Pace, block_seconds, fitting, left_seconds, seconds_of


def test_times_are_read() -> None:
    assert [seconds_of(text) for text in ("90s", "10m", "1h", "1.5h")] == [90, 600, 3600, 5400]
    for text in ("10", "1 day", "-1h", "0m", "h"):
        with pytest.raises(ValueError, match="give one like 10m, 1h or 8h"):
            seconds_of(text)


def test_steps_fit_into_the_time() -> None:
    assert fitting(100, 0.5) == 200
    assert fitting(-5, 0.5) == LEAST
    assert fitting(1e9, 0.5) == MOST


def test_the_parts_of_a_budget_are_no_more_than_all_of_it() -> None:
    for more in (True, False):
        blocks = 30 * (block_seconds(3600, 30, 12, more) + 12)
        assert blocks + (left_seconds(3600, blocks, 1) if more else 0) <= 3600
    assert left_seconds(3600, 1000, 2) * 2 + 1000 <= 3600


def test_steps_are_chosen_once(tmp_path: Path) -> None:
    pace = Pace(1.0, tmp_path / "new" / "steps.json")
    assert 10 <= pace.steps(lambda: time.sleep(0.02)) <= 50
    again = Pace(1000.0, tmp_path / "new" / "steps.json")
    assert again.steps(lambda: None) == pace.steps(lambda: None)


def test_what_comes_besides_the_steps_takes_from_their_time(tmp_path: Path) -> None:
    pace = Pace(1.0, tmp_path / "steps.json")
    assert pace.steps(lambda: time.sleep(0.02), besides=0.6) <= 20
    assert Pace(1.0, tmp_path / "other.json").steps(lambda: time.sleep(0.02), besides=2.0) == LEAST


def test_a_budget_ends_in_a_recipe_that_needs_no_clock(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    passes = [{"gptq": None}, {"blockwise": {"held": 2}}, {"distill": {"windows": 1, "held": 2}}]
    text = {"name": "t", "description": "t", "format": {"name": "int_group", "bits": 2, "group": 32}, "activation": "none"}
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(text | {"passes": passes}))
    quant.quantize(str(llama), str(file), tmp_path / "timed", overrides=[*tiny.SMALL, "budget=4s"])
    report = json.loads((tmp_path / "timed" / "report.json").read_text())
    written = load_recipe(str(tmp_path / "timed" / "recipe.yaml"))
    assert written.budget is None
    steps = [options["steps"] for entry in written.passes[1:] for options in entry.values()]
    assert steps == [report["blocks"][0]["trained"][0]["steps"], report["tuned"][0]["steps"]]
    assert all(LEAST <= count <= MOST for count in steps)
    assert len({block["trained"][0]["steps"] for block in report["blocks"]}) == 1
    quant.quantize(str(llama), str(tmp_path / "timed" / "recipe.yaml"), tmp_path / "again")
    one, two = (tmp_path / name / "model.safetensors" for name in ("timed", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_a_recipe_without_training_takes_no_budget() -> None:
    with pytest.raises(ValueError, match="recipe gptq trains nothing, so a budget of 1h changes nothing"):
        load_recipe("gptq", ["budget=1h"])
    with pytest.raises(ValueError, match="budget '1 week' is no time"):
        load_recipe("distill-w4a16", ["budget=1 week"])
