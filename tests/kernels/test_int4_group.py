"""int4_group, int6_group: the codes and a scale give back every group; the largest value is exact; searching never loses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels.activation import from_config
from quant.kernels.activations.int4_group import Int4Group
from quant.kernels.activations.int6_group import Int6Group


def tokens(k: int = 192) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return torch.randn(3, 17, k, generator=generator) * torch.randn(17, k, generator=generator).exp()


@pytest.mark.parametrize(("rule", "half"), [(Int4Group, 8), (Int6Group, 32)])
@pytest.mark.parametrize("group", [1, 16, 48, 192])
def test_a_group_is_its_codes_and_a_scale_that_keeps_its_largest_value(group: int, rule: type[Int4Group], half: int) -> None:
    x = tokens()
    seen = rule(group=group).quantize(x, {})
    assert seen.shape == x.shape
    assert seen.dtype == torch.float32
    groups, read = x.unflatten(-1, (-1, group)).double(), seen.unflatten(-1, (-1, group)).double()
    at = groups.abs().argmax(-1, keepdim=True)
    assert torch.allclose(read.gather(-1, at), groups.gather(-1, at), rtol=1e-6)
    step = groups.gather(-1, at) / -half
    codes = read / step
    assert float((codes - codes.round()).abs().max()) < 1e-5
    assert codes.round().min() == -half
    assert codes.round().max() <= half - 1
    clipped = groups / step > half - 0.5
    error = ((read - groups) / step).abs()
    assert float(error[~clipped].max()) <= 0.5 + 1e-5
    assert float(error.max()) <= 1 + 1e-5


def test_a_tokens_codes_do_not_depend_on_other_tokens_and_follow_its_size_and_sign() -> None:
    x, rule = tokens(), Int4Group(group=64, search=True)
    whole = rule.quantize(x, {})
    assert torch.equal(rule.quantize(x[1:2, 5], {}), whole[1:2, 5])
    assert torch.equal(rule.quantize(-4 * x, {}), -4 * whole)
    assert torch.equal(rule.quantize(x.to(torch.bfloat16), {}), rule.quantize(x.to(torch.bfloat16).float(), {}))


def test_gaussian_groups_lose_what_the_docstring_says() -> None:
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    absmax = x.abs().amax(-1, keepdim=True) / 7
    plain = float((torch.round(x / absmax) * absmax - x).square().mean())
    signed, searched = (float((Int4Group(search=s).quantize(x, {}) - x).square().mean()) for s in (False, True))
    assert signed / plain == pytest.approx(0.78, abs=0.02)
    assert searched / signed == pytest.approx(0.94, abs=0.02)


def test_searching_never_loses_in_any_group() -> None:
    x = tokens()
    lost = [(Int4Group(group=16, search=s).quantize(x, {}) - x).square().unflatten(-1, (-1, 16)).sum(-1) for s in (False, True)]
    assert (lost[1] <= lost[0]).all()


def test_silence_stays_silent_and_options_are_checked() -> None:
    assert not Int4Group(search=True).quantize(torch.zeros(2, 64), {}).any()
    for rule in (Int4Group(), Int4Group(group=32, search=True, rotate=64)):
        assert from_config(rule.config()) == rule
        assert rule.fields(64) == {}
    assert "do not divide K = 96" in str(Int4Group().refuses(96))
    assert Int4Group(group=48).refuses(96) is None
    with pytest.raises(ValueError, match="positive"):
        Int4Group(group=0)
