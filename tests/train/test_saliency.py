"""The penalty of salient weights: its value, its gradient, its size before training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels.activations.none import Unquantized
from quant.kernels.formats.int_group import IntGroup
from quant.linear import PackedLinear
from quant.train.layer import Trained
from quant.train.saliency import Saliency, normalized


def made(fisher: Tensor, share: float = 0.5) -> tuple[Saliency, dict[str, Trained], Tensor]:
    draw, fmt = torch.Generator().manual_seed(0), IntGroup(bits=2, group=32)
    weight = torch.randn(8, 64, generator=draw)
    layer = Trained(PackedLinear.from_fields(fmt.pack(fmt.nearest(weight)), fmt, Unquantized(), 8, 64, None))
    layer.refresh(torch.float32)
    return Saliency({"w": fisher}, {"w": weight}, share), {"w": layer}, weight


def test_of_equal_weights_it_is_the_mean_square_and_it_begins_as_its_share_of_the_loss() -> None:
    penalty, layers, weight = made(torch.ones(8, 64))
    mean = float((layers["w"].dense.detach() - weight).square().mean())
    assert penalty.value(layers) == pytest.approx(mean)
    penalty.begin(layers, 0.08)
    assert penalty.lam * penalty.value(layers) == pytest.approx(0.5 * 0.08)


def test_its_gradient_is_that_of_the_formula_and_adds_up() -> None:
    fisher = torch.rand(8, 64, generator=torch.Generator().manual_seed(1))
    fisher[3] = 0
    penalty, layers, weight = made(fisher)
    penalty.begin(layers, 1.0)
    layer = layers["w"]
    value = penalty.lam * (fisher * (layer.dense - weight).square()).sum() / fisher.numel()
    (wanted,) = torch.autograd.grad(value, layer.dense)
    penalty.add_gradient(layers)
    assert torch.allclose(layer.dense.grad, wanted)
    assert not layer.dense.grad[3].any()
    layer.collect()
    theta = layer.theta["weight_scale"].grad
    assert not theta[3].any()
    assert theta[2].all()
    penalty.add_gradient(layers)
    assert torch.allclose(layer.dense.grad, 2 * wanted)


def test_normalizing_keeps_zeros_caps_the_tail_and_makes_the_common_mean_one() -> None:
    draw = torch.Generator().manual_seed(2)
    fisher = {"a": torch.rand(8, 64, generator=draw), "b": 5 * torch.rand(8, 64, generator=draw)}
    fisher["a"][0, 0], fisher["b"][1, 1] = 1e6, 0
    found = normalized(fisher, 0.99)
    assert sum(float(f.mean()) for f in found.values()) == pytest.approx(2, rel=1e-5)
    assert float(found["b"][1, 1]) == 0
    assert float(found["a"].max()) < 3
    assert float(found["b"].mean() / found["a"].mean()) == pytest.approx(5, rel=0.15)
