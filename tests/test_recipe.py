"""Recipes: shipped ones load and survive a dump; every wrong name is answered with the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from quant.kernels.format import from_config
from quant.recipe import available, load_recipe


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_recipe(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path):
    """Changes to a small recipe -> the path of its file."""

    def make(**changes: object) -> str:
        values = {
            "name": "mine",
            "description": "d",
            "format": {"name": "int_group"},
            "activation": "none",
            "passes": [{"rtn": None}],
        }
        values = {key: value for key, value in (values | changes).items() if value != "absent"}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "mine.yaml")

    return make


@pytest.mark.parametrize("name", available())
def test_shipped_recipes_load_and_survive_a_dump(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert available()[name] == recipe.description
    assert recipe.quantizer().refuses(recipe.base_format()) is None
    (tmp_path / "again.yaml").write_text(recipe.dump())
    again = load_recipe(str(tmp_path / "again.yaml"))
    assert again == recipe
    assert again.dump() == recipe.dump()
    assert again.build_passes() == recipe.build_passes()


def test_the_recipes_people_expect_are_there() -> None:
    assert set(available()) >= {"dgq", "gptq", "qoq", "rtn", "w8a8"}


def test_overrides_reach_keys_passes_and_defaults() -> None:
    recipe = load_recipe(
        "dgq", ["format.group=128", "dgq.round=nearest", "smooth.skip=[o_proj, down_proj]", "calibration.tokens=99", "seed=7"]
    )
    assert recipe.base_format() == from_config({"name": "int4_dual", "group": 128})
    smooth, dgq = recipe.build_passes()
    assert (dgq.round, dgq.refine) == ("nearest", True)
    assert (smooth.skip, smooth.method) == (("o_proj", "down_proj"), "percentile")
    assert (recipe.calibration.tokens, recipe.calibration.length, recipe.seed) == (99, 512, 7)
    kept, _ = load_recipe("qoq", ["smooth.strength=0.9"]).build_passes()
    assert (kept.strength, kept.method, kept.only) == (0.9, "migrate", ("down_proj",))  # one option changes, the rest stay
    assert load_recipe("dgq").seed == 0  # a file read again is untouched
    assert load_recipe("dgq", ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("format.group", "has no '='"),
        ("formt.group=64", "did you mean 'format'?"),
        ("format.grup=64", "int4_dual has no parameter 'grup'"),
        ("format.group=wide", "group is 'wide'; it must be of type int"),
        ("format.name=int5", "unknown format 'int5'; known: binary_dual, codebook"),
        ("format.group.x=1", "group has no keys of its own"),
        ("name.first=x", "name has no keys of its own"),
        ("dgq.rond=nearest", "pass dgq has no key 'rond'; did you mean 'round'?"),
        ("dgq.round=up", "'nearest' or 'gptq'"),
        ("dgq.damp=0", "pass dgq: damp: "),
        ("dgq=nearest", "write dgq.option=value"),
        ("dgq.round.x=1", "write dgq.option=value"),
        ("gptq.damp=0.1", "no key 'gptq'; allowed: activation, "),
        ("calibration.token=9", "did you mean 'tokens'?"),
        ("calibration.tokens=many", "given 'many'"),
        ("calibration.length=1", "greater than or equal to 8"),
        ("activation=int8_tokn", "did you mean 'int8_token'?"),
        ("seed=[1", "is not a YAML value"),
    ],
)
def test_a_wrong_override_is_one_line_that_helps(override: str, said: str) -> None:
    assert said in refusal("dgq", override)


def test_unknown_recipes() -> None:
    assert "did you mean 'dgq'?" in refusal("dqg")
    assert "; allowed: " + ", ".join(sorted(available())) in refusal("zzzzz")
    assert "does not exist" in refusal("nowhere/mine.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pases": []}, "has no key 'pases'; did you mean 'passes'?"),
        ({"passes": [{"gptk": None}]}, "did you mean 'gptq'?"),
        ({"passes": [{"rtn": {"bits": 3}}]}, "pass rtn has no key 'bits'"),
        ({"passes": [{"smooth": None}]}, "0 quantizers"),
        ({"passes": [{"rtn": None}, {"gptq": None}]}, "2 quantizers"),
        ({"passes": [{"smooth": None, "rtn": None}]}, "a pass is one entry"),
        ({"passes": ["rtn"]}, "passes.0"),
        ({"passes": "absent"}, "passes: field required"),
        ({"rules": [{"macth": "*"}]}, "did you mean 'match'?"),
        ({"rules": [{"match": "*", "activation": "int8_tokn"}]}, "did you mean 'int8_token'?"),
        ({"rules": [{"match": "*", "skip": "perhaps"}]}, "rules.0.skip"),
    ],
)
def test_wrong_recipe_files(changes: dict[str, object], said: str, write) -> None:
    assert said in refusal(write(**changes))
    assert load_recipe(write()).name == "mine"


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "just words"])
def test_files_that_hold_no_recipe(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    assert "bad.yaml" in refusal(str(tmp_path / "bad.yaml"))
