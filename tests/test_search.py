"""The clipping search: losses are what they say, the choice is the best of its grid, and never worse than no search."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quant import search
from quant.search import RATIOS, block_loss, by_rows, gram_blocks, on_grid, output_error, search_grid


def problem(n: int = 7, k: int = 96, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Heavy-tailed weights [n, k], inputs [T, k], Gram blocks."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator) ** 3
    x = torch.randn(200, k, generator=generator) * torch.rand(k, generator=generator).mul(2).exp()
    return w, x, gram_blocks(x.T @ x, group)


def nearest_on(w: Tensor, span: Tensor, low: Tensor, ratio: float, levels: int) -> Tensor:
    """One group clipped to `ratio` of its range, the plain way, in float64."""
    step = ratio * span / (levels - 1)
    zero = torch.round(-ratio * low / step).clamp(0, levels - 1)
    return (torch.round(w / step + 0.0) + zero).clamp(0, levels - 1).sub(zero) * step


def test_gram_blocks_are_the_groups_own() -> None:
    _, x, blocks = problem()
    assert blocks.shape == (3, 32, 32)
    for g in range(3):
        part = x[:, 32 * g : 32 * g + 32]
        assert torch.allclose(blocks[g], part.T @ part, rtol=1e-4, atol=1e-2)


def test_losses_are_squared_output_errors() -> None:
    w, x, blocks = problem()
    error = w.sin()
    loss = block_loss(error.view(7, 3, 32), blocks)
    for row in range(7):
        for g in range(3):
            part = slice(32 * g, 32 * g + 32)
            wanted = float((x[:, part].double() @ error[row, part].double()).square().sum())
            assert float(loss[row, g]) == pytest.approx(wanted, rel=1e-4)
    wanted = float((x.double() @ error.double().T).square().sum())
    assert output_error(error, x.T @ x) == pytest.approx(wanted, rel=1e-4)


def test_slices_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, _, blocks = problem(n=23)
    whole = search_grid(w, blocks, 16)
    monkeypatch.setattr(search, "CHUNK", 5 * 96)
    seen: list[int] = []

    def counted(rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(rows))
        return search_grid(rows, blocks, 16)

    for sliced, one in zip(by_rows(counted, w), whole, strict=True):
        assert torch.allclose(sliced, one)
    assert seen == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("levels", [4, 8, 16, 256])
def test_the_choice_is_the_best_of_its_grid(levels: int) -> None:
    """Against a brute force in float64; so it is never worse than rounding to nearest on the full range (ratio 1)."""
    w, _, blocks = problem()
    step, zero = search_grid(w, blocks, levels)
    assert (zero >= 0).all()
    assert (zero <= levels - 1).all()
    grouped = w.view(7, 3, 32).double()
    chosen = block_loss(grouped - on_grid(grouped, step.double(), zero.double(), levels), blocks.double())
    low, high = grouped.amin(-1, keepdim=True).clamp_max(0), grouped.amax(-1, keepdim=True).clamp_min(0)
    losses = torch.stack(
        [block_loss(grouped - nearest_on(grouped, high - low, low, ratio, levels), blocks.double()) for ratio in RATIOS]
    )
    assert 1.0 in RATIOS
    assert (chosen <= losses.amin(0) * 1.01).all()
    assert levels == 256 or losses[0].sum() > 1.02 * chosen.sum()  # heavy tails: few levels are better spent on a part


def test_symmetric_grids_are_centred() -> None:
    w, _, blocks = problem()
    step, zero = search_grid(w, blocks, 16, symmetric=True)
    assert (zero == 8).all()
    plain = w.view(7, 3, 32).abs().amax(-1) / 7
    assert (step <= plain).all()
    grouped = w.view(7, 3, 32)
    chosen, full = (block_loss(grouped - on_grid(grouped, s, zero, 16), blocks) for s in (step, plain))
    assert (chosen <= full * (1 + 1e-5)).all()


def test_more_ratios_never_raise_the_loss() -> None:
    w, _, blocks = problem()
    grouped = w.view(7, 3, 32)
    losses = []
    for ratios in (RATIOS[:1], RATIOS[::4], RATIOS, (*RATIOS, *(0.99 - 0.01 * i for i in range(60)))):
        step, zero = search_grid(w, blocks, 8, ratios=ratios)
        losses.append(block_loss(grouped - on_grid(grouped, step, zero, 8), blocks))
    for coarse, fine in itertools.pairwise(losses):
        assert (fine <= coarse * (1 + 1e-5)).all()


def test_important_channels_are_kept_exact() -> None:
    """The loss is weighted by the inputs: where one channel carries them all, its weight decides the range."""
    w = torch.tensor([[1.0, 0.1, -0.1, 0.05], [0.11, 3.0, -2.0, 1.0]])
    loud = torch.diag(torch.tensor([1e4, 1e-4, 1e-4, 1e-4])).unsqueeze(0)
    step, zero = search_grid(w, loud, 4)
    back = on_grid(w.view(2, 1, 4), step, zero, 4).view(2, 4)
    assert back[0, 0] == pytest.approx(1, abs=0.02)
    full_step, full_zero = search_grid(w, loud, 4, ratios=(1.0,))
    full = on_grid(w.view(2, 1, 4), full_step, full_zero, 4).view(2, 4)
    assert (back[:, 0] - w[:, 0]).abs().sum() <= (full[:, 0] - w[:, 0]).abs().sum()


def test_zero_groups_have_step_zero_and_stay_on_the_grid() -> None:
    w, _, blocks = problem()
    w[2, 32:64] = 0
    for symmetric in (False, True):
        step, _ = search_grid(w, blocks, 16, symmetric)
        assert step[2, 1] == 0
        assert (step > 0).sum() == 20
