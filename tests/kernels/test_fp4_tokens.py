"""Tokens as FP4: on the grid of their format, exact in bfloat16, not clipped a little above what calibration saw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quant.kernels.activation import Activation, from_config
from quant.kernels.activations.mxfp4 import MxFp4
from quant.kernels.activations.nvfp4 import NvFp4
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.minifloat import E2M1

K = 128


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, K, generator=generator) * torch.randn(K, generator=generator).exp()


def seen(activation: Activation, x: Tensor) -> Tensor:
    return activation.quantize(x, activation.fit(x, x.abs().amax(0)))


@pytest.mark.parametrize("activation", [NvFp4(), MxFp4()], ids=str)
def test_tokens_are_rounded_as_weights_of_that_format_are(activation: Activation) -> None:
    x, fmt = tokens(), Fp4Block(kind=activation.name)
    codes = fmt.nearest(x)
    if activation.name == "mxfp4":
        assert torch.equal(seen(activation, x), fmt.dequantize(codes))
        return
    stored = activation.fit(x, x.abs().amax(0))["input_global_scale"]  # a power of two: other than that of `nearest`
    scale = (x.view(40, -1, 16).abs().amax(-1) / 6 * stored).to(torch.float8_e4m3fn)
    codes = fmt.encode(x, {"weight_scale": scale, "weight_global_scale": stored})
    assert torch.equal(seen(activation, x), fmt.dequantize(codes))
    assert E2M1.decode(codes.codes).abs().max() == 6


def test_the_divisor_is_a_power_of_two_with_headroom() -> None:
    x, rule = tokens(), NvFp4()
    fields = rule.fit(x, x.abs().amax(0))
    assert fields["input_global_scale"].shape == rule.fields(K)["input_global_scale"].shape
    assert math.frexp(float(fields["input_global_scale"]))[0] == 0.5
    top = x.abs().max()
    larger = torch.full((1, 16), float(top)) * torch.tensor([1.75] + [0.1] * 15)
    assert torch.allclose(rule.quantize(larger, fields)[0, 0], larger[0, 0], rtol=0.07)
    assert rule.quantize(4 * larger, fields).abs().max() <= 448 * 6 / float(
        fields["input_global_scale"]
    )  # beyond, it saturates


@pytest.mark.parametrize("activation", [NvFp4(), NvFp4(four_six=True)], ids=str)
def test_multiples_are_exact_in_bfloat16(activation: NvFp4) -> None:
    x = tokens() * 50
    multiples = activation.multiples(x, torch.tensor([37.0]))
    assert torch.equal(multiples.bfloat16().float(), multiples)
    assert torch.equal(activation.quantize(x, {"input_global_scale": torch.tensor([37.0])}), multiples / 37)
    assert torch.equal(seen(MxFp4(), x).bfloat16().float(), seen(MxFp4(), x))


def test_four_over_six_loses_less_in_every_block() -> None:
    x = tokens()
    plain, both = ((seen(NvFp4(four_six=f), x) - x).view(40, -1, 16).square().sum(-1) for f in (False, True))
    assert (both <= plain * (1 + 1e-5)).all()
    assert both.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("activation", [NvFp4(), NvFp4(four_six=True), MxFp4()], ids=str)
def test_zeros_nans_and_tiny_blocks(activation: Activation) -> None:
    x = tokens()
    x[0], x[1, :32], x[2, 5] = 0, 1e-30, float("nan")
    y = activation.quantize(x, activation.fit(x, x.nan_to_num().abs().amax(0)))
    assert (y[0] == 0).all()
    assert y[1].isfinite().all()
    assert y[2, 5].isnan()
    assert y[3:].isfinite().all()
    assert activation.quantize(x[:0], activation.fit(x, x.nan_to_num().abs().amax(0))).shape == (0, K)


def test_rotation_helps_outliers_and_is_undone_by_the_weight() -> None:
    x = tokens() * torch.where(torch.arange(K) % 32 == 3, 30.0, 1.0)
    w = torch.randn(24, K, generator=torch.Generator().manual_seed(5))
    lost = []
    for rule in (MxFp4(), MxFp4(rotate=32)):
        turned = rule.rotated(x)
        assert torch.allclose(turned @ rule.rotated(w).T, x @ w.T, rtol=1e-3, atol=1e-2)
        lost.append(float((seen(rule, turned) @ rule.rotated(w).T - x @ w.T).norm()))
    assert lost[1] < 0.9 * lost[0]


def test_configs_and_refusals() -> None:
    for rule in (NvFp4(), NvFp4(four_six=True, rotate=16), MxFp4(rotate=32)):
        assert from_config(rule.config()) == rule
    assert "do not divide K = 40" in str(NvFp4().refuses(40))
    assert "do not divide K = 48" in str(MxFp4().refuses(48))
    assert NvFp4().refuses(48) is None
    assert "rotate 32" in str(NvFp4(rotate=32).refuses(48))
