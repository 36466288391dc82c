"""Block-wise training: the loss falls on samples it does not train on and never rises, a rate of 0 leaves every byte."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import quant
from quant.calibrate import Sample, advance, catch
from quant.kernels.activation import from_config as activation_from
from quant.kernels.format import from_config as format_from
from quant.kernels.rotation import by_matrix
from quant.linear import PackedLinear
from quant.passes.blockwise import Pass
from quant.stacks import find_stacks
from quant.train.block import PackedBlock, Rates, Reconstruction, Schedule, relative_error
from quant.train.saliency import Saliency

RATES = Rates(codes=0.03, scales=5e-3, vectors=1e-3)
STEPS = Schedule(steps=40, windows=2, held=4, looks=4, patience=4, seed=0)
SCHEMES: dict[str, tuple[dict[str, Any], Any]] = {
    "w2": ({"name": "int_group", "bits": 2, "group": 32}, "none"),
    "w3-symmetric-rotated": ({"name": "int_group", "bits": 3, "group": 32, "symmetric": True}, {"name": "none", "rotate": 32}),
    "w4a4-dual": ({"name": "int4_dual", "group": 32}, {"name": "int4_group", "group": 32, "rotate": 32}),
    "mxfp4": ({"name": "fp4_block", "kind": "mxfp4"}, "none"),
}


def block_of(tiny: ModuleType, scheme: str = "w2", seed: int = 0) -> PackedBlock:
    """The first block of a tiny Llama, rounded to nearest, its inputs a little off those of the float chain."""
    model: Any = tiny.llama(layers=1).float().requires_grad_(False)
    block, name = model.model.layers[0], "model.layers.0"
    fmt, activation = (read(config) for read, config in zip((format_from, activation_from), SCHEMES[scheme], strict=True))
    draw = torch.Generator().manual_seed(seed)
    samples = [Sample({"input_ids": torch.randint(0, tiny.WORDS, (4, 48), generator=draw)}) for _ in range(24)]
    chain = catch(model, find_stacks(model), 0, samples, [])
    inputs = [h + 0.02 * h.std() * torch.randn(h.shape, generator=draw) for h in chain.hidden]
    advance(block, chain)
    outputs, chain.hidden = chain.hidden, inputs
    packed = PackedBlock(name, block, chain, outputs, samples)
    for leaf, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            weight = by_matrix(module.weight.detach(), activation.rotate)
            fields = fmt.pack(fmt.nearest(weight))
            layer = PackedLinear.from_fields(fields, fmt, activation, *weight.shape, None)
            packed.layers[f"{name}.{leaf}"], packed.weights[f"{name}.{leaf}"] = layer, weight
            packed.put(f"{name}.{leaf}", layer)
    return packed


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_the_loss_falls_on_held_out_samples(scheme: str, tiny: ModuleType) -> None:
    block = block_of(tiny, scheme)
    training = Reconstruction(block, RATES)
    outcome = training.fit(STEPS)
    assert training.look(STEPS.held) == pytest.approx(min(outcome.held), rel=1e-5)
    assert min(outcome.held) < (0.7 if scheme == "w2" else 0.97) * outcome.held[0]
    assert outcome.codes > 0 or scheme == "w4a4-dual"  # at 4 bits scales and norms got furthest before any code moved
    assert outcome.skipped == 0
    training.finish()
    for layer in block.layers.values():
        layer.require_valid("layer")
    served = [block.inputs.output(block.module, i) for i in range(20, 24)]  # by the packed layers themselves
    lost = [float(relative_error(y, block.outputs[20 + i], None)) for i, y in enumerate(served)]
    assert sum(lost) / 4 == pytest.approx(min(outcome.held), rel=0.02)


@torch.no_grad()
def test_a_harmful_rate_ends_where_it_began(tiny: ModuleType) -> None:
    block = block_of(tiny)
    before = {name: {k: v.clone() for k, v in layer.fields().items()} for name, layer in block.layers.items()}
    training = Reconstruction(block, Rates(codes=30.0, scales=0, vectors=0))
    outcome = training.fit(STEPS)
    training.finish()
    assert min(outcome.held[1:]) > outcome.held[0]
    assert len(outcome.held) == 1 + STEPS.patience
    assert all(
        torch.equal(value, before[name][k]) for name, layer in block.layers.items() for k, value in layer.fields().items()
    )


@torch.no_grad()
def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(tiny: ModuleType) -> None:
    block = block_of(tiny)
    block.outputs[3][0, 5, 7] = torch.nan  # of a sample that is trained on
    outcome = Reconstruction(block, RATES).fit(STEPS)
    assert outcome.skipped == sum(loss != loss for loss in outcome.losses) == 4  # once in each round over 20 samples
    assert min(outcome.held) < 0.8 * outcome.held[0]


@torch.no_grad()
def test_the_gradient_of_norms_and_scales_is_that_of_the_loss(tiny: ModuleType) -> None:
    training = Reconstruction(block_of(tiny), Rates(codes=0, scales=1, vectors=1), same=0.5)
    training.gradient([0, 1], None)
    norm = training.vectors["model.layers.0.input_layernorm.weight"]
    wanted, step = float(norm.grad[5]), 1e-2
    found = []
    for sign in (1, -1):
        norm[5] += sign * step
        found.append(sum(float(training.error(i)) for i in (0, 1)) / 2)
        norm[5] -= sign * step
    assert wanted == pytest.approx((found[0] - found[1]) / (2 * step), rel=0.02)
    for layer in training.layers.values():
        (theta,) = layer.theta.values()
        by_group = (layer.dense.grad * layer.dense).view(*theta.shape, -1).sum(-1)  # W is linear in its scale
        assert torch.allclose(theta.grad, by_group, rtol=2e-3, atol=1e-6)


def test_every_token_counts_the_same_however_large_it_is() -> None:
    draw = torch.Generator().manual_seed(0)
    wanted, found = torch.randn(2, 6, 8, generator=draw), torch.randn(2, 6, 8, generator=draw)
    plain = relative_error(found, wanted, None)
    size = torch.ones(2, 6, 1)
    size[0, 0] = 1000.0
    assert torch.allclose(relative_error(found * size, wanted * size, None), plain)
    assert float(relative_error(wanted, wanted, None)) == 0.0
    seen = torch.ones(2, 6)
    seen[:, 4:] = 0
    assert torch.allclose(relative_error(found, wanted, seen), relative_error(found[:, :4], wanted[:, :4], None))


@torch.no_grad()
def test_the_same_input_term_is_zero_for_the_float_weights(tiny: ModuleType) -> None:
    training = Reconstruction(block_of(tiny, "w4a4-dual"), RATES, same=1.0)
    for index, wanted in enumerate(training.same_input):
        assert not torch.equal(wanted, training.block.outputs[index])
    names = {name: module for name, module in training.block.module.named_modules()}
    assert all(f"{name}".removeprefix("model.layers.0.") in names for name in training.layers)
    model: Any = tiny.llama(layers=1).float()
    exact = training.block.inputs.output(model.model.layers[0], 3)
    assert float(relative_error(training.same_input[3], exact, None)) < 1e-8


@torch.no_grad()
def test_a_penalty_keeps_weights_that_count(tiny: ModuleType) -> None:
    def felt_error(share: float) -> tuple[float, float]:
        block = block_of(tiny)
        draw = torch.Generator().manual_seed(3)
        fisher = {name: torch.rand(w.shape, generator=draw) ** 8 for name, w in block.weights.items()}
        training = Reconstruction(block, Rates(codes=0.03, scales=5e-3, vectors=0))
        penalty = Saliency(fisher, block.weights, share)
        loss = training.fit(STEPS, penalty).held[0]
        first = penalty.lam
        return penalty.value(training.layers), first * loss

    free, _ = felt_error(0.0)
    held, _ = felt_error(3.0)
    assert held < free


def recipe(folder: Path, tuner: str, options: dict[str, Any] | None) -> str:
    passes = [{"gptq": None}, *([] if options is None else [{tuner: options}])]
    text = {"name": "t", "description": "t", "format": SCHEMES["w2"][0], "activation": "none", "passes": passes}
    file = folder / f"{tuner}-{len(list(folder.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(text))
    return str(file)


@pytest.fixture(scope="module")
def small(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks."""
    folder: Path = tiny.llama_folder(tmp_path_factory.mktemp("small") / "float", layers=2)
    return folder


QUICK_BLOCKS = {"steps": 6, "held": 2, "codes": 0.001}
QUICK = {**QUICK_BLOCKS, "samples": 2}


def bytes_of(small: Path, tiny: ModuleType, out: Path, file: str) -> bytes:
    quant.quantize(str(small), file, out, overrides=tiny.SMALL)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("still", [{"steps": 2, "codes": 0, "scales": 0, "vectors": 0}, {"steps": 0}])
def test_without_rates_or_steps_every_byte_stays(still: dict[str, Any], small: Path, tiny: ModuleType, tmp_path: Path) -> None:
    plain = bytes_of(small, tiny, tmp_path / "plain", recipe(tmp_path, "blockwise", None))
    still = still | {"held": 2}
    assert bytes_of(small, tiny, tmp_path / "still", recipe(tmp_path, "blockwise", still)) == plain


def test_no_share_of_saliency_is_plain_reconstruction_and_some_is_not(small: Path, tiny: ModuleType, tmp_path: Path) -> None:
    plain = {name: value for name, value in QUICK.items() if name != "samples"}
    found = [
        bytes_of(small, tiny, tmp_path / "a", recipe(tmp_path, "blockwise", plain)),
        bytes_of(small, tiny, tmp_path / "b", recipe(tmp_path, "saliency", QUICK | {"share": 0})),
        bytes_of(small, tiny, tmp_path / "c", recipe(tmp_path, "saliency", QUICK | {"share": 10})),
    ]
    assert found[0] == found[1] != found[2]


def test_a_killed_run_ends_with_the_same_bytes_and_memory_does_not_grow(
    small: Path, tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tune, alive = recipe(tmp_path, "saliency", QUICK), Pass.tune, []

    def live_bytes() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"]
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def watched(self: Pass, block: PackedBlock, folder: Path, _: None) -> Any:
        found = tune(self, block, folder, None)
        alive.append(live_bytes())
        return found

    monkeypatch.setattr(Pass, "tune", watched)
    whole = bytes_of(small, tiny, tmp_path / "whole", file)
    assert len(alive) == 2
    assert max(alive) < 1.02 * alive[0]

    def killed(self: Pass, block: PackedBlock, folder: Path, _: None) -> Any:
        if block.name.endswith("1"):
            raise KeyboardInterrupt
        return tune(self, block, folder, None)

    monkeypatch.setattr(Pass, "tune", killed)
    with pytest.raises(KeyboardInterrupt):
        bytes_of(small, tiny, tmp_path / "out", file)
    monkeypatch.setattr(Pass, "tune", tune)
    monkeypatch.setattr("quant.fisher.fisher_diagonals", None)  # measured before, not again
    assert bytes_of(small, tiny, tmp_path / "out", file) == whole
    blocks = json.loads((tmp_path / "out" / "report.json").read_text())["blocks"]
    assert all(len(block["trained"]) == 1 for block in blocks)


def test_a_block_in_float_is_passed_over(small: Path, tiny: ModuleType, tmp_path: Path) -> None:
    skip = "rules=[{match: '*.layers.0.*', skip: true}]"
    quant.quantize(str(small), recipe(tmp_path, "blockwise", QUICK_BLOCKS), tmp_path / "out", overrides=[*tiny.SMALL, skip])
    first, second = json.loads((tmp_path / "out" / "report.json").read_text())["blocks"]
    assert first["trained"] == []
    assert second["trained"][0]["steps"] == 6


def test_what_cannot_be_trained_is_one_line(small: Path, tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training of blocks keeps 50 samples to measure on"):
        bytes_of(small, tiny, tmp_path / "a", recipe(tmp_path, "blockwise", {"held": 50}))
    file = Path(recipe(tmp_path, "saliency", {}))
    file.write_text(file.read_text().replace("passes:", "passes:\n- smooth: {}"))
    with pytest.raises(ValueError, match="saliency measures the weights of the checkpoint"):
        bytes_of(small, tiny, tmp_path / "b", str(file))
