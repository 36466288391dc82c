"""dgq: each phase lowers the loss it states, every group stays inside int8, and the whole beats its neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels.format import Codes
from quant.kernels.formats.int4_dual import Int4Dual, factor_steps, largest_step
from quant.kernels.formats.int_group import IntGroup
from quant.passes import qoq
from quant.passes.dgq import ROW_RATIOS, Pass, refine_groups, refit_row_scale, search_row_scale
from quant.search import block_loss, gram_blocks, on_grid, search_grid
from quant.stats import InputStats

FMT = Int4Dual(group=32)


@pytest.fixture
def layer(make_layer: Callable) -> Any:
    return make_layer()


def group_losses(weight: Tensor, blocks: Tensor, row_scale: Tensor, s2: Tensor, zero: Tensor) -> Tensor:
    """Block loss [N, K // G] of rounding to the dual grid, in float64."""
    w = weight.double().view(len(weight), len(blocks), -1)
    return block_loss(w - on_grid(w, row_scale.double().unsqueeze(1) * s2, zero.double(), 16), blocks.double())


def assert_inside_int8(s2: Tensor, zero: Tensor) -> None:
    assert (s2 >= 1).all()
    assert (zero >= 0).all()
    assert ((15 - zero) * s2 <= 127).all()
    assert (zero * s2 <= 128).all()
    assert torch.equal(s2, s2.round())


def test_phase_1_is_not_above_round_to_nearest_on_float_scales(layer: Any) -> None:
    blocks = gram_blocks(layer.stats.gram, 32)
    step, zero = search_grid(layer.weight, blocks, 16)
    w = layer.weight.view(24, -1, 32)
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    full = (high - low) / 15
    plain = block_loss(w - on_grid(w, full, torch.round(-low / full), 16), blocks)
    assert (block_loss(w - on_grid(w, step, zero, 16), blocks) <= plain * (1 + 1e-5)).all()


def test_phase_2_is_the_minimum_of_its_own_grid(layer: Any) -> None:
    blocks = gram_blocks(layer.stats.gram, 32)
    step, zero = search_grid(layer.weight, blocks, 16)
    row_scale, s2 = search_row_scale(layer.weight, blocks, step, zero)
    assert_inside_int8(s2, zero)
    chosen = group_losses(layer.weight, blocks, row_scale, s2, zero).sum(1)
    every = []
    for ratio in ROW_RATIOS:
        row, steps = factor_steps(step, zero, ratio)
        assert_inside_int8(steps, zero)
        every.append(group_losses(layer.weight, blocks, row, steps, zero).sum(1))
    assert (chosen <= torch.stack(every).amin(0) * (1 + 1e-4)).all()
    assert chosen.sum() < 0.99 * every[0].sum()  # the search is needed


def test_more_row_ratios_never_raise_the_loss(layer: Any) -> None:
    blocks = gram_blocks(layer.stats.gram, 32)
    step, zero = search_grid(layer.weight, blocks, 16)
    losses = []
    for ratios in (ROW_RATIOS[:1], ROW_RATIOS[::3], ROW_RATIOS, (*ROW_RATIOS, *(1 - 0.01 * i for i in range(80)))):
        row_scale, s2 = search_row_scale(layer.weight, blocks, step, zero, ratios)
        losses.append(group_losses(layer.weight, blocks, row_scale, s2, zero).sum(1))
    for coarse, fine in itertools.pairwise(losses):
        assert (fine <= coarse * (1 + 1e-5)).all()


def test_refining_lowers_group_losses_and_stays_inside_int8(layer: Any) -> None:
    blocks = gram_blocks(layer.stats.gram, 32)
    step, zero = search_grid(layer.weight, blocks, 16)
    row_scale, s2 = search_row_scale(layer.weight, blocks, step, zero)
    before = group_losses(layer.weight, blocks, row_scale, s2, zero)
    previous = before
    for rounds in (1, 2, 3):
        finer, moved = refine_groups(layer.weight, blocks, row_scale, s2, zero, rounds)
        assert_inside_int8(finer, moved)
        assert (moved <= 15).all()
        assert (finer <= largest_step(moved)).all()
        assert ((finer - s2).abs() <= rounds).all()
        assert ((moved - zero).abs() <= rounds).all()
        after = group_losses(layer.weight, blocks, row_scale, finer, moved)
        assert (after <= previous * (1 + 1e-4)).all()
        previous = after
    assert previous.sum() < 0.99 * before.sum()
    assert (finer != s2).any()
    assert (moved != zero).any()


def test_the_refitted_row_scale_is_the_best_there_is(layer: Any) -> None:
    blocks = gram_blocks(layer.stats.gram, 32)
    step, zero = search_grid(layer.weight, blocks, 16)
    row_scale, s2 = search_row_scale(layer.weight, blocks, step, zero)
    codes = FMT.encode(layer.weight, row_scale, s2, zero)
    fitted = refit_row_scale(layer.weight, layer.stats.gram, FMT, codes)
    gram, v = layer.stats.gram.double(), FMT.integers(codes).double()

    def loss(scale: Tensor) -> Tensor:
        d = layer.weight.double() - scale.double().unsqueeze(1) * v
        return ((d @ gram) * d).sum(1)

    assert (loss(fitted) <= loss(row_scale) * (1 + 1e-6)).all()
    assert loss(fitted).sum() < 0.999 * loss(row_scale).sum()
    for factor in (0.99, 1.01):
        assert (loss(fitted) < loss(fitted * factor)).all()


def test_refit_keeps_the_scale_of_rows_it_cannot_fit(layer: Any) -> None:
    zero_codes = Codes(
        torch.full((2, 128), 8, dtype=torch.uint8),
        FMT.params(torch.tensor([0.3, 0.4]), torch.ones(2, 4), torch.full((2, 4), 8.0)),
    )
    assert refit_row_scale(layer.weight[:2], layer.stats.gram, FMT, zero_codes).tolist() == pytest.approx([0.3, 0.4])
    opposite = FMT.encode(-layer.weight[:2], torch.tensor([0.01, 0.01]), torch.ones(2, 4), torch.full((2, 4), 8.0))
    assert refit_row_scale(layer.weight[:2], layer.stats.gram, FMT, opposite).tolist() == pytest.approx([0.01, 0.01])


def test_every_option_lowers_the_output_error(make_layer: Callable) -> None:
    """Summed over layers: search alone, + refine, + refit, + GPTQ rounding; each step must pay, and all beat rtn."""
    steps = [
        {"round": "nearest", "refine": False, "refit": False},
        {"round": "nearest", "refine": True, "refit": False},
        {"round": "nearest", "refine": True, "refit": True},
        {"round": "gptq", "refine": True, "refit": True},
    ]
    layers = [make_layer(seed=seed) for seed in range(5)]
    totals = [sum(x.output_error(FMT.dequantize(FMT.nearest(x.weight))) for x in layers)]
    for options in steps:
        totals.append(sum(x.output_error(FMT.dequantize(Pass(**options).quantize(x.weight, x.stats, FMT))) for x in layers))
    for before, after in itertools.pairwise(totals):
        assert after < before, totals
    assert totals[-1] < 0.7 * totals[1], totals


def test_not_above_qoq_nor_above_float_scales_rounded_to_nearest() -> None:
    """t-distributed weights, group 64, no GPTQ on either side."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        chi = torch.randn(48, 256, 5, generator=generator).square().mean(-1).sqrt()
        w = torch.randn(48, 256, generator=generator) / chi * 0.03  # Student's t, 5 degrees of freedom
        x = torch.randn(1000, 256, generator=generator) * torch.rand(256, generator=generator).mul(2).exp()
        stats = InputStats(x.T @ x, torch.zeros(256, 256))
        dual, group = Int4Dual(group=64), IntGroup(bits=4, group=64)

        def error(back: Tensor, w: Tensor = w, x: Tensor = x) -> float:
            return float((x @ (w - back).T).norm() / (x @ w.T).norm())

        ours = error(dual.dequantize(Pass(round="nearest").quantize(w, stats, dual)))
        assert ours <= error(dual.dequantize(qoq.Pass(gptq=False).quantize(w, stats, dual)))
        assert ours <= error(group.dequantize(group.nearest(w)))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_no_weight_makes_any_code_leave_int8(rounding: str, make_layer: Callable) -> None:
    layer = make_layer(n=6)
    w = layer.weight.clone()
    w[0] += 5
    w[1] -= 5
    w[2, :32] = 100
    w[3] = 0
    w[4] = torch.where(w[4] > 0, 1.0, -1.0)
    codes = Pass(round=rounding).quantize(w, layer.stats, FMT)
    s2, o = codes.params["group_scale"].long(), codes.params["group_offset"].long()
    assert (15 * s2 + o <= 127).all()
    assert (s2 >= 1).all()
    assert torch.equal(o % s2, torch.zeros_like(o))  # a stored offset is -z * s2, unwrapped
    assert ((-o // s2 >= 0) & (-o // s2 <= 15)).all()


def test_the_other_format_is_refused_with_the_passes_for_it() -> None:
    assert "gptq or rtn" in str(Pass().refuses(IntGroup()))
