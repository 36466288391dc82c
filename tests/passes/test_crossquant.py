"""crossquant: the invariants of the step, of the fold that deploys it, and of the search."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quant.folds import BlockView
from quant.kernels.activations.cross_token import CrossToken, cross_steps
from quant.kernels.activations.int_token import Int8Token, quantize_token
from quant.passes.crossquant import Pass, by_group, cross_factors
from quant.passes.smooth import served_error

T, K, TOP = 200, 96, 127


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(T, K, generator=generator)
    tokens[:, [3, 40, 77]] *= torch.tensor([20.0, 35.0, 60.0])
    return tokens


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 0.85, 1.0])
def test_no_code_needs_a_clamp(alpha: float, x: torch.Tensor) -> None:
    assert float((x / cross_steps(x, alpha, TOP)).round().abs().max()) <= TOP


def test_the_ends_are_per_token_and_per_channel(x: torch.Tensor) -> None:
    codes, scale = quantize_token(x)
    assert torch.allclose(cross_steps(x, 1.0, TOP), scale.unsqueeze(1).expand(T, K), rtol=1e-6)
    assert torch.allclose(CrossToken(alpha=1.0).quantize(x, {}), codes * scale.unsqueeze(1), atol=1e-4)
    columns = x.abs().amax(0) / TOP
    assert torch.allclose(CrossToken(alpha=0.0).quantize(x, {}), (x / columns).round() * columns, rtol=1e-5)


def test_fewer_values_become_zero_and_those_that_stay_were_zero_before(x: torch.Tensor) -> None:
    plain, cross = CrossToken(alpha=1.0).quantize(x, {}) == 0, CrossToken().quantize(x, {}) == 0
    small = x.abs().amax(0).unsqueeze(0) <= x.abs().amax(1, keepdim=True)
    assert not (cross & ~plain & small).any()
    assert float(cross.float().mean()) < 0.2 * float(plain.float().mean())


def test_codes_do_not_change_with_a_common_factor(x: torch.Tensor) -> None:
    for scale in (0.25, 8.0):
        codes = [(t / cross_steps(t, 0.15, TOP)).round() for t in (x, x * scale)]
        assert float((codes[0] != codes[1]).float().mean()) < 1e-4  # ties of the logarithm's rounding


def test_a_tight_step_is_never_larger_than_the_formulas(x: torch.Tensor) -> None:
    for alpha in (0.0, 0.15, 0.5, 1.0):
        k = x.abs().amax(0) ** (1 - alpha)
        formula = x.abs().amax(1) ** alpha / TOP
        tight = (x / k).abs().amax(1) / TOP
        assert bool((tight <= formula * (1 + 1e-5)).all())
    assert torch.allclose(tight, formula)


def test_the_fold_is_exact_and_a_batch_of_one_gives_the_same_row(x: torch.Tensor) -> None:
    weight, k = torch.randn(16, K).double(), cross_factors(x.abs().amax(0), 0.15)
    wanted = x.double() @ weight.T
    assert torch.allclose((x.double() / k) @ (weight * k).T, wanted)
    served = Int8Token().quantize(x / k, {})
    assert torch.equal(served[5:6], Int8Token().quantize(x[5:6] / k, {}))
    assert not torch.equal(CrossToken().quantize(x, {})[5:6], CrossToken().quantize(x[5:6], {}))  # why that form is not served


def test_factors_are_balanced_bounded_and_leave_dead_channels() -> None:
    tops = torch.tensor([0.0, 1.0, 10.0, 100.0, 1e12])
    k = cross_factors(tops, 0.15)
    assert float(k[0]) == 1
    assert bool(((k >= 1e-3) & (k <= 1e3)).all())
    assert torch.equal(cross_factors(tops[1:], 1.0), torch.ones(4))
    assert torch.equal(cross_factors(torch.zeros(4), 0.15), torch.ones(4))
    assert torch.equal(by_group(torch.tensor([1.0, 5, 2, 3]), 2), torch.tensor([5.0, 5, 3, 3]))


def test_the_search_never_loses_to_no_fold_and_the_zeros_fall(view: Callable[[], BlockView]) -> None:
    block = view()
    ones = [served_error(block, group)(torch.ones_like(group.stats.absmax)) for group in block.groups]
    zeros = [float((Int8Token().quantize(torch.cat(g.stats.rows), {}) == 0).float().mean()) for g in block.groups]
    Pass().apply(block)
    after = [served_error(block, group)(torch.ones_like(group.stats.absmax)) for group in block.groups]
    assert all(b <= a * 1.001 for a, b in zip(ones, after, strict=True))
    assert after[0] < 0.5 * ones[0]  # the norm before q, k and v has an outlier channel
    left = [float((Int8Token().quantize(torch.cat(g.stats.rows), {}) == 0).float().mean()) for g in block.groups]
    assert left[0] < 0.5 * zeros[0]
