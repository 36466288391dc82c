"""The artifact: files that safetensors reads, sizes known beforehand, rules that give back each layer's scheme."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant.checkpoint import (
    Piece,
    check_layers,
    header,
    index_text,
    predicted_bytes,
    quantization_config,
    read_config,
    safe_name,
    scheme_of,
    shards,
    write,
)
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.models import read_header
from quant.targets import Target


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(7, 3),
        "a.codes": torch.randint(0, 255, (5, 9), dtype=torch.uint8),
        "a.scale": torch.randn(5, 1).half(),
        "größe": torch.randn(2, 2).bfloat16(),
        "step": torch.tensor(3),
        "none": torch.empty(0, dtype=torch.uint8),
        "f8": torch.randn(3, 3).to(torch.float8_e4m3fn),
    }


def pieces(folder: Path, given: dict[str, Tensor]) -> list[Piece]:
    """Pieces whose bytes lie in a safetensors file of another order."""
    save_file(given, folder / "blocks")
    return [Piece(name, e.dtype, e.shape, e) for name, e in read_header(folder / "blocks").items()]


@pytest.mark.parametrize("limit", [40, 100, 1 << 30])
def test_written_files_hold_the_tensors(tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "__defaults__", (limit,))
    given = tensors()
    made = pieces(tmp_path, given)
    write(tmp_path, made)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert sorted(found) == sorted(given)
    for name, value in given.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
    assert sum(file.stat().st_size for file in files) == predicted_bytes(made)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if limit == 1 << 30:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        assert set(json.loads(index.read_text())["weight_map"].values()) == {file.name for file in files}
        assert all(sum(p.nbytes for p in group) <= limit for _, group in shards(made, limit) if len(group) > 1)
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_order_of_tensors_does_not_change_the_bytes(tmp_path: Path) -> None:
    made = pieces(tmp_path, tensors())
    first = header(made)[0]
    random.Random(0).shuffle(made)
    assert header(made)[0] == first
    assert len(first) % 8 == 0
    widths = [piece.dtype.itemsize for piece in header(made)[1]]
    assert widths == sorted(widths, reverse=True)  # each tensor begins at a multiple of its own width


def test_a_plan_without_bytes_knows_its_size(tmp_path: Path) -> None:
    made = pieces(tmp_path, tensors())
    planned = [Piece(p.name, p.dtype, p.shape) for p in made]
    assert predicted_bytes(planned) == predicted_bytes(made)
    assert index_text(shards(planned)) is None
    with pytest.raises(AssertionError, match="never written"):
        write(tmp_path, planned)


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    made = pieces(tmp_path, tensors())
    (tmp_path / "blocks").write_bytes((tmp_path / "blocks").read_bytes()[:-4])
    with pytest.raises(ValueError, match="ended early"):
        write(tmp_path, made)


FORMATS = (IntGroup(bits=4, group=32), IntGroup(bits=8, group=-1, symmetric=True), Int4Dual(group=64), Int4Dual(group=32))


def layers(draw: random.Random, names: Sequence[str]) -> tuple[dict[str, Target], list[str]]:
    """A scheme for most names, the rest kept in float; neighbours often agree."""
    found, kept = {}, []
    usual = draw.choice(FORMATS)
    for name in names:
        if draw.random() < 0.15:
            kept.append(name)
            continue
        fmt = usual if draw.random() < 0.8 else draw.choice(FORMATS)
        found[name] = Target(
            name, 64, 64, False, fmt, draw.choice((Unquantized(), Int8Token())) if draw.random() < 0.1 else Unquantized()
        )
    return found, kept


@pytest.mark.parametrize("seed", range(30))
def test_rules_give_back_every_scheme(seed: int) -> None:
    """Also where `*` reaches over dots: `layers.*.fc` must not swallow `layers.0.experts.3.fc`."""
    leaves = ["fc", "up_proj", "attn.q_proj", "experts.0.fc", "experts.1.fc", "experts.1.up_proj"]
    names = [f"model.{stack}.{i}.{leaf}" for stack in ("layers", "decoder.layers") for i in range(4) for leaf in leaves]
    targets, kept = layers(random.Random(seed), names)
    section = quantization_config(targets, [n for n in kept])
    section = json.loads(json.dumps(section))
    for name, target in targets.items():
        assert scheme_of(section, name) == (target.format, target.activation)
    for name in kept:
        assert scheme_of(section, name) is None


def test_equal_layers_share_one_rule() -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(40)]
    targets = {name: Target(name, 64, 64, False, FORMATS[0], Unquantized()) for name in names}
    assert [rule["match"] for rule in quantization_config(targets, [])["rules"]] == ["model.layers.*.mlp.up_proj"]


def test_check_layers_follows_renamed_models(tmp_path: Path) -> None:
    """A checkpoint of the bare base model lacks the leading component; a layer that lost its codes is still missed."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.head = nn.Linear(64, 32), nn.Linear(64, 8)

    model = nn.ModuleDict({"model": Inner()})
    fmt = FORMATS[0]
    fields = fmt.pack(fmt.nearest(torch.randn(32, 64)))
    stored = {f"up_proj.{name}": value for name, value in fields.items()} | {"head.weight": torch.randn(8, 64)}
    section = quantization_config({"up_proj": Target("model.up_proj", 32, 64, True, fmt, Unquantized())}, [])
    save_file(stored, tmp_path / "all")
    assert check_layers(section, read_header(tmp_path / "all"), model) == {"model.up_proj"}
    for name in fields:
        save_file({k: v for k, v in stored.items() if k != f"up_proj.{name}"}, tmp_path / "some")
        with pytest.raises(ValueError, match=rf"up_proj\.{name} is missing"):
            check_layers(section, read_header(tmp_path / "some"), model)
    save_file({**stored, "other.weight_packed": torch.zeros(2, 2)}, tmp_path / "more")
    with pytest.raises(ValueError, match="other is packed on disk"):
        check_layers(section, read_header(tmp_path / "more"), model)


def test_read_config(tmp_path: Path) -> None:
    def refusal(text: str) -> str:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r".") as caught:
            read_config(tmp_path)
        return str(caught.value)

    with pytest.raises(ValueError, match=r"no config\.json"):
        read_config(tmp_path)
    assert "not valid JSON" in refusal("{")
    assert "list" in refusal("[]")
    assert "not written by quantize" in refusal("{}")
    assert "not written by quantize" in refusal('{"quantization_config": {"quant_method": "gptq"}}')
    ours = {"quant_method": "lowbit", "version": 1, "rules": [{}]}
    assert "version 2" in refusal(json.dumps({"quantization_config": ours | {"version": 2}}))
    assert "version None" in refusal('{"quantization_config": {"quant_method": "lowbit"}}')
    assert "no rules" in refusal(json.dumps({"quantization_config": ours | {"rules": {}}}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": ours | {"later": "addition"}}))
    assert read_config(tmp_path)["quantization_config"]["later"] == "addition"


def test_safe_name() -> None:
    assert safe_name("org/Model v1.5: final?") == "org-Model-v1.5-final"
    assert safe_name("../..") == ""
