"""qep: W' is the minimum of its damped objective, and brings the output behind quantized blocks closer to the float one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quant.passes.qep import Pass
from quant.stats import InputStats


def test_the_gradient_of_the_objective_is_zero(make_layer: Callable) -> None:
    """||W Xf - W' X||^2 + ridge ||W' - W||^2, differentiated by autograd in float64 at the returned W'."""
    layer = make_layer(n=8, drift=0.3)
    moved = Pass(strength=1, damp=0.1).correct(layer.weight, layer.stats).double().requires_grad_(True)
    x, x_float, w = layer.x.double(), layer.x_float.double(), layer.weight.double()
    ridge = 0.1 * float(layer.stats.gram.diagonal().mean())

    def objective(target: torch.Tensor) -> torch.Tensor:
        return (x_float @ w.T - x @ target.T).square().sum() + ridge * (target - w).square().sum()

    (gradient,) = torch.autograd.grad(objective(moved), moved)
    unmoved = layer.weight.double().requires_grad_(True)
    (steep,) = torch.autograd.grad(objective(unmoved), unmoved)
    assert gradient.norm() < 1e-3 * steep.norm()


def test_it_lowers_the_error_it_is_about(make_layer: Callable) -> None:
    """Measured on the chain itself: the output wanted is that of the float inputs."""
    layer = make_layer(tokens=4000, drift=0.3)
    wanted = layer.x_float @ layer.weight.T
    errors = [
        float((wanted - layer.x @ Pass(strength=strength).correct(layer.weight, layer.stats).T).norm())
        for strength in (0.0, 0.5, 1.0)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_half_the_strength_is_half_the_way(make_layer: Callable) -> None:
    layer = make_layer()
    whole, half = (Pass(strength=s).correct(layer.weight, layer.stats) - layer.weight for s in (1.0, 0.5))
    assert torch.allclose(half, whole / 2, atol=1e-6)
    assert whole.abs().max() > 1e-4


def test_nothing_to_correct_returns_the_weight(make_layer: Callable) -> None:
    layer = make_layer(drift=0.0)
    assert torch.equal(Pass(strength=0).correct(layer.weight, make_layer(drift=0.5).stats), layer.weight)
    still = InputStats(layer.stats.gram, torch.zeros_like(layer.stats.drift))
    assert torch.equal(Pass(strength=1).correct(layer.weight, still), layer.weight)


def test_inputs_that_are_all_zero_return_the_weight(make_layer: Callable) -> None:
    layer = make_layer()
    nothing = InputStats(torch.zeros(128, 128), torch.zeros(128, 128))
    assert torch.equal(Pass().correct(layer.weight, nothing), layer.weight)


def test_strength_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match="strength"):
        Pass(strength=1.5)
