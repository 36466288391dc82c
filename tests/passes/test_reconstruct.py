"""reconstruct: the least-squares weight for rounded inputs, and with GPTQ a smaller served error than rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels.activations.int_static import IntStatic
from quant.kernels.formats.int_group import IntGroup
from quant.passes.gptq import Pass as Gptq
from quant.passes.reconstruct import Pass
from quant.stats import InputStats


def rounded(layer: Any) -> tuple[Tensor, InputStats]:
    """Inputs as a 4-bit layer reads them, and their statistics."""
    rule = IntStatic(bits=4)
    seen = rule.quantize(layer.x, rule.fit(layer.x, layer.x.abs().amax(0)))
    stats = InputStats.empty(layer.x.shape[1], torch.device("cpu"), drift=True)
    stats.add(seen[None], layer.x[None], None)
    stats.finish()
    return seen, stats


def test_it_is_the_minimum_of_the_ridge_problem(make_layer: Callable) -> None:
    """d/dW* (||W X - W* Xq||^2 + ridge ||W* - W||^2) = 0."""
    layer = make_layer(n=8)
    seen, stats = rounded(layer)
    ridge = 0.01 * float(stats.gram.diagonal().mean())
    x, xq, w = layer.x.double(), seen.double(), layer.weight.double()
    moved = Pass().correct(layer.weight, stats).double()
    gradient = (moved @ xq.T - w @ x.T) @ xq + ridge * (moved - w)
    start = (w @ xq.T - w @ x.T) @ xq
    assert float(gradient.norm() / start.norm()) < 1e-3


@pytest.mark.parametrize("bits", [4, 6])
def test_served_error_is_below_that_of_round_to_nearest(bits: int, make_layer: Callable) -> None:
    """||Xq W_hat^T - X W^T|| over several layers: nearest > GPTQ on rounded inputs > GPTQ aimed at the reconstruction."""
    fmt = IntGroup(bits=bits, group=32)
    totals = [0.0, 0.0, 0.0]
    for seed in range(3):
        layer = make_layer(n=40, tokens=1500, seed=seed)
        seen, stats = rounded(layer)
        wanted = layer.x @ layer.weight.T
        made = (
            fmt.nearest(layer.weight),
            Gptq().quantize(layer.weight, stats, fmt),
            Gptq().quantize(Pass().correct(layer.weight, stats), stats, fmt),
        )
        for at, codes in enumerate(made):
            totals[at] += float((seen @ fmt.dequantize(codes).T - wanted).norm() / wanted.norm())
    assert totals[2] < totals[1] <= totals[0]


def test_it_asks_for_statistics_of_rounded_inputs_and_not_for_the_float_chain() -> None:
    assert Pass().rounded
    assert not Pass().needs_float
