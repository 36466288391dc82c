"""A trained layer: exact at the start, gradients as autograd has them, codes rounded to the nearest level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels.activations.int_token import Int8Token
from quant.kernels.activations.none import Unquantized
from quant.kernels.format import Codes, Format
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.linear import PackedLinear
from quant.train.layer import Trained

N, K = 24, 96
FORMATS: list[Format] = [
    *(IntGroup(bits=bits, group=32, symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    IntGroup(bits=4, group=-1),
    Int4Dual(group=32),
    Fp4Block(kind="mxfp4"),
    Fp4Block(kind="nvfp4"),
    FpChannel(bits=4, group=32),
    FpChannel(bits=8, group=-1),
    BinaryDual(group=32),
    BinaryDual(group=-1),
]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: "-".join(map(str, fmt.config().values())))


def weight_of(seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def packed(fmt: Format, activation: object = Unquantized(), bias: bool = False) -> PackedLinear:
    codes = fmt.nearest(weight_of())
    return PackedLinear.from_fields(fmt.pack(codes), fmt, activation, N, K, torch.ones(N) if bias else None)


def gradient(seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@formats
def test_project_finds_the_nearest_level(fmt: Format) -> None:
    weight, params = weight_of(3) * 1.5, fmt.nearest(weight_of()).params
    every = torch.stack([fmt.dequantize(Codes(torch.full((N, K), c, dtype=torch.uint8), params)) for c in range(levels(fmt))])
    best = (every - weight).abs().amin(0)
    chosen = fmt.dequantize(Codes(fmt.project(weight, params), params))
    assert torch.allclose((chosen - weight).abs(), best, atol=1e-7)


def levels(fmt: Format) -> int:
    return 2**fmt.bits if isinstance(fmt, IntGroup | FpChannel | BinaryDual) else 16


@formats
def test_an_untrained_layer_is_the_packed_one(fmt: Format) -> None:
    layer = packed(fmt, Int8Token(rotate=32), bias=True)
    x = gradient(5)[:, :K]
    trained = Trained(layer)
    trained.refresh(torch.float32)
    assert torch.allclose(trained(x), layer(x), atol=1e-5)
    before = packed(fmt, Int8Token(rotate=32)).fields()
    after = trained.fields()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)


@formats
def test_scales_get_the_gradient_of_the_weight(fmt: Format) -> None:
    trained = Trained(packed(fmt))
    trained.refresh(torch.float32)
    grad = gradient()
    (trained.dense * grad).sum().backward()
    assert torch.allclose(trained.collect(), grad)
    for name, theta in trained.theta.items():
        step = 1e-3
        if name == "weight_scale":  # W is linear in a scale, so dL/dtheta = sum over its group of g W
            parts = [trained.weight(trained.codes).detach()]
            if isinstance(fmt, BinaryDual):  # of each plane by itself
                parts = [trained.weight(trained.codes & bit).detach() for bit in (1, 2)]
            by_group = [(grad * part).view(N, theta.shape[1], -1).sum(-1) for part in parts]
            wanted = torch.stack(by_group, -1).view_as(theta)
            assert torch.allclose(theta.grad, wanted, rtol=2e-3, atol=1e-5)
        total = []
        for sign in (1, -1):
            moved = {n: t.float() * (sign * step if n == name else 0.0 * step) for n, t in trained.start.items() if n == name}
            shifted = {**trained.start, name: trained.start[name].float() + moved[name]}
            total.append(float((fmt.dequantize(Codes(trained.codes, shifted)) * grad).sum()))
        assert float(theta.grad.sum()) == pytest.approx((total[0] - total[1]) / (2 * step), rel=2e-2, abs=1e-3)


@formats
def test_stored_scales_stay_finite_and_whole_weights_keep_theirs(fmt: Format) -> None:
    trained = Trained(packed(fmt))
    assert not fmt.whole & trained.theta.keys()  # a divisor is shared by the layers that engines fuse
    for theta in trained.theta.values():
        theta.data.fill_(0.5)  # NVFP4 stores its largest scale as 448 already
    assert bool(trained.format.dequantize(Codes(trained.codes, trained.params())).isfinite().all())


def test_tokens_are_rounded_straight_through() -> None:
    trained = Trained(packed(IntGroup(bits=4, group=32), Int8Token()))
    trained.refresh(torch.float32)
    x = gradient(7)[:5].requires_grad_()
    trained(x).sum().backward()
    assert torch.allclose(x.grad, trained.dense.sum(0).expand(5, K), atol=1e-5)
