"""PV-Tuning on codebooks: what P and V steps may change, gradients as autograd has them, tiles at their nearest entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quant.kernels.activations.none import Unquantized
from quant.kernels.format import Codes
from quant.kernels.formats.codebook import Codebook
from quant.linear import PackedLinear
from quant.train.latent import Discrete, Latent

N, K = 96, 128
FORMATS = [Codebook(books=1, group=4), Codebook(books=2, group=8)]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=["1x8g4", "2x8g8"])


def draw(seed: int) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def made(fmt: Codebook, **limits: float) -> Latent:
    codes = fmt.nearest(draw(0) * 0.05)
    layer = Latent(PackedLinear.from_fields(fmt.pack(codes), fmt, Unquantized(), N, K, None), Discrete(**limits))
    layer.refresh(torch.float32)
    return layer


def weight(layer: Latent) -> Tensor:
    return layer.weight(layer.codes).detach()


@formats
def test_nothing_moves_without_a_step(fmt: Codebook) -> None:
    layer = made(fmt)
    before, stored = weight(layer), layer.fields()
    layer.hold()
    assert layer.settle() == 0
    assert torch.equal(weight(layer), before)
    assert all(torch.equal(value, stored[name]) for name, value in layer.fields().items())


@formats
def test_latents_of_one_codebook_lean_to_their_float_weights(fmt: Codebook) -> None:
    layer = made(fmt)
    before, toward = weight(layer), weight(layer) + 0.02 * draw(1)
    leaned = Latent(PackedLinear.from_fields(layer.fields(), fmt, Unquantized(), N, K, None), toward=toward)
    start = (leaned.steps * leaned.spread(fmt.steps(leaned.start))).detach()
    assert leaned.settle() == 0
    if fmt.books > 1:
        assert torch.allclose(start, before, rtol=1e-5)
        return
    own = (fmt.nearer(toward, Codes(layer.codes, layer.start)) == layer.codes).all(-1).repeat_interleave(fmt.group, 1)
    assert 0.1 < float(own.float().mean()) < 0.9
    assert torch.allclose(start[own], toward[own], rtol=1e-5, atol=1e-7)
    share = ((start - before) / (toward - before))[~own]
    assert float(share.min()) > 0
    assert float(share.max()) < 0.51


@formats
def test_a_p_step_moves_codebooks_and_scales_by_their_gradients_and_no_code(fmt: Codebook) -> None:
    layer = made(fmt)
    layer.dense.grad = draw(1)
    layer.collect()
    params = {name: value.float().requires_grad_() for name, value in layer.start.items()}
    fmt.dequantize(Codes(layer.codes, params)).backward(draw(1))
    size = float(layer.start["codebook"].float().square().mean().sqrt())
    assert torch.allclose(layer.theta["codebook"].grad, size * params["codebook"].grad, rtol=1e-4, atol=1e-7)
    wanted = layer.start["weight_scale"] * params["weight_scale"].grad
    assert torch.allclose(layer.theta["weight_scale"].grad, wanted, rtol=1e-4, atol=1e-7)
    codes, before = layer.codes.clone(), weight(layer)
    with torch.no_grad():
        layer.theta["codebook"] -= 0.3
    assert not torch.equal(weight(layer), before)
    assert torch.equal(layer.codes, codes)


@formats
def test_a_v_step_changes_few_tiles_and_only_codes(fmt: Codebook) -> None:
    layer = made(fmt, tau=0.05)
    before, codes = weight(layer), layer.codes.clone()
    stored = layer.fields()
    layer.steps.data -= 1.5 * draw(1)
    latent = layer.steps.detach() * layer.spread(fmt.steps(layer.params()).detach())
    far = (latent - before).square().view(N, -1, fmt.group).sum(-1)
    most = math.ceil(0.05 * far.numel())
    assert 0 < layer.settle() <= most
    moved = (layer.codes != codes).any(-1)
    assert 0 < int(moved.sum()) <= most
    now = (latent - weight(layer)).square().view(N, -1, fmt.group).sum(-1)
    assert bool((now[moved] < far[moved]).all())
    assert torch.equal(now[~moved], far[~moved])
    assert float(far[moved].min()) >= float(far.flatten().topk(4 * most).values[-1])  # among those that want most
    after = layer.fields()
    assert all(torch.equal(after[name], stored[name]) for name in ("codebook", "weight_scale"))


def test_without_a_limit_every_tile_is_at_its_nearest_entry() -> None:
    fmt = FORMATS[0]
    layer = made(fmt, tau=1.0)
    layer.steps.data -= draw(1)
    layer.settle()
    latent = layer.steps.detach() * layer.spread(fmt.steps(layer.params()).detach())
    target = (latent / layer.start["weight_scale"]).view(N, -1, 1, fmt.group)
    nearest = (target - layer.start["codebook"][0].float()).square().sum(-1).argmin(-1)
    assert torch.equal(layer.codes[..., 0].long(), nearest)


@formats
def test_both_steps_together_follow_a_target(fmt: Codebook) -> None:
    """phi = |W - T|^2 for another weight T: falls step by step, further than by a P step alone."""
    target = draw(0) * 0.05 + 0.02 * draw(5)

    def trained(rate: float) -> list[float]:
        layer = made(fmt, tau=0.2)
        groups = [{"params": list(layer.theta.values()), "lr": 0.01}, {"params": [layer.steps], "lr": rate}]
        adam, lost = torch.optim.Adam(groups, betas=(0.9, 0.95)), []
        for step in range(60):
            layer.refresh(torch.float32)
            loss = (layer.dense - target).square().sum()
            loss.backward()
            layer.collect()
            for group, top in zip(adam.param_groups, (0.01, rate), strict=True):
                group["lr"] = top * (1 - step / 60)
            adam.step()
            adam.zero_grad()
            layer.settle()
            lost.append(float(loss.detach()))
        return lost

    alone, both = trained(0.0), trained(0.02)
    assert both[-1] < both[20] < both[0]
    assert both[-1] < 0.9 * alone[-1] < 0.9 * alone[0]


def test_no_entry_is_nearer_within_reach_of_a_tile() -> None:
    fmt = FORMATS[0]
    codes = fmt.nearest(draw(0) * 0.05)
    plain, reach = fmt.dequantize(codes).view(N, -1, 4), fmt.reach(codes)
    away = draw(3).view(N, -1, 4)
    away = away / away.norm(dim=-1, keepdim=True) * reach.sqrt().unsqueeze(-1)
    assert torch.equal(fmt.nearer((plain + 0.99 * away).view(N, K), codes), codes.codes)
    assert not torch.equal(fmt.nearer((plain + 8 * away).view(N, K), codes), codes.codes)
