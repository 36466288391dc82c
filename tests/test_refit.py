"""Steps fitted to given codes: the least squares optimum of the whole row, hence never worse, and exact where codes are."""

from __future__ import annotations

import pytest
import torch

from quant.grid import Affine, FloatGrid, Grid
from quant.kernels.minifloat import E2M1
from quant.refit import refit, refit_steps

N, K, GROUP = 24, 96, 16


def problem(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, K, generator=generator) @ torch.randn(K, K, generator=generator)
    integers = torch.randint(-8, 8, (N, K), generator=generator).float()
    step = torch.rand(N, K // GROUP, generator=generator) + 0.5
    return x.T @ x, integers, step


def loss(weight: torch.Tensor, gram: torch.Tensor, integers: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    lost = (weight - integers * step.repeat_interleave(GROUP, 1)).double()
    return ((lost @ gram.double()) * lost).sum(-1)


def test_steps_that_made_the_weight_are_found_again() -> None:
    gram, integers, step = problem()
    weight = integers * step.repeat_interleave(GROUP, 1)
    found = refit_steps(weight, gram, integers, step * 1.3)
    assert float((found - step).norm() / step.norm()) < 1e-2


def test_no_row_gets_worse_and_no_neighbour_is_better() -> None:
    gram, integers, step = problem(1)
    weight = integers * step.repeat_interleave(GROUP, 1) + torch.randn(N, K)
    start = step * (1 + 0.1 * torch.randn(step.shape))
    found = refit_steps(weight, gram, integers, start)
    best = loss(weight, gram, integers, found)
    assert bool((best <= loss(weight, gram, integers, start)).all())
    for scale in (0.97, 1.03):
        assert bool((best <= loss(weight, gram, integers, found * scale)).all())


def test_rows_that_cannot_be_solved_keep_their_steps() -> None:
    gram, integers, step = problem(2)
    integers[3] = 0
    integers[5, :GROUP] = 0
    weight = torch.randn(N, K)
    weight[7] = -integers[7]  # the best steps would be negative
    found = refit_steps(weight, gram, integers, step)
    assert found.isfinite().all()
    assert bool((found > 0).all())
    assert torch.equal(found[3], step[3])
    assert torch.equal(found[7], step[7])


@pytest.mark.parametrize("kind", ["integers", "floats"])
def test_rounds_of_steps_and_codes_pay_on_any_grid(kind: str) -> None:
    gram, _, step = problem(3)
    weight, codes = torch.randn(N, K), torch.randint(0, 16, (N, K), dtype=torch.uint8)
    grid: Grid = Affine(step, torch.full_like(step, 8), 16) if kind == "integers" else FloatGrid(step, E2M1)
    rounded: list[torch.Tensor] = []

    def storable(step: torch.Tensor) -> torch.Tensor:
        rounded.append(step.half().float())
        return rounded[-1]

    losses = []
    for rounds in range(3):
        new, fitted = refit(weight, gram, codes, grid, storable, rounds)
        losses.append(loss(weight, gram, fitted.levels(new), fitted.step).sum())
        assert type(fitted) is type(grid)
        assert fitted.step is (rounded[-1] if rounds else step)  # as it will be read back
    assert losses[2] < losses[1] < 0.9 * losses[0]
