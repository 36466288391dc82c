"""A budget of bits: never exceeded, never worse with more of it, one format per fused family, measured once."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import quant
from quant import budget, losses
from quant.cli import main
from quant.kernels.formats.int_group import IntGroup
from quant.plan import Plan, make_plan
from quant.recipe import load_recipe
from quant.targets import families

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for the tests of this file."""
    folder = tmp_path_factory.getbasetemp() / "budget-cache"
    monkeypatch.setenv("LOWBIT_CACHE", str(folder))
    return folder


def planned(model: Path, tiny: ModuleType, bits: float | None, *sets: str, recipe: str = "gptq") -> Plan:
    asked = [] if bits is None else [f"bits={bits}"]
    return make_plan(str(model), load_recipe(recipe, [*tiny.SMALL, *asked, *sets]))


def test_more_bits_lose_no_more_and_the_budget_holds(llama: Path, tiny: ModuleType) -> None:
    free = planned(llama, tiny, None)
    expected = losses.predicted([free], CPU, lambda line: None)[0]
    before = float("inf")
    for bits in (2.4, 2.6, 3.0, 3.25, 3.5, 4.0, 4.25, 4.6, 6.0, 8.0, 9.0):
        plan, found = planned(llama, tiny, bits), budget.mix(free, expected, bits)
        assert plan.bits_per_weight() <= bits
        assert plan.bits_per_weight() == pytest.approx(found.bits)
        assert found.loss <= before
        before = found.loss
        for family in families(plan.targets):
            assert len({target.format for target in family}) == 1
    assert planned(llama, tiny, 3.5).bits_per_weight() > 3.4  # and it is used


def test_finer_formats_are_predicted_to_lose_less(llama: Path, tiny: ModuleType) -> None:
    expected = losses.predicted([planned(llama, tiny, None)], CPU, lambda line: None)[0]
    for options in expected.values():
        by_bits = [
            min(loss for fmt, loss in options.items() if isinstance(fmt, IntGroup) and fmt.bits == b) for b in (2, 3, 4, 8)
        ]
        assert by_bits == sorted(by_bits, reverse=True)


def test_the_mix_is_measured_once(llama: Path, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = planned(llama, tiny, 3.5)

    def never(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(losses, "measure", never)
    again = planned(llama, tiny, 3.5)
    assert again.targets == first.targets
    assert again.identity("") == first.identity("")
    assert planned(llama, tiny, 3.0).bits_per_weight() <= 3.0
    monkeypatch.setattr(budget, "predicted", never)  # a resolved recipe needs no measurement at all
    path = tmp_path / "resolved.yaml"
    path.write_text(first.recipe.dump())
    assert {n: t.format for n, t in make_plan(str(llama), load_recipe(str(path))).targets.items()} == {
        n: t.format for n, t in first.targets.items()
    }


def test_recipes_share_one_backward_pass(
    llama: Path, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans = [planned(llama, tiny, None, recipe=recipe) for recipe in ("gptq", "rtn", "quarot-gptq-w4a16")]
    apart = [losses.predicted([plan], CPU, lambda line: None)[0] for plan in plans]
    passes = []
    feelings = losses.feelings

    def counted(*args: Any) -> Any:
        passes.append(args)
        return feelings(*args)

    monkeypatch.setattr(losses, "feelings", counted)
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "empty"))
    assert losses.predicted(plans, CPU, lambda line: None) == apart
    assert len(passes) == 1
    assert losses.predicted(plans[::-1], CPU, lambda line: None) == apart[::-1]  # from the cache
    assert len(passes) == 1
    assert apart[0] != apart[1] != apart[2]


def test_rules_are_obeyed_and_counted(llama: Path, tiny: ModuleType) -> None:
    rule = "rules=[{match: '*.down_proj', format: {bits: 8}}, {match: '*.0.self_attn.o_proj', skip: true}]"
    plan = planned(llama, tiny, 4.5, rule)
    assert plan.bits_per_weight() <= 4.5
    assert all(t.format.config()["bits"] == 8 for n, t in plan.targets.items() if n.endswith("down_proj"))
    assert "model.layers.0.self_attn.o_proj" not in plan.targets
    with pytest.raises(ValueError, match="give at least"):
        planned(llama, tiny, 2.5, rule)


def test_the_run_keeps_to_the_plan(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    quant.quantize(llama, "gptq", tmp_path / "out", bits=3.3, overrides=tiny.SMALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 3.1 < report["totals"]["packed_bits_per_weight"] <= 3.3
    widths = {layer["format"]["bits"] for block in report["blocks"] for layer in block["layers"]}
    assert len(widths) > 1
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml")).bits == 3.3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "gptq", "--bits", "1.5"], "bits 1.5 is less than any mix of formats takes; give at least 2."),
        (["--recipe", "dgq", "--bits", "4"], "recipe dgq packs int4_dual; give --recipe gptq"),
        (["--recipe", "gptq", "--bits", "0"], "bits: input should be greater than 0, given 0"),
        (["--recipe", "gptq", "--bits", "many"], "'many' is not a valid float"),
    ],
)
def test_bad_budgets_are_one_line(
    llama: Path, tiny: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    sets = [part for override in tiny.SMALL for part in ("--set", override)]
    assert main([str(llama), *options, *sets, "--quiet", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
