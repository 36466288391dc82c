"""qoq: the protective range holds for every (min, max) there is, and both integer forms of a weight agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.passes.qoq import Pass, progressive_grid

FMT = Int4Dual(group=32)


def every_pair() -> tuple[Tensor, Tensor]:
    """All integer (min, max) with -119 <= min <= max <= 119."""
    pairs = torch.cartesian_prod(torch.arange(-119.0, 120), torch.arange(-119.0, 120))
    low, high = pairs[pairs[:, 0] <= pairs[:, 1]].unbind(1)
    return low, high


def test_no_pair_of_extremes_lets_any_code_leave_int8() -> None:
    low, high = every_pair()
    assert len(low) == 239 * 240 // 2
    full = torch.full_like(low, 119)  # a second group that pins the row scale to 1
    q8, row_scale, s2, zero = progressive_grid(torch.stack([low, high, -full, full], 1), 2)
    assert (row_scale == 1).all()
    assert torch.equal(q8[:, :2], torch.stack([low, high], 1))
    assert s2.min() == 1
    assert s2.max() == 16  # a step of 16 exists, so the bound is tight
    assert ((zero >= 0) & (zero <= 15)).all()
    assert ((15 - zero) * s2 <= 127).all()
    assert (zero * s2 <= 128).all()
    s2, zero = s2[:, 0], zero[:, 0]
    for end in (low, high):  # an extreme is hit within half a step, or clipped by what rounding s2 took off the range
        code = (torch.round(end / s2) + zero).clamp(0, 15)
        assert (((code - zero) * s2 - end).abs() <= s2 / 2 + 7.5).all()


def test_steps_are_the_rounded_range() -> None:
    low, high = every_pair()
    full = torch.full_like(low, 119)
    _, _, s2, _ = progressive_grid(torch.stack([low, high, -full, full], 1), 2)
    wanted = torch.round((high.clamp_min(0) - low.clamp_max(0)) / 15).clamp(1, 16)
    assert (wanted - s2[:, 0] <= 1).all()  # held back by the guard by at most one
    assert (wanted == s2[:, 0]).float().mean() > 0.999


@pytest.mark.parametrize("rounding", [True, False])
def test_integers_of_both_steps_agree(rounding: bool, make_layer: Callable) -> None:
    """|Q8| <= 119, 1 <= s2 <= 16, int8((u * s2 + o) mod 256) == (u - z) * s2."""
    layer = make_layer()
    q8, row_scale, s2, zero = progressive_grid(layer.weight, 32)
    assert q8.abs().max() <= 119
    assert torch.equal(q8, q8.round())
    assert torch.allclose(q8.abs().amax(1), torch.full((24,), 119.0))
    assert ((layer.weight / row_scale.unsqueeze(1) - q8).abs() <= 0.5001).all()
    codes = Pass(gptq=rounding).quantize(layer.weight, layer.stats, FMT)
    assert torch.equal(codes.params["group_scale"].float(), s2)
    u = codes.codes.long().view(24, -1, 32)
    exact = (u - zero.long().unsqueeze(-1)) * s2.long().unsqueeze(-1)
    stored = (u * codes.params["group_scale"].long().unsqueeze(-1) + codes.params["group_offset"].long().unsqueeze(-1)) % 256
    assert torch.equal(stored.to(torch.uint8).view(torch.int8).long(), exact)
    assert torch.equal(FMT.integers(codes).long().view_as(exact), exact)
    if not rounding:
        error = (exact.view_as(q8) - q8).abs().view_as(exact)
        inside = (q8.view_as(exact) >= exact.amin(-1, keepdim=True)) & (q8.view_as(exact) <= exact.amax(-1, keepdim=True))
        assert (error <= s2.unsqueeze(-1) / 2)[inside].all()


def test_gptq_rounding_lowers_the_output_error(make_layer: Callable) -> None:
    for seed in range(3):
        layer = make_layer(seed=seed)
        plain, moved = (FMT.dequantize(Pass(gptq=g).quantize(layer.weight, layer.stats, FMT)) for g in (False, True))
        assert layer.output_error(moved) < 0.8 * layer.output_error(plain)


def test_the_other_format_is_refused() -> None:
    assert "int4_dual, not int_group" in str(Pass().refuses(IntGroup()))
