"""Stacks are found in the order they run; names in memory meet names on disk even when they differ by a prefix."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from quant.naming import match_names
from quant.stacks import disk_layers, disk_names, empty_model, find_stacks


def test_stacks_of_both_families(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    (stack,) = find_stacks(empty_model(llama))
    assert (stack.name, stack.blocks) == ("model.layers", ("model.layers.0", "model.layers.1", "model.layers.2"))
    whisper = empty_model(tiny.whisper_folder(tmp_path))
    assert [s.name for s in find_stacks(whisper)] == ["model.encoder.layers", "model.decoder.layers"]


def test_only_outermost_lists_of_one_class_with_linears_count() -> None:
    def block() -> nn.Module:
        out = nn.Sequential(nn.Linear(4, 4))
        out.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        return out

    model = nn.Module()
    model.convs = nn.ModuleList([nn.Conv1d(1, 1, 1)])
    model.norms = nn.ModuleList([nn.LayerNorm(4)])
    model.mixed = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)])
    model.none = nn.ModuleList()
    with pytest.raises(ValueError, match="nothing to quantize"):
        find_stacks(model)
    model.blocks = nn.ModuleList([block() for _ in range(3)])
    (stack,) = find_stacks(model)
    assert stack.blocks == ("blocks.0", "blocks.1", "blocks.2")


def test_an_empty_model_has_no_weights_but_its_buffers(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    model, real = empty_model(llama), tiny.llama()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in real.named_parameters()}
    buffers = dict(real.named_buffers())
    assert buffers
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer, buffers[name].float(), rtol=1e-2), name
    assert not model.training
    for file in llama.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tiny.edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config={"quant_method": "lowbit"}))
    with pytest.raises(ValueError, match="quantized already"):
        empty_model(tmp_path)


def test_equal_names_win_then_the_longest_unique_tail() -> None:
    stored = ["model.a.weight", "a.weight", "x.model.b.weight", "c.0.weight", "d.0.weight", "p.q.r.weight", "s.q.r.weight"]
    found = match_names(
        ["model.a.weight", "b.weight", "z.c.0.weight", "e.0.weight", "q.r.weight", "new.weight"], stored, least=2
    )
    assert found == {"model.a.weight": "model.a.weight", "b.weight": "x.model.b.weight", "z.c.0.weight": "c.0.weight"}


def test_a_checkpoint_of_the_bare_model_still_fits(tiny: ModuleType) -> None:
    model = tiny.llama(tied=True)
    names = [name for name, _ in model.named_parameters()]
    found = disk_names(model, [name.removeprefix("model.") for name in names])
    assert found == {name: name.removeprefix("model.") for name in names}
    assert disk_names(model, names) == {name: name for name in names}


def test_packed_layers_are_found_in_the_headers(tmp_path: Path) -> None:
    save_file(
        {"language.layers.0.q.weight_packed": torch.zeros(1), "language.layers.0.norm.weight": torch.zeros(1)},
        tmp_path / "a.safetensors",
    )
    save_file({"language.layers.1.q.weight_packed": torch.zeros(1)}, tmp_path / "b.safetensors")
    layers = ["model.layers.0.q", "model.layers.1.q", "model.layers.2.q"]
    found = disk_layers(nn.Module(), layers, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert found == {"model.layers.0.q": "language.layers.0.q", "model.layers.1.q": "language.layers.1.q"}
