"""A comparison computes each thing once, goes on where it was killed, survives a recipe that fails, and says all it found."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quant import api
from quant.cli import main
from quant.eval import compare, comparison, judge, kept, loading, perplexity
from quant.eval.compare import Made, Row, read_entries, split_outside
from quant.eval.judge import Measured

RECIPES = "rtn,gptq:format.bits=3,gptq:format.bits=3:format.group=32"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compare"


@pytest.fixture
def run(llama: Path, tiny: ModuleType) -> Callable[..., int]:
    """run(recipes, *options): the command on the tiny Llama."""

    def call(recipes: str, *options: str) -> int:
        sets = [part for override in tiny.SMALL for part in ("--set", override)]
        data = ["--text", "manual", "--length", "64", "--limit", "4", "--quiet"]
        return main(["compare", str(llama), "--recipes", recipes, *sets, *data, *options])

    return call


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("computed again")


def test_entries(tmp_path: Path) -> None:
    assert split_outside("a, b:x=[1,2]:y={c: d, e: f} ,,c", ",") == ["a", "b:x=[1,2]:y={c: d, e: f}", "c"]
    found = read_entries("rtn, gptq:format.bits=3:rules=[{match: 'a*', skip: true}]", ["seed=5"])
    assert list(found) == ["rtn", "gptq:format.bits=3:rules=[{match: 'a*', skip: true}]"]
    assert [recipe.seed for recipe in found.values()] == [5, 5]
    second = found["gptq:format.bits=3:rules=[{match: 'a*', skip: true}]"]
    assert second.format["bits"] == 3
    assert second.rules[0].match == "a*"
    (tmp_path / "list").write_text("# weights only\nrtn\ngptq:format.bits=3:rules=[{match: 'a*', skip: true}]\n")
    assert read_entries(f"@{tmp_path / 'list'}", ["seed=5"]) == found
    named = read_entries("plain = rtn, W3 = gptq:format={name: int_group, bits: 3}", [])
    assert [(name, recipe.name) for name, recipe in named.items()] == [("plain", "rtn"), ("W3", "gptq")]
    assert named["W3"].format["bits"] == 3


@pytest.mark.parametrize(
    ("recipes", "said"),
    [
        ("rtn,gptk", "unknown recipe 'gptk'; did you mean 'gptq'?"),
        ("rtn,gptq:formt.bits=3", "no key 'formt'; did you mean 'format'?"),
        ("rtn:format.bits", "has no '='"),
        ("rtn,rtn", "names rtn twice"),
        ("a = rtn,a = gptq", "names a twice"),
        (" , ", "--recipes is empty"),
        ("@none.txt", "names the file none.txt, which cannot be read"),
    ],
)
def test_bad_entries_are_one_line(run: Callable[..., int], capsys: pytest.CaptureFixture[str], recipes: str, said: str) -> None:
    assert run(recipes) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_bad_options_are_one_line(run: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options, said in (
        (("--json", str(tmp_path / "no" / "x.json")), "give a file name in a folder that exists"),
        (("--audio", "clips"), "--audio does not apply"),
        (("--length", "4096"), "takes windows of 2 to 256 tokens"),
        (("--limit", "0"), "--limit 0; it must be at least 1"),
    ):
        assert run("rtn", *options) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_second_run_computes_nothing(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    assert run(RECIPES, "--json", str(tmp_path / "first.json")) == 0
    assert not [path for path in cache.iterdir() if path.is_dir()]  # packed models are gone
    monkeypatch.setattr(api, "compile_folder", never)
    monkeypatch.setattr(loading, "load", never)
    assert run(RECIPES, "--json", str(tmp_path / "second.json")) == 0
    first, second = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("first", "second"))
    assert [row["cached"] for row in first] == [False] * 3
    assert [row["cached"] for row in second] == [True] * 3
    assert [row | {"cached": True} for row in first] == second
    assert second[2]["made"]["bits_per_weight"] > second[1]["made"]["bits_per_weight"]
    assert second[2]["measured"]["kl_mean"] < second[1]["measured"]["kl_mean"]
    with pytest.raises(AssertionError, match="computed again"):
        run("rtn:format.bits=8")  # another recipe is not known
    with pytest.raises(AssertionError, match="computed again"):
        run(RECIPES, "--limit", "3")  # nor are other windows


def test_a_killed_run_goes_on_at_its_last_block(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from quant.compile import run_block

    blocks: list[str] = []

    def counted(plan: object, name: str, chains: object, **rest: object) -> object:
        blocks.append(name)
        if len(blocks) == 5:  # the second recipe's second block
            raise KeyboardInterrupt
        return run_block(plan, name, chains, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr("quant.api.run_block", counted)
    assert run("rtn,gptq") == 130
    assert run("rtn,gptq", "--json", str(tmp_path / "found.json")) == 0
    assert [name[-1] for name in blocks] == ["0", "1", "2", "0", "1", "1", "2"]
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["cached"] for row in rows] == [True, False]


def test_a_killed_evaluation_does_not_quantize_again(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(judge.TextJudge, "measure", stop)
        assert run("rtn") == 130
    monkeypatch.setattr(api, "compile_folder", never)
    assert run("rtn") == 0


def test_a_recipe_that_fails_is_a_line(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "gptq:rules=[{match: nothing*, skip: true}]"
    table = tmp_path / "table.csv"
    assert run(f"{bad},rtn", "--csv", str(table)) == 0
    assert f"{bad}: rule 'nothing*' decides no layer" in capsys.readouterr().out
    rows = list(csv.DictReader(table.open()))
    assert "decides no layer" in rows[0]["failed"]
    assert rows[0]["kl_mean"] == ""
    assert float(rows[1]["kl_mean"]) > 0
    assert rows[1]["failed"] == ""
    assert run(bad) == 2


def test_kept_models_are_the_measured_ones(run: Callable[..., int], tmp_path: Path, llama: Path) -> None:
    found = tmp_path / "found.json"
    assert run("rtn") == 0
    assert run("rtn,gptq:format.bits=3", "--keep", str(tmp_path / "kept"), "--json", str(found)) == 0  # rtn is made again
    for row, name in zip(json.loads(found.read_text())["rows"], ("rtn", "gptq-format.bits-3"), strict=True):
        out = tmp_path / "numbers.json"
        options = ["--text", "manual", "--length", "64", "--limit", "4", "--json", str(out)]
        assert main(["eval", str(tmp_path / "kept" / name), *options]) == 0
        evaluated = json.loads(out.read_text())["text"]
        assert row["measured"]["kl_mean"] == pytest.approx(evaluated["fidelity"]["kl_mean"], rel=1e-6)
        assert row["measured"]["ratio"] == pytest.approx(evaluated["ratio"], rel=1e-6)
        assert row["measured"]["reference_perplexity"] == pytest.approx(evaluated["reference_perplexity"], rel=1e-6)


def test_a_packed_folder_is_measured_as_it_is(
    run: Callable[..., int], tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    assert run("gptq:format.bits=3", "--keep", str(tmp_path / "kept"), "--json", str(found)) == 0
    first = json.loads(found.read_text())["rows"][0]
    kept = tmp_path / "kept" / "gptq-format.bits-3"
    monkeypatch.setattr(api, "compile_folder", never)
    assert run(f"packed = {kept},{kept}", "--json", str(found)) == 0
    rows = json.loads(found.read_text())["rows"]
    assert [(row["recipe"], row["cached"]) for row in rows] == [("packed", False), (str(kept), True)]
    for row in rows:
        assert row["measured"] == first["measured"]
        assert row["made"] == first["made"]
    report = json.loads((kept / "report.json").read_text())
    (kept / "report.json").write_text(json.dumps(report | {"source": "another"}))
    assert run(str(kept)) == 2
    assert f"{kept} was made of another, and {llama} is compared" in capsys.readouterr().err
    assert run(f"{kept}:format.bits=2") == 2
    assert "packed already; give them to a recipe" in capsys.readouterr().err


def test_a_kept_reference_gives_the_very_logits(llama: Path) -> None:
    model = loading.load(llama, torch.float32, "cpu")
    windows = torch.randint(0, 320, (3, 50), generator=torch.Generator().manual_seed(0))
    reference = kept.keep(model, windows)
    assert isinstance(reference, kept.Kept)
    scorer = perplexity.Scorer(model, windows[:1, :16])
    with torch.inference_mode():
        for start in range(3):
            ids = windows[start : start + 1]
            for a, b in zip(reference.slices(ids, start), scorer.slices(ids), strict=True):
                assert torch.equal(a, b)


def test_speech(packed_speech: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(loading.source(packed_speech))
    found, evaluated = tmp_path / "found.json", tmp_path / "eval.json"
    options = ["--audio", str(clips), "--quiet", "--calib", str(clips), "--set", "head=null"]
    assert main(["compare", source, "--recipes", "dgq", *options, "--json", str(found)]) == 0
    assert "WER" in capsys.readouterr().out
    assert main(["eval", str(packed_speech), "--audio", str(clips), "--json", str(evaluated)]) == 0
    measured, speech = json.loads(found.read_text())["rows"][0]["measured"], json.loads(evaluated.read_text())["speech"]
    assert measured["kl_mean"] == pytest.approx(speech["fidelity"]["kl_mean"], rel=1e-6)
    assert measured["wer"] == speech["model"]["wer"]
    assert measured["reference_wer"] == speech["reference"]["wer"]


def test_the_front() -> None:
    assert comparison.front([(3, 5), (4, 4), (4, 6), (5, 4), (2, 9), (4, 4)]) == {0, 1, 4, 5}
    assert comparison.front([]) == set()


def test_the_figure_is_written_with_many_close_points(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        Row(
            recipe=f"recipe-{i}:format.bits={i}",
            made=Made(bits_per_weight=4 + 0.01 * i, weight_bytes=1, quantize_seconds=1),
            measured=Measured(
                kl_mean=0.1 / (i + 1), kl_error=0.001, kl_p99=1, top1=0.9, top1_error=0.01, ratio=1.1, ratio_error=0.01
            ),
        )
        for i in range(8)
    ]
    rows.append(Row(recipe="broken", failed="why"))
    for cost in compare.COSTS.values():
        comparison.draw("model", "data", rows, tmp_path / "f.png", cost)
        assert (tmp_path / "f.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        (tmp_path / "f.png").unlink()


def test_nothing_is_computed_for_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        compare.require_writable(None, tmp_path)
