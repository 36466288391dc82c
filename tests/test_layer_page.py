"""The page of `quantize inspect --html`: its numbers are the report's, and the command that it prints does what it says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import quant
from quant import layer_page
from quant.cli import main
from quant.plan import make_plan
from quant.recipe import load_recipe
from quant.targets import family_of


def page_of(folder: Path, target: Path, read_page: Callable[[Path], Any]) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The checked page of a folder, and the layers of its report by name."""
    assert main(["inspect", str(folder), "--html", str(target)]) == 0
    report = json.loads((folder / "report.json").read_text())
    return read_page(target), {layer["name"]: layer for layer in layer_page.layers_of(report)}


def planned(command: str) -> Any:
    """The plan of a printed command."""
    words = shlex.split(command)
    assert words[0] == "quantize"
    assert words[2] == "--recipe"
    return make_plan(words[1], load_recipe(words[3], [words[words.index("--set") + 1]]))


def test_page_shows_every_layer_and_the_worst_is_darkest(
    packed: Callable[..., Path], tmp_path: Path, read_page: Callable[[Path], Any]
) -> None:
    page, layers = page_of(packed("dgq"), tmp_path / "page.html", read_page)
    first_map = (tmp_path / "page.html").read_text().partition("<h3>")[2].partition("</table>")[0]
    cells = re.findall(r'title="(\S+): (\S+)" style="background: hsl\(20 90% (\S+)%\)">(\S+)</td>', first_map)
    shown = {name: (value, float(light), text) for name, value, light, text in cells}
    assert shown.keys() == layers.keys()
    for name, (value, _, text) in shown.items():
        assert (value, text) == (f"{layers[name]['error']:.6g}", f"{layers[name]['error']:.3f}")
    by_error = sorted(layers, key=lambda name: layers[name]["error"])
    lights = [shown[name][1] for name in by_error]
    assert lights == sorted(lights, reverse=True)
    assert (lights[0], lights[-1]) == (97.0, 55.0)
    for name in by_error[-layer_page.WORST :]:
        assert name in page.text
        assert f"{layers[name]['rtn_error']:.4f}" in page.text
    for part in ("21 packed layers", "int4_dual", "share of inputs that round to zero", "outliers"):
        assert part in page.text


@pytest.mark.parametrize("recipe", ["dgq", "gptq"])
def test_the_command_spends_bits_on_the_worst_layers_and_changes_no_other(
    packed: Callable[..., Path], recipe: str, tmp_path: Path, read_page: Callable[[Path], Any]
) -> None:
    """GPTQ writes 8-bit codes; DGQ's format has none, so there they stay in float."""
    page, layers = page_of(packed(recipe), tmp_path / "page.html", read_page)
    plan = planned(page.parts["pre"])
    worst = {layer["name"] for layer in layer_page.worst(layers.values())}
    wide = {name for name, target in plan.targets.items() if target.format.config().get("bits") == 8}
    more = wide if recipe == "gptq" else layers.keys() & plan.selection.kept.keys()
    families = {family_of(name, ()) for name in worst}
    assert more == {name for name in layers if family_of(name, ()) in families}
    assert len(more) < len(layers)
    for name in layers.keys() - more:
        assert plan.targets[name].format.config() == layers[name]["format"]


def test_layers_of_eight_bits_stay_in_float(packed: Callable[..., Path]) -> None:
    folder = packed("gptq")
    (layer, *_) = layer_page.layers_of(json.loads((folder / "report.json").read_text()))
    recipe = load_recipe(str(folder / "recipe.yaml"))
    wide = {**layer, "format": layer["format"] | {"bits": 8}}
    given = (layer_page.more_bits([one], [layer["name"]], recipe) for one in (layer, wide))
    assert [list(advice.values()) for advice in given] == [[{"format": {"name": "int_group", "bits": 8}}], [{"skip": True}]]


def test_a_report_says_what_was_folded_and_where_outliers_are(
    tiny: ModuleType, tmp_path: Path, read_page: Callable[[Path], Any]
) -> None:
    source = tiny.llama_folder(tmp_path / "float")

    def channel(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.input_layernorm.weight"][5] *= 60

    plain, folded = (quant_report(source, recipe, tmp_path / recipe, tiny) for recipe in ("rtn", "crossquant-w8a8"))
    tiny.rewrite(source, channel)
    loud = quant_report(source, "rtn", tmp_path / "loud", tiny)
    ratios = [{layer["name"]: layer["outlier_ratio"] for layer in layer_page.layers_of(report)} for report in (plain, loud)]
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{part}"
        assert ratios[1][name] > 10 * ratios[0][name]
    assert ratios[1]["model.layers.0.self_attn.q_proj"] == ratios[0]["model.layers.0.self_attn.q_proj"]
    assert all(block["folds"] == {} for block in plain["blocks"])
    for block in folded["blocks"]:
        name = block["name"]
        assert block["folds"][f"{name}.self_attn.k_proj"] == f"{name}.input_layernorm"
        assert block["folds"][f"{name}.mlp.up_proj"] == f"{name}.post_attention_layernorm"
        assert block["folds"].keys().isdisjoint(block["refused_folds"])
    page, _ = page_of(tmp_path / "crossquant-w8a8", tmp_path / "page.html", read_page)
    assert "model.layers.*.post_attention_layernorm" in page.text


def quant_report(source: Path, recipe: str, out: Path, tiny: ModuleType) -> dict[str, Any]:
    quant.quantize(source, recipe, out, overrides=tiny.SMALL)
    return json.loads((out / "report.json").read_text())  # type: ignore[no-any-return]


def test_a_folder_without_a_report_has_no_page(
    packed: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in packed("dgq").iterdir():
        if file.name != "report.json":
            (tmp_path / file.name).symlink_to(file)
    assert main(["inspect", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 2
    assert "report.json does not exist" in capfd.readouterr().err
