"""fp4: the searched scales lose least, the invariances of the format survive the pass, layers of a group share one divisor."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quant.grid import FloatGrid
from quant.kernels.format import Codes
from quant.kernels.formats.fp4_block import Fp4Block
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.minifloat import E2M1
from quant.passes.fp4 import Pass, search_scale
from quant.rounding import coordinate_descent, gptq
from quant.search import block_loss, gram_blocks
from quant.stats import InputStats

NV, MX = Fp4Block(kind="nvfp4"), Fp4Block(kind="mxfp4")
SEARCHES = {"nvfp4": ("nearest", "four_six", "shrink", "sweep"), "mxfp4": ("nearest", "floor", "rceil", "sweep")}
CASES = [(Fp4Block(kind=kind), how) for kind, names in SEARCHES.items() for how in names]
cases = pytest.mark.parametrize(("fmt", "how"), CASES, ids=lambda v: v if isinstance(v, str) else v.kind)


def losses(fmt: Fp4Block, weight: Tensor, gram: Tensor, params: dict[str, Tensor]) -> Tensor:
    """d^T H_gg d of the weight rounded to nearest under given scales, float64 [N, K // G]."""
    lost = (weight - fmt.dequantize(fmt.encode(weight, params))).double()
    return block_loss(lost.view(len(weight), -1, fmt.group), gram_blocks(gram.double(), fmt.group))


@cases
def test_gptq_moves_weights_further_and_outputs_less_far(fmt: Fp4Block, how: str, make_layer: Callable) -> None:
    layer = make_layer()
    plain, codes = (Pass(search=how, round=r).quantize(layer.weight, layer.stats, fmt) for r in ("nearest", "gptq"))
    for name, value in plain.params.items():
        assert torch.equal(codes.params[name].float(), value.float()), name  # the same grid
    near, far = fmt.dequantize(plain), fmt.dequantize(codes)
    assert (far - layer.weight).norm() > (near - layer.weight).norm()
    assert layer.output_error(far) < 0.9 * layer.output_error(near)


@pytest.mark.parametrize("fmt", [NV, MX], ids=lambda f: f.kind)
def test_the_sweep_loses_no_more_than_any_other_search_in_any_block(fmt: Fp4Block, make_layer: Callable) -> None:
    """Under one divisor, because its candidates hold all of theirs; and it is the best of all stored scales around."""
    layer = make_layer()
    loss = {}
    for how in SEARCHES[fmt.kind]:
        codes = Pass(search=how, round="nearest").quantize(layer.weight, layer.stats, fmt)
        loss[how] = losses(fmt, layer.weight, layer.stats.gram, dict(codes.params))
    for how, other in loss.items():
        assert (loss["sweep"] <= other * (1 + 1e-4)).all(), how
    assert loss["sweep"].sum() < 0.97 * loss["nearest"].sum()
    stored = dict(codes.params)
    byte = stored["weight_scale"].view(torch.uint8)
    for move in range(-6, 7):
        other = (byte.int() + move).clamp(8, 126).to(torch.uint8).view(stored["weight_scale"].dtype)
        near = (byte.int() + move).clamp(8, 126) - start_of(fmt, layer.weight, stored)
        within = near.abs() <= (8 if fmt.kind == "nvfp4" else 1)
        tried = losses(fmt, layer.weight, layer.stats.gram, stored | {"weight_scale": other})
        assert (loss["sweep"] <= tried * (1 + 1e-4))[within].all(), move


def start_of(fmt: Fp4Block, weight: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """The stored scale that the sweep starts from, as an integer."""
    blocks = gram_blocks(torch.eye(weight.shape[1]), fmt.group)
    whole = {name: value for name, value in stored.items() if name != "weight_scale"}
    return search_scale(fmt, weight, blocks, whole, "nearest").view(torch.uint8).int()


@pytest.mark.parametrize(("how", "low", "high"), [("floor", 4, 8), ("rceil", 3, 6), ("nearest", 3.5, 7)])
def test_exponent_rules_put_the_largest_weight_into_their_interval(how: str, low: float, high: float) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(-9, 9, 64).exp().unsqueeze(1)
    w[0, :64] = torch.tensor([6.0, 0.0]).repeat(32)  # an end of the intervals
    scale = search_scale(MX, w, gram_blocks(torch.eye(256), 32), {}, how)
    inside = w.view(64, -1, 32).abs().amax(-1) / MX.steps({"weight_scale": scale})
    assert inside.min() >= low
    assert inside.max() <= high
    assert inside.min() < low * 1.1
    assert inside.max() > high * 0.9


def test_four_over_six_leaves_scales_below_the_end(make_layer: Callable) -> None:
    layer = make_layer()
    codes = Pass(search="four_six", round="nearest").quantize(layer.weight, layer.stats, NV)
    assert codes.params["weight_scale"].float().max() <= 384
    plain = Pass(search="nearest", round="nearest").quantize(layer.weight, layer.stats, NV).params["weight_scale"].float()
    ratio = codes.params["weight_scale"].float() / plain
    assert 0.2 < float((ratio > 1.2).float().mean()) < 0.8  # both maps are used
    assert ((ratio == 1) | ((ratio > 1.35) & (ratio < 1.65))).all()


@pytest.mark.parametrize("fmt", [NV, MX], ids=lambda f: f.kind)
def test_a_power_of_two_moves_scales_and_no_code(fmt: Fp4Block, make_layer: Callable) -> None:
    layer = make_layer()
    one, other = (Pass().quantize(layer.weight * factor, layer.stats, fmt) for factor in (1, 32))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(fmt.dequantize(one) * 32, fmt.dequantize(other))


def test_a_row_comes_out_the_same_under_any_divisor(make_layer: Callable) -> None:
    layer = make_layer()
    tall = torch.cat([layer.weight, 300 * layer.weight[:4]])
    alone, together = (Pass().quantize(w, layer.stats, NV) for w in (layer.weight, tall))
    assert together.params["weight_global_scale"] < alone.params["weight_global_scale"]
    assert together.params["weight_global_scale"].shape == (1,)
    same = NV.dequantize(alone) == NV.dequantize(together)[: len(layer.weight)]
    assert same.float().mean() > 0.99  # but for blocks that E4M3's subnormals would hold, and ties


def test_rounding_on_the_fp4_grid_is_the_textbook(make_layer: Callable) -> None:
    """One channel after the other on an explicit inverse, in float64."""
    layer, k = make_layer(), 128
    params = dict(NV.nearest(layer.weight).params)
    grid, gram = FloatGrid(NV.steps(params), E2M1), layer.stats.gram
    w, h = layer.weight.double().clone(), gram.double()
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(k))
    wanted = torch.zeros_like(w)
    for j in sorted(range(k), key=lambda j: -float(gram[j, j])):
        step = grid.step[:, j // 16].double()
        wanted[:, j] = E2M1.round((w[:, j] / step).float()).double() * step
        lost = (w[:, j] - wanted[:, j]) / inverse[j, j]
        w -= lost.unsqueeze(1) * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
    codes = gptq(layer.weight, gram, grid)
    given = E2M1.decode(codes).view(len(w), -1, 16).double() * grid.step.double().unsqueeze(-1)
    assert (given.view(w.shape) == wanted).float().mean() > 0.99
    before = layer.output_error(given.view(w.shape))
    losing = [
        layer.output_error(NV.dequantize(Codes(coordinate_descent(layer.weight, gram, codes, grid, s), params)))
        for s in (1, 3, 20)
    ]
    for less, more in itertools.pairwise([*reversed(losing), before]):
        assert less <= more * (1 + 1e-6)
    assert losing[-1] < 0.97 * before


def test_what_it_cannot_write_is_refused() -> None:
    assert "use gptq or rtn" in str(Pass().refuses(IntGroup()))
    assert "search floor for mxfp4 only" in str(Pass(search="floor").refuses(NV))
    assert "search four_six for nvfp4 only" in str(Pass(search="four_six").refuses(MX))
    for fmt, how in CASES:
        assert Pass(search=how).refuses(fmt) is None


def test_uncorrelated_inputs_leave_round_to_nearest(make_layer: Callable) -> None:
    layer = make_layer()
    stats = InputStats(torch.diag(layer.stats.gram.diagonal()))
    for fmt in (NV, MX):
        near, gptq_codes = (Pass(round=r).quantize(layer.weight, stats, fmt) for r in ("nearest", "gptq"))
        assert torch.equal(E2M1.decode(near.codes), E2M1.decode(gptq_codes.codes))
