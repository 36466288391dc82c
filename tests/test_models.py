"""Folders, hub ids and tensors by name: what is read is exact, and what cannot be used is refused in one line."""

from __future__ import annotations

import json
import struct
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from quant.models import INDEX, Weights, index, resolve

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.randn(3, 5), "b": torch.randn(4, 2).bfloat16()},
    "model-00002-of-00002.safetensors": {
        "c": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "none": torch.empty(0, 4, dtype=torch.float16),
        "flags": torch.tensor([True, False]),
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded model folder."""
    for file, tensors in SHARDS.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in SHARDS.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return tmp_path


def refusal(model: str | Path) -> str:
    """The one line with which `resolve` refuses `model`."""
    with pytest.raises(ValueError, match=r".") as caught:
        resolve(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_weights_match_what_was_saved(folder: Path) -> None:
    weights = Weights(resolve(str(folder)))
    saved = {name: tensor for tensors in SHARDS.values() for name, tensor in tensors.items()}
    assert sorted(weights.names()) == sorted(saved)
    for name, tensor in saved.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == tensor.dtype
        assert weights.bytes_of(name) == tensor.nbytes
        got = weights.read(name)
        assert got.dtype == tensor.dtype
        assert got.shape == tensor.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_read_is_a_copy_that_outlives_the_file(folder: Path) -> None:
    weights = Weights(folder)
    first = weights.read("a")
    first.zero_()
    again = weights.read("a")
    assert torch.equal(again, SHARDS["model-00001-of-00002.safetensors"]["a"])
    for file in SHARDS:
        (folder / file).write_bytes(b"\0" * (folder / file).stat().st_size)
    assert torch.equal(again, SHARDS["model-00001-of-00002.safetensors"]["a"])


def test_unknown_tensor_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no tensor missing\.weight"):
        Weights(folder).read("missing.weight")


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in refusal(str(tmp_path / "absent"))
    assert "does not exist" in refusal("neither folder nor id")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refusal(str(tmp_path / "file"))


def test_unknown_demo_offers_the_nearest() -> None:
    assert "demo:whisper-tiny.en" in refusal("demo:whisper-tiny")
    assert "demo:smollm2-135m" in refusal("demo:smollm")


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_folder_with_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(folder)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "has no weights" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt", "w.pth"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["WhisperForConditionalGeneration"]}')
    (tmp_path / name).write_bytes(b"\x80\x02.")
    message = refusal(tmp_path)
    assert name in message
    assert "import WhisperForConditionalGeneration" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_shard_cut_short_is_named(folder: Path, keep: int) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert shard.name in refusal(folder)


def test_missing_shards_are_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(folder)
    assert "lacks 1 of 2 shards" in message
    assert "model-00002-of-00002.safetensors" in message


def test_index_may_not_leave_the_folder(folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    (inside / "config.json").write_text("{}")
    (inside / INDEX).write_text(json.dumps({"weight_map": {"a": "../model-00001-of-00002.safetensors"}}))
    assert "weight_map" in refusal(inside)


def test_index_that_names_a_tensor_nobody_holds(folder: Path) -> None:
    listing = json.loads((folder / INDEX).read_text())
    listing["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(listing))
    assert "ghost" in refusal(folder)


@pytest.mark.parametrize(
    "info",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
)
def test_headers_that_do_not_add_up(tmp_path: Path, info: object) -> None:
    header = json.dumps({"w": info}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    assert "model.safetensors" in refusal(tmp_path)


def test_single_file_wins_over_other_copies(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert index(tmp_path)["a"].file.name == "model.safetensors"


def test_hub_download_takes_no_code_and_no_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("org/some-model_1.5") == folder
    assert asked["name"] == "org/some-model_1.5"

    def taken(file: str) -> bool:
        allowed = any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])
        return allowed and not any(fnmatch(file, pattern) for pattern in asked["ignore_patterns"])

    wanted = ["config.json", "model-00001-of-00002.safetensors", INDEX, "tokenizer.json", "merges.txt", "tokenizer.model"]
    assert all(taken(file) for file in [*wanted, "chat_template.jinja", "generation_config.json"])
    refused = ["pytorch_model.bin", "modeling_x.py", "model.pt", "onnx/model.onnx", "original/consolidated.safetensors"]
    assert not any(taken(file) for file in [*refused, "consolidated.safetensors"])


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, **options: object) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    message = refusal("org/model")
    assert "cannot be reached" in message
    assert "demo:" in message
