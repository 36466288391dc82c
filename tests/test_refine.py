"""Formats chosen from the weights: families share them, rules win over them, and the resolved recipe says the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from torch import Tensor

from quant.kernels.formats.int_group import IntGroup
from quant.passes import base
from quant.plan import Plan, make_plan
from quant.recipe import Recipe, load_recipe
from quant.targets import Target

READ: list[str] = []


class Halver(base.Refiner):
    """Reads every layer and gives the odd ones of each kind groups of 16."""

    bits: int = 4

    def refine(self, families: Sequence[Sequence[Target]], read: Callable[[str], Tensor]) -> dict[str, base.Choice]:
        chosen = {}
        for i, family in enumerate(families):
            for target in family:
                READ.append(target.name)
                assert read(target.name).shape == (target.n, target.k)
                if i % 2:
                    chosen[target.name] = base.Choice(IntGroup(bits=self.bits, group=16), f"family {i}")
        return chosen


@pytest.fixture(autouse=True)
def halver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass called halver beside those there are."""
    names, find = base.names(), base.find
    monkeypatch.setattr(base, "names", lambda: [*names, "halver"])
    monkeypatch.setattr(base, "find", lambda name: Halver if name == "halver" else find(name))
    READ.clear()


def recipe(**changes: Any) -> Recipe:
    values = load_recipe("rtn").model_dump() | changes
    return Recipe(**(values | {"passes": [*changes.get("passes", [{"halver": None}]), {"rtn": None}]}))


def schemes(plan: Plan) -> dict[str, Any]:
    return {name: (t.format, t.activation) for name, t in plan.targets.items()}


def test_families_are_what_serving_stacks_fuse_and_bytes_follow_the_choice(llama: Path) -> None:
    plain, plan = make_plan(str(llama), load_recipe("rtn")), make_plan(str(llama), recipe())
    assert set(READ) == set(plan.targets)
    for name, target in plan.targets.items():
        parent, _, leaf = name.rpartition(".")
        mates = [f for f in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if leaf in f]
        assert len({plan.targets[f"{parent}.{mate}"].format for family in mates for mate in family}) <= 1
        assert target.format == plain.targets[name].format or target.note.startswith("family")
    assert {t.format.group for t in plan.targets.values()} > {16}
    assert plan.bytes_on_disk() != plain.bytes_on_disk()


def test_the_resolved_recipe_repeats_the_choice_without_reading(llama: Path) -> None:
    plan = make_plan(str(llama), recipe(rules=[{"match": "*.1.mlp.down_proj", "skip": True}]))
    again = Recipe(**yaml.safe_load(plan.recipe.dump()))
    READ.clear()
    repeated = make_plan(str(llama), again)
    assert not READ
    assert schemes(repeated) == schemes(plan)
    assert "model.layers.1.mlp.down_proj" in repeated.selection.kept
    assert repeated.recipe == again


def test_a_rule_with_a_format_wins_and_one_without_does_not(llama: Path) -> None:
    rules = [{"match": "*.[qkv]_proj", "format": {"bits": 8}}, {"match": "*", "activation": "int8_token"}]
    plan = make_plan(str(llama), recipe(rules=rules))
    assert not any("q_proj" in name for name in READ)
    assert plan.targets["model.layers.0.self_attn.q_proj"].format == IntGroup(bits=8, group=64)
    assert {
        t.activation.name for n, t in plan.targets.items() if "q_proj" not in n and "k_proj" not in n and "v_proj" not in n
    } == {"int8_token"}
    assert IntGroup(group=16) in {t.format for t in plan.targets.values()}


def test_the_run_writes_what_the_plan_says(llama: Path, tmp_path: Path, tiny: ModuleType) -> None:
    import quant
    from quant.api import compile_folder
    from quant.resources import usable_device

    tried = recipe(calibration={"tokens": 512, "length": 64, "source": "manual"})
    plan = make_plan(str(llama), tried)
    compile_folder(plan, tmp_path / "out", usable_device("cpu"))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == plan.bytes_on_disk()
    model = quant.load(tmp_path / "out")
    for name, target in plan.targets.items():
        assert model.get_submodule(name).format == target.format


def test_a_weight_that_is_not_finite_is_named(llama: Path, tmp_path: Path, tiny: ModuleType) -> None:
    folder = tiny.llama_folder(tmp_path / "float")

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    tiny.rewrite(folder, poison)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight holds a NaN"):
        make_plan(str(folder), recipe())


def test_a_choice_that_cannot_be_stored_is_named(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"int_group has no 5-bit"):
        make_plan(str(llama), recipe(passes=[{"halver": {"bits": 5}}]))
