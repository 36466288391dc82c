"""Latent weights: exact at the start, gradients straight through, codes that follow within limits, ends that hold."""

from __future__ import annotations

import math

import pytest
import torch

from quant.kernels.activations.none import Unquantized
from quant.kernels.format import Codes, Format
from quant.kernels.formats.binary_dual import BinaryDual
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.linear import PackedLinear
from quant.train.latent import Discrete, Latent

N, K = 12, 64
FORMATS: list[Format] = [
    *(IntGroup(bits=bits, group=32, symmetric=symmetric) for bits in (2, 3, 4) for symmetric in (True, False)),
    Int4Dual(group=32),
    Fp4Block(kind="mxfp4"),
    Fp4Block(kind="nvfp4"),
    FpChannel(bits=4, group=32),
    BinaryDual(group=32),
]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: "-".join(map(str, fmt.config().values())))


def made(fmt: Format, **limits: float) -> Latent:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05
    layer = Latent(PackedLinear.from_fields(fmt.pack(fmt.nearest(weight)), fmt, Unquantized(), N, K, None), Discrete(**limits))
    layer.refresh(torch.float32)
    return layer


def gradient() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1))


@formats
def test_rounding_gives_the_packed_weight_at_first(fmt: Format) -> None:
    layer = made(fmt)
    before, stored = layer.weight(layer.codes).detach(), layer.fields()
    layer.hold()
    layer.settle()
    layer.refresh(torch.float32)
    assert torch.equal(layer.dense.detach(), before)
    assert all(torch.equal(layer.fields()[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored)


@formats
def test_a_latent_gets_the_gradient_of_its_weight_in_steps(fmt: Format) -> None:
    layer = made(fmt)
    layer.dense.grad = gradient()
    layer.collect()
    assert torch.allclose(layer.steps.grad, gradient() * layer.spread(fmt.steps(layer.start)))


@formats
def test_a_latent_leans_to_its_float_weight_and_keeps_its_code(fmt: Format) -> None:
    """As far as halving finds the code still the nearest: a weight that is nearest to its code anyway is its own latent."""
    packed_as = made(fmt)
    before = packed_as.weight(packed_as.codes).detach()
    weight = before + 0.7 * packed_as.spread(fmt.steps(packed_as.start)) * gradient()
    fields = PackedLinear.from_fields(packed_as.fields(), fmt, Unquantized(), N, K, None)
    layer = Latent(fields, toward=weight)
    start = (layer.steps * layer.spread(fmt.steps(layer.start))).detach()
    assert layer.settle() == 0

    def served(value: torch.Tensor) -> torch.Tensor:
        return fmt.dequantize(Codes(fmt.project(value, layer.start), layer.start))

    own = served(weight) == before
    assert 0.1 < float(own.float().mean()) < 0.9
    assert torch.allclose(start[own], weight[own], rtol=1e-5, atol=1e-7)
    share = ((start - before) / (weight - before))[~own]
    assert float(share.min()) > 0
    assert float(share.max()) <= 0.5 + 1e-5
    further = before + 2.001 * (start - before)
    assert not (served(further) == before)[~own].any()


@formats
def test_codes_are_those_nearest_to_the_latents_and_scales_alone_move_none(fmt: Format) -> None:
    layer = made(fmt)
    layer.steps.data -= gradient()
    layer.hold()
    layer.settle()
    layer.refresh(torch.float32)
    moved = layer.codes.clone()
    assert 0 < float((moved != made(fmt).codes).float().mean()) < 1
    params = layer.params()
    step = fmt.steps(params).repeat_interleave(K // fmt.steps(params).shape[1], 1)
    nearest = fmt.project(layer.steps.detach() * step, params)
    assert torch.equal(fmt.dequantize(Codes(moved, params)), fmt.dequantize(Codes(nearest, params)))  # 0 has two codes
    if isinstance(fmt, IntGroup):
        with torch.no_grad():
            for theta in layer.theta.values():
                theta += 0.03
        assert layer.settle() == 0
        assert torch.equal(layer.codes, moved)


@formats
def test_an_end_is_held_and_left_again_by_half_a_gap(fmt: Format) -> None:
    layer = made(fmt)
    layer.steps.data += 1000.0
    layer.hold()
    layer.settle()
    layer.settle()
    layer.refresh(torch.float32)
    top = layer.codes.clone()
    assert torch.allclose(layer.dense.detach() / layer.steps.detach(), layer.spread(fmt.steps(layer.params())))
    gap = {"fp4_block": 2.0, "fp_channel": 2.0}.get(fmt.name, 1.0)
    layer.steps.data -= 0.49 * gap
    assert layer.settle() == 0
    assert torch.equal(layer.codes, top)
    layer.steps.data -= 0.02 * gap
    layer.settle()
    assert not (layer.codes == top).any()


@formats
def test_no_move_no_change(fmt: Format) -> None:
    layer = made(fmt, tau=1.0)
    before = layer.codes.clone()
    assert layer.settle() == 0
    assert torch.equal(layer.codes, before)


@formats
def test_codes_move_against_the_gradient_and_few_at_a_time(fmt: Format) -> None:
    layer = made(fmt, tau=0.05)
    before = layer.weight(layer.codes).detach()
    layer.steps.data -= 0.6 * gradient()
    wanted = layer.steps.detach() * layer.spread(fmt.steps(layer.params()).detach())
    most = math.ceil(0.05 * N * K)
    assert 0 < layer.settle() <= most
    moved = layer.weight(layer.codes).detach() - before
    assert 0 < int((moved != 0).sum()) <= most
    assert bool((moved * gradient() <= 0).all())
    far = (wanted - before).abs().detach()
    nearest = fmt.dequantize(Codes(fmt.project(wanted, layer.params()), layer.params()))
    stayed = (nearest != before) & (moved == 0)
    assert float(far[moved != 0].min()) >= float(far[stayed].max())


@formats
def test_the_change_of_a_step_stays_within_the_trust_ratio(fmt: Format) -> None:
    for trust in (0.2, 0.5):
        layer = made(fmt, trust=trust)
        before = layer.weight(layer.codes).detach()
        layer.steps.data -= 2 * gradient()
        moved = layer.settle()
        change = (layer.weight(layer.codes).detach() - before).square().flatten().sort().values
        assert moved > 1
        assert float(change[:-1].sum().sqrt()) <= trust * float(before.norm())  # one more than that is let through


@formats
def test_what_did_not_move_is_forgotten_by_its_share(fmt: Format) -> None:
    for decay in (0.25, 1.0):
        layer = made(fmt, decay=decay)
        layer.steps.data -= 0.3 * gradient()
        wanted = layer.steps.detach().clone()
        layer.settle()
        served = layer.weight(layer.codes).detach() / layer.spread(fmt.steps(layer.params()))
        assert torch.allclose(layer.steps.detach(), (1 - decay) * wanted + decay * served, atol=1e-5)
