"""A side path of low rank: the best one by the calibration data, better than none, served and trained as part of its weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import quant
from quant.kernels.activations.none import Unquantized
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.formats.low_rank import SIDE, LowRank
from quant.linear import PackedLinear
from quant.low_rank import cholesky, decide_beside, fitted
from quant.passes import gptq
from quant.train.latent import Latent

BASE = {"name": "int_group", "bits": 2, "group": 32}


def test_the_side_path_is_the_best_of_its_rank_for_the_inputs(make_layer: Callable[..., Any]) -> None:
    weight, stats = (layer := make_layer()).weight, layer.stats
    lost = weight * 0.1
    root = cholesky(stats.gram)
    left, right = fitted(lost, root, 4)

    def error(product: torch.Tensor) -> float:
        return float(((lost - product) @ root).square().sum())

    sizes = torch.linalg.svdvals(lost @ root).square()
    assert error(left @ right) == pytest.approx(float(sizes[4:].sum()), rel=1e-3)
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        moved = (left + 0.01 * left.norm() * torch.randn(left.shape, generator=draw)) @ right
        assert error(moved) > error(left @ right)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-3)


def test_more_rank_loses_less(make_layer: Callable[..., Any]) -> None:
    weight, stats = (layer := make_layer()).weight, layer.stats
    base = IntGroup(bits=2, group=32)
    lost = weight - base.dequantize(gptq.Pass().quantize(weight, stats, base))
    errors = [float((lost @ stats.gram * lost).sum())]
    for rank in (2, 8):
        fmt = LowRank(rank=rank, base=base)
        codes, inputs = decide_beside(gptq.Pass(), weight, stats, fmt, Unquantized())
        lost = weight - fmt.dequantize(codes)
        errors.append(float((lost @ stats.gram * lost).sum()))
        assert not inputs
    assert errors[2] < errors[1] < 0.98 * errors[0]


def test_it_is_packed_trained_and_served(llama: Path, tiny: ModuleType, tmp_path: Path) -> None:
    passes = [
        {"gptq": None},
        {"blockwise": {"steps": 8, "held": 2, "looks": 4}},
        {"distill": {"steps": 4, "windows": 1, "held": 2}},
    ]
    kept = {}
    for rank, fmt in ((0, BASE), (4, {"name": "low_rank", "rank": 4, "base": BASE})):
        text = {
            "name": f"r{rank}",
            "description": "t",
            "format": fmt,
            "activation": {"name": "none", "rotate": 32},
            "passes": passes,
        }
        file = tmp_path / f"r{rank}.yaml"
        file.write_text(yaml.safe_dump(text))
        model = quant.quantize(str(llama), str(file), tmp_path / f"out{rank}", overrides=tiny.SMALL)
        report = json.loads((tmp_path / f"out{rank}" / "report.json").read_text())
        kept[rank] = report["totals"]["packed_bits_per_weight"], sum(b["layers"][0]["error"] for b in report["blocks"])
    assert kept[4][0] > kept[0][0] + 1
    assert kept[4][1] < kept[0][1]
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    ids = torch.arange(20).view(1, -1)
    found = model(ids).logits
    assert {layer.kernel.name for layer in layers} == {"side_path"}
    assert torch.allclose(found, model.dequantize()(ids).logits, rtol=0.05, atol=0.05)


def test_training_moves_codes_and_both_matrices_by_the_gradient_of_the_weight() -> None:
    fmt = LowRank(rank=3, base=IntGroup(bits=2, group=32))
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)) * 0.05
    packed = PackedLinear.from_fields(fmt.pack(fmt.nearest(weight)), fmt, Unquantized(), 24, 96, None)
    layer = Latent(packed)
    layer.refresh(torch.float32)
    first, codes = layer.dense.detach().clone(), layer.codes.clone()
    assert layer.settle() == 0
    grad = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    layer.dense.grad = grad
    layer.collect()
    side_in, side_out = (layer.start[name].float() for name in SIDE)
    sizes = [float(t.square().mean().sqrt()) for t in (side_in, side_out)]
    assert torch.allclose(layer.theta["side_in"].grad, sizes[0] * side_out.T @ grad, rtol=1e-3, atol=1e-6)
    assert torch.allclose(layer.theta["side_out"].grad, sizes[1] * grad @ side_in.T, rtol=1e-3, atol=1e-6)
    assert torch.allclose(layer.steps.grad, grad * layer.spread(fmt.base.steps(layer.start)))
    with torch.no_grad():
        layer.theta["side_in"] -= 0.1
    assert layer.settle() == 0  # codes follow their latents, not what the side path does
    layer.refresh(torch.float32)
    assert not torch.allclose(layer.dense, first)
    layer.steps.data -= grad
    layer.hold()
    assert layer.settle() > 0
    assert not torch.equal(layer.codes, codes)
