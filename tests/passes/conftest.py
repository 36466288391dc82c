"""A layer with the inputs that real layers have: correlated channels, a few of them far larger than the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quant.calibrate import Chain, Sample, capture, catch
from quant.folds import BlockView
from quant.kernels.activations.int_token import Int8Token
from quant.kernels.formats.int_group import IntGroup
from quant.stacks import find_stacks
from quant.stats import InputStats


@dataclass
class Layer:
    """weight [N, K], inputs x of the quantized chain and x_float of the float chain [T, K], their statistics."""

    weight: Tensor
    x: Tensor
    x_float: Tensor
    stats: InputStats

    def output_error(self, weight: Tensor) -> float:
        """||X (W - weight)^T|| / ||X W^T|| in float64."""
        x, w = self.x.double(), self.weight.double()
        return float((x @ (w - weight.double()).T).norm() / (x @ w.T).norm())


@pytest.fixture
def make_layer() -> Callable[..., Layer]:
    def make(n: int = 24, k: int = 128, tokens: int = 400, seed: int = 0, skew: float = 1.0, drift: float = 0.05) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(n + 2 * tokens + k + 1, k, generator=generator)
        weight, noise, other, mixing, size = normal.split([n, tokens, tokens, k, 1])
        weight = weight / normal[n : 2 * n].abs().clamp_min(0.4).sqrt()  # heavy tails
        x = (noise @ (torch.eye(k) + mixing / k**0.5)) * (skew * size).exp()
        x_float = x + drift * x.std(0) * other + drift * x.roll(1, 1)
        stats = InputStats.empty(k, torch.device("cpu"), drift=True)
        stats.add(x.unsqueeze(0), x_float.unsqueeze(0), None)
        stats.finish()
        return Layer(weight * 0.05, x, x_float, stats)

    return make


@pytest.fixture
def view(tiny: ModuleType) -> Callable[[], BlockView]:
    """A Llama block with one outlier channel in each norm's output."""

    def make() -> BlockView:
        model: Any = tiny.llama(layers=1).float().requires_grad_(False)
        block, name = model.model.layers[0], "model.layers.0"
        block.input_layernorm.weight[7], block.post_attention_layernorm.weight[3] = 40, 20
        chain = catch(model, find_stacks(model), 0, [Sample({"input_ids": torch.randint(0, 320, (2, 20))})], [])
        targets = [f"{name}.{leaf}" for leaf, m in block.named_modules() if isinstance(m, nn.Linear)]
        groups = capture(name, block, targets, Chain(list(chain.hidden), chain.calls), chain, [Sample({})])
        schemes = dict.fromkeys(targets, (IntGroup(bits=8, group=-1), Int8Token()))
        return BlockView(name, block, groups, lambda: chain.run(block, 0), lambda param: torch.float32, schemes)

    return make
