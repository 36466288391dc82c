"""The Fisher diagonal is a sum of squares over samples, in the channels that the codes belong to."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from quant.calibrate import Chain
from quant.fisher import fisher_diagonals, squares
from quant.kernels.rotation import by_matrix
from quant.plan import make_plan
from quant.recipe import load_recipe
from quant.samples import make_samples
from quant.sensitivity import StepBack


def step_of(samples: int, seed: int = 0) -> StepBack:
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Tanh(), nn.Linear(24, 16, bias=False)).requires_grad_(False)
    hidden, grads = (list(torch.randn(samples, 1, 7, 16)) for _ in range(2))
    return StepBack("b", block, Chain(hidden, [((), {})] * samples), grads, 1, 1)


def test_it_adds_squares_of_each_samples_gradient() -> None:
    step, again = step_of(5), step_of(5)
    found = squares(step, {"b.0": 16, "b.2": 0}, 5)
    weights = {"b.0": again.block[0].weight, "b.2": again.block[2].weight}
    turned = {"b.0": by_matrix(weights["b.0"], 16).requires_grad_(), "b.2": weights["b.2"].requires_grad_()}
    wanted, summed = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for x, grad in zip(again.chain.hidden, again.grads, strict=True):
        y = torch.tanh(by_matrix(x, 16) @ turned["b.0"].T) @ turned["b.2"].T  # as it is served: rotated x, rotated weight
        for name, g in zip(turned, torch.autograd.grad(y, list(turned.values()), grad), strict=True):
            wanted[name] += g.square() / 5
            summed[name] += g / 5
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-7)
        assert not torch.allclose(found[name], summed[name].square(), rtol=0.5)
    for x, grad in zip(step.grads, again.grads, strict=True):
        assert not torch.equal(x, grad)  # now those of the block's input


def test_every_target_of_a_model_has_one(llama: Path, tiny: ModuleType) -> None:
    sets = ["calibration.tokens=256", "calibration.length=64", "calibration.source=manual"]
    plan = make_plan(str(llama), load_recipe("quarot-gptq-w4a16", sets))
    samples = make_samples(plan, torch.device("cpu"))[0]
    found = dict(fisher_diagonals(plan, samples, torch.device("cpu")))
    assert list(found) == list(reversed(plan.stacks[0].blocks))
    every = {name: f for block in found.values() for name, f in block.items()}
    assert every.keys() == plan.targets.keys()
    for name, f in every.items():
        assert f.shape == (plan.targets[name].n, plan.targets[name].k)
        assert bool((f >= 0).all())
        assert float(f.sum()) > 0
