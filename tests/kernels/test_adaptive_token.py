"""Tokens of 8 or 4 bits: each kind is the plain rule bit for bit, in order, and the integer kernel serves the mixture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.kernels.activations.adaptive_token import TAGS, AdaptiveToken, by_tag
from quant.kernels.activations.int_token import Int4Token, Int8Token, IntToken
from quant.kernels.dispatch import MatmulSpec, choose
from quant.kernels.formats.int4_dual import Int4Dual

RULE = AdaptiveToken(clip=0.8)
FEW = Int4Token(clip=0.8)


def tokens(m: int = 37, k: int = 96) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m))


def mixed(m: int) -> Tensor:
    tags = torch.rand(m, generator=torch.Generator().manual_seed(1)) < 0.4
    assert 0 < int(tags.sum()) < m
    return tags


@pytest.mark.parametrize(("tag", "plain"), [(True, Int8Token()), (False, FEW)])
def test_all_tokens_of_a_kind_are_the_plain_rule(tag: bool, plain: IntToken) -> None:
    x = tokens()
    assert torch.equal(RULE.quantize(x, {TAGS: torch.full((37,), tag)}), plain.quantize(x, {}))
    assert torch.equal(RULE.quantize(x, {}), Int8Token().quantize(x, {}))  # as in calibration


def test_every_token_is_read_by_its_own_rule() -> None:
    x, tags = tokens().view(1, 37, 96), mixed(37).view(1, 37)
    seen = RULE.quantize(x, {TAGS: tags})
    for t in range(37):
        rule: IntToken = Int8Token() if tags[0, t] else FEW
        assert torch.equal(seen[0, t], rule.quantize(x[0, t], {}))
    few = seen[~tags].view(-1, 96)
    steps = tokens()[~tags[0]].abs().amax(1, keepdim=True) * 0.8 / 7
    assert torch.allclose(few, steps * (few / steps).round().clamp(-7, 7), atol=1e-5)  # 15 levels


def test_clipping_a_gaussian_token_loses_less_and_a_short_range_is_refused() -> None:
    x = tokens(50, 576)
    lost = [float((Int4Token(clip=clip).quantize(x, {}) - x).norm()) for clip in (1.0, 0.8, 0.4)]
    assert lost[1] < 0.9 * lost[0]
    assert lost[1] < lost[2]
    for clip in (0.0, 1.5):
        with pytest.raises(ValueError, match="above 0, up to 1"):
            AdaptiveToken(clip=clip)


@pytest.mark.parametrize("m", [1, 5, 37, 0])
def test_the_integer_kernel_computes_what_the_rounded_tokens_give(m: int, dual_layer: object) -> None:
    fmt, codes = dual_layer(72, 96, 48)
    spec = MatmulSpec(n=72, k=96, format=fmt, activation=RULE, device="cpu")
    kernel, _ = choose(spec)
    prepared, x = kernel.prepare(fmt.pack(codes), spec), tokens(m)

    def multiply(rows: Tensor, rule: IntToken) -> Tensor:
        return kernel.matmul(rows, prepared, None, replace(spec, activation=rule))

    for tags in (torch.ones(m, dtype=torch.bool), torch.zeros(m, dtype=torch.bool), *([mixed(m)] if m > 1 else [])):
        wanted = RULE.quantize(x, {TAGS: tags}).double() @ fmt.dequantize(codes).double().T
        assert float((by_tag(RULE, x, tags, multiply) - wanted).norm()) <= 2e-6 * float(wanted.norm())
    assert isinstance(fmt, Int4Dual)
    assert torch.equal(kernel.matmul(x, prepared, None, spec), multiply(x, Int8Token()))
