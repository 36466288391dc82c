"""What users get wrong: each is told in one line on stderr with exit code 2, nothing is lost and nothing is left behind."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import quant
from quant.cli import main

Refuse = Callable[..., str]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="session")
def text(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text."""
    path: Path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.SENTENCE * 30)
    return path


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    """A float model to damage."""
    return Path(shutil.copytree(llama, tmp_path / "source"))


@pytest.fixture
def refuse(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> Refuse:
    """refuse(model, *options): the one line with which the command refuses; the folder for output stays as it was."""

    def run(model: Path | str, *options: Any, recipe: str = "rtn", calib: Path = text, out: Path | None = None) -> str:
        target = out or tmp_path / "out"
        before = sorted(path.name for path in target.parent.iterdir()) if target.parent.is_dir() else []
        args = [model, "--recipe", recipe, "--calib", calib, "-o", target, *short(), *options]
        capfd.readouterr()
        assert main([str(arg) for arg in args]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("quantize: ")
        if target.parent.is_dir():
            assert sorted(path.name for path in target.parent.iterdir()) == before
        return lines[0]

    return run


def short() -> list[str]:
    return ["--set", "calibration.tokens=128", "--set", "calibration.length=64"]


def run(model: Path, text: Path, out: Path) -> int:
    """The command on good input."""
    return main([str(model), "--recipe", "rtn", "--calib", str(text), "-o", str(out), "--quiet", *short()])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "calibration.token=9"], "'tokens'"),
        (["--set", "calibratoin.tokens=9"], "'calibration'"),
        (["--set", "format.groups=32"], "group"),
        (["--set", "format.name=int_grup"], "int_group"),
        (["--set", "format.bits=5"], "2, 3, 4, 6, 8"),
        (["--set", "format.bits=four"], "bits"),
        (["--set", "rtn.damp=1"], "damp"),
        (["--set", "activation=int8_tokens"], "'int8_token'"),
        (["--set", "seed"], "key=value"),
        (["--set", "seed=[1"], "seed=[1"),
        (["--set", "calibration.tokens=0"], "tokens"),
        (["--set", "calibration.length=4000"], "256 positions"),
        (["--threads", "0"], "--threads"),
        (["--recip", "rtn"], "--recipe"),
        (["--device", "gpu"], "'gpu'"),
        (["--device", "meta"], "'meta'"),
        (["--device", "gpu", "--plan"], "'gpu'"),
    ],
)
def test_options(refuse: Refuse, llama: Path, options: list[str], told: str) -> None:
    assert told in refuse(llama, *options)


def test_recipe_names(refuse: Refuse, llama: Path, tmp_path: Path) -> None:
    assert "'dgq'" in refuse(llama, recipe="dgp")
    assert "nowhere.yaml" in refuse(llama, recipe=str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("calibratoin: {tokens: 9}", "did you mean 'calibration'?"),
        ("calibration: {lenght: 9}", "did you mean 'length'?"),
        ("rules: [{match: '*.nope', skip: true}]", "'*.nope' decides no layer"),
        ("rules: [{match: '*', skp: true}]", "did you mean 'skip'?"),
        ("rules: [{match: '*', activation: int8_tokn}]", "did you mean 'int8_token'?"),
        ("rules: [{match: '*', format: {bit: 3}}]", "bits"),
        ("rules: [{match: '*', skip: true}]", "every layer in float"),
        ("rules: [{match: '*.q_proj', format: {bits: 8}}]", "k_proj"),
        ("seed: [", "not valid YAML"),
    ],
)
def test_recipe_files(refuse: Refuse, llama: Path, tmp_path: Path, added: str, told: str) -> None:
    recipe = tmp_path / "mine.yaml"
    base = "name: mine\ndescription: a test\nformat: {name: int_group, bits: 4}\nactivation: none\npasses: [{rtn: }]\n"
    recipe.write_text(base + added + "\n")
    assert told in refuse(llama, recipe=str(recipe))


def test_model_folders(refuse: Refuse, source: Path, tmp_path: Path, text: Path) -> None:
    assert "does not exist" in refuse(tmp_path / "nowhere")
    assert "is a file" in refuse(text)
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "cut short" in refuse(source)
    weights.write_bytes(whole[:50])
    assert "cut short" in refuse(source)
    weights.write_bytes(b"not a model" * 9)
    assert "model.safetensors" in refuse(source)
    weights.unlink()
    assert "no weights" in refuse(source)
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert "pickle" in refuse(source)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ('{"model_type": ', "not valid JSON"),
        ("[]", "list"),
        ("{}", "model_type"),
        ('{"model_type": "nonesuch"}', "nonesuch"),
        ('{"model_type": "llama"}', "architecture none"),
        ('{"model_type": "llama", "architectures": ["Nonesuch"]}', "Nonesuch"),
        ('{"model_type": "llama", "architectures": ["AutoConfig"]}', "AutoConfig"),
        ('{"model_type": "llama", "architectures": 5}', "architecture none"),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_model_configs(refuse: Refuse, source: Path, config: str, told: str) -> None:
    (source / "config.json").write_text(config)
    line = refuse(source)
    assert told in line
    assert "config.json" in line


def test_models_that_do_not_fit_their_config(
    refuse: Refuse, source: Path, tiny: ModuleType, packed: Callable[..., Path]
) -> None:
    tiny.edit_json(source / "config.json", lambda config: config.update(hidden_size=128))
    assert "[320, 64]" in refuse(source)
    tiny.edit_json(source / "config.json", lambda config: config.update(hidden_size=64))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
        kept = (source / "model.safetensors").read_bytes()
        tiny.rewrite(source, lambda tensors, name=name: tensors.pop(name))
        assert name in refuse(source)
        (source / "model.safetensors").write_bytes(kept)
    assert "quantized already" in refuse(packed("rtn"))


def test_tokenizers(refuse: Refuse, source: Path, tiny: ModuleType) -> None:
    (source / "tokenizer.json").write_text("{")
    assert "tokenizer" in refuse(source)
    (source / "tokenizer.json").unlink()
    assert "tokenizer" in refuse(source)
    tiny.tokenizer().save_pretrained(source)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensors[name][:100].clone() for name in ("lm_head.weight", "model.embed_tokens.weight")}

    tiny.rewrite(source, cut)
    tiny.edit_json(source / "config.json", lambda config: config.update(vocab_size=100))
    assert "model has 100" in refuse(source)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers(refuse: Refuse, source: Path, tiny: ModuleType, name: str, value: float) -> None:
    tiny.rewrite(source, lambda tensors: tensors[name].view(-1)[7:8].fill_(value))
    assert name in refuse(source)


@pytest.mark.parametrize(
    ("name", "blamed"),
    [
        (f"{UP}.weight", "model.layers.0.mlp.down_proj"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.mlp.down_proj.weight", "the output of model.layers.0"),
    ],
)
@pytest.mark.parametrize("recipe", ["rtn", "dgq"])
def test_statistics_that_overflow(refuse: Refuse, source: Path, tiny: ModuleType, name: str, blamed: str, recipe: str) -> None:
    tiny.rewrite(source, lambda tensors: tensors[name].fill_(3e38))
    assert blamed in refuse(source, recipe=recipe)


def test_weights_too_large_for_the_format(refuse: Refuse, source: Path, tiny: ModuleType) -> None:
    tiny.rewrite(source, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].mul_(1e10))
    assert "model.layers.0.self_attn.q_proj has weights up to" in refuse(source)


def test_a_late_failure_keeps_the_finished_blocks(source: Path, tiny: ModuleType, text: Path, tmp_path: Path) -> None:
    tiny.rewrite(source, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].view(-1)[7:8].fill_(math.nan))
    assert run(source, text, tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    assert len(json.loads((tmp_path / "out.partial" / "progress.json").read_text())["reports"]) == 2


def test_calibration_files(refuse: Refuse, llama: Path, tmp_path: Path) -> None:
    assert "nowhere.txt" in refuse(llama, calib=tmp_path / "nowhere.txt")
    for number, (content, told) in enumerate(
        [
            (b"", "is empty"),
            (b" \n", "is empty"),
            (b"short", "too short"),
            (bytes(range(256)) * 9, "not UTF-8"),
            (b"a\0b" * 99, "NUL"),
        ]
    ):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content)
        assert told in refuse(llama, calib=path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "good"}\n{"text": bad}\n')
    assert "line 2" in refuse(llama, calib=rows)


def test_speech_without_clips(refuse: Refuse, tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.whisper_folder(tmp_path / "whisper")
    (tmp_path / "clips").mkdir()
    assert "holds no audio" in refuse(model, calib=tmp_path / "clips")
    (tmp_path / "clips" / "a.wav").write_bytes(b"RIFF")
    assert "a.wav" in refuse(model, calib=tmp_path / "clips")


def test_output_that_is_taken(refuse: Refuse, llama: Path, tmp_path: Path, text: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    assert "not empty" in refuse(llama, out=taken)
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    assert (taken / "thesis.txt").read_text() == "years of work"
    before = text.read_bytes()
    assert str(text) in refuse(llama, out=text)
    assert str(text) in refuse(llama, out=text / "below")
    assert text.read_bytes() == before


def test_output_that_cannot_be_written(refuse: Refuse, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    # the tests may run as root, for whom every folder is writable
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != locked)
    assert "locked" in refuse(llama, out=locked / "out")


@pytest.mark.parametrize("limit", [10_000, 60_000])
def test_full_disk(
    llama: Path, text: Path, tmp_path: Path, limit: int, capfd: pytest.CaptureFixture[str], packed_here: dict[str, bytes]
) -> None:
    """A limit on file size stands for the full disk: it stops a real write, in a block (10 kB) or in the final file (60 kB)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        code = run(llama, text, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    lines = capfd.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1), lines
    assert "File too large" in lines[0]
    assert not (tmp_path / "out").exists()
    assert run(llama, text, tmp_path / "out") == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in packed_here} == packed_here
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture(scope="session")
def packed_here(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of an undisturbed `run`."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(llama, text, out) == 0
    return {name: (out / name).read_bytes() for name in ("model.safetensors", "config.json", "recipe.yaml")}


def bad_load(folder: Path) -> str:
    """The one line with which both ways of loading refuse a folder."""
    said = []
    for load in (quant.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r".") as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize(
    ("recipe", "field"),
    [("rtn", "weight_packed"), ("rtn", "weight_scale"), ("rtn", "weight_zero"), ("dgq", "row_scale"), ("dgq", "group_offset")],
)
def test_packed_tensors(packed: Callable[..., Path], tmp_path: Path, tiny: ModuleType, recipe: str, field: str) -> None:
    folder = Path(shutil.copytree(packed(recipe), tmp_path / "packed"))
    good, name = (folder / "model.safetensors").read_bytes(), f"{UP}.{field}"

    def damaged(change: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            value = change(tensors.pop(name))
            if value is not None:
                tensors[name] = value.clone()

        (folder / "model.safetensors").write_bytes(good)
        tiny.rewrite(folder, edit)
        return bad_load(folder)

    assert f"{name} is missing" in damaged(lambda t: None)
    assert f"{name} is torch" in damaged(lambda t: t[1:])
    assert f"{name} is torch.int32" in damaged(lambda t: t.to(torch.int32))
    if field.endswith("scale"):
        assert f"{name} holds a NaN" in damaged(lambda t: torch.full_like(t, math.nan))
    if field == "group_offset":
        assert f"{UP}.group_scale and group_offset" in damaged(lambda t: torch.full_like(t, 127))


def test_packed_folders(packed: Callable[..., Path], tmp_path: Path, tiny: ModuleType) -> None:
    folder = Path(shutil.copytree(packed("rtn"), tmp_path / "packed"))
    config, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()

    def section(change: Callable[[dict[str, Any]], Any]) -> str:
        (folder / "config.json").write_text(config)
        tiny.edit_json(folder / "config.json", lambda values: change(values["quantization_config"]))
        return bad_load(folder)

    assert "version 2" in section(lambda s: s.update(version=2))
    assert "no rules" in section(lambda s: s.update(rules=[]))
    assert "int_grup" in section(lambda s: [rule["format"].update(name="int_grup") for rule in s["rules"]])
    assert "packed on disk" in section(lambda s: s["rules"].pop())
    (folder / "config.json").write_text(config[:-9])
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        quant.load(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="cut short"):
        quant.load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    tiny.rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing"):
        quant.load(folder)
