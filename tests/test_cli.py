"""The command's surface: what is a verb and what a model, what --list and --plan say, and how little they do for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch

from quant import cli
from quant.cli import VERBS, main
from quant.models import Weights
from quant.recipe import available


def sets(tiny: ModuleType) -> list[str]:
    return [part for override in tiny.SMALL for part in ("--set", override)]


def test_no_arguments_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--recipe", "rtn"], ["--quiet"]):
        assert main(args) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert "no model given" in err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert all(word in out for word in ("--recipe", "--plan", "--calib", *VERBS))


def test_list(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for name, description in available().items():
        assert re.search(rf"^\s+{name}\s+{re.escape(description)}$", out, re.MULTILINE)
    assert "demo:smollm2-135m" in out


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_have_help(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert re.search(r"Usage: quantize \w+ \[OPTIONS\] \[?(OUT|MODEL)\b", capfd.readouterr().out)


def test_a_first_argument_that_is_a_verb_is_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    @click.command("inspect")
    @click.argument("out")
    def command(out: str) -> None:
        seen.append(out)

    monkeypatch.setattr("quant.show.command", command)
    assert main(["inspect", "model"]) == 0
    assert seen == ["model"]
    # the same word as a folder
    monkeypatch.chdir(tmp_path)
    for verb in VERBS:
        (tmp_path / verb).mkdir()
        assert main([f"./{verb}", "--recipe", "rtn"]) == 2
        assert f"{verb} has no config.json" in capfd.readouterr().err
    # and a word that is no verb
    assert main(["evals"]) == 2
    assert "evals does not exist; give a model folder" in capfd.readouterr().err


def test_plan_is_exact_and_reads_no_weight(
    llama: Path,
    packed: Callable[..., Path],
    tiny: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = packed("dgq")
    capfd.readouterr()

    def no(*args: object) -> torch.Tensor:
        raise AssertionError("--plan read a weight")

    monkeypatch.setattr(Weights, "read", no)
    monkeypatch.chdir(tmp_path)
    assert main([str(llama), "--recipe", "dgq", "--plan", *sets(tiny)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    size = (folder / "model.safetensors").stat().st_size
    assert f"({size:,} bytes), exact" in out
    assert re.search(r"3 x model\.layers\.\*\.mlp\.down_proj\s+\[64, 96\]\s+int4_dual group=48\s+int8_token", out)
    assert "kept in float: lm_head" in out
    assert re.search(
        r"kernel on cpu: (cpu_a8w4 for \d+ layers\n|reference for \d+ layers \()", out
    )  # a reason only where none serves
    assert re.search(r"peak memory of the run: about [\d,]+ MB", out)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("LOWBIT_KERNEL", "reference")
    assert main([str(llama), "--recipe", "dgq", "--plan"]) == 0
    assert "kernel on cpu: reference for 22 layers (cpu_" in capfd.readouterr().out


def test_a_run_names_its_folder_after_model_and_recipe(
    llama: Path, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([f"{llama}/", "--recipe", "rtn", *sets(tiny), "--set", "format.bits=3"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert [path.name for path in tmp_path.iterdir()] == [f"{llama.name}-rtn"]
    lines = out.splitlines()
    assert [line[:5] for line in lines[:3]] == ["[1/3]", "[2/3]", "[3/3]"]
    assert "at 3.400 bits per weight" in out  # 3 + 24/64 in four fifths of the weights, 3 + 24/48 in down_proj
    assert f'quant.load("{llama.name}-rtn")' in out
    assert main(["inspect", f"{llama.name}-rtn"]) == 0
    shown, err = capfd.readouterr()
    assert err == ""
    assert "21 packed layers" in shown
    assert "model.layers.*.mlp.down_proj" in shown


def test_quiet_prints_nothing(llama: Path, tiny: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(llama), "--recipe", "rtn", "-o", str(tmp_path / "out"), "--quiet", *sets(tiny)]) == 0
    assert capfd.readouterr() == ("", "")


def test_a_bug_is_a_traceback(llama: Path, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only mistakes of the user are cut down to a line."""

    def broken(*args: object) -> None:
        raise AssertionError("21 != 20")

    monkeypatch.setattr("quant.api.run_blocks", broken)
    with pytest.raises(AssertionError, match="21 != 20"):
        main([str(llama), "--recipe", "rtn", "-o", str(tmp_path / "out"), *sets(tiny)])
    assert not (tmp_path / "out").exists()
    assert cli.main is main
