"""gptq: on the same grid it moves weights further than round-to-nearest and outputs less far."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.passes.gptq import Pass
from quant.stats import InputStats


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_error_rises_and_output_error_falls(bits: int, group: int, symmetric: bool, make_layer: Callable) -> None:
    layer, fmt = make_layer(), IntGroup(bits=bits, group=group, symmetric=symmetric)
    plain, codes = fmt.nearest(layer.weight), Pass(search=False).quantize(layer.weight, layer.stats, fmt)
    for name, value in plain.params.items():
        assert torch.equal(codes.params[name], value), name  # the same grid
    near, far = fmt.dequantize(plain), fmt.dequantize(codes)
    assert (far - layer.weight).norm() > (near - layer.weight).norm()
    assert layer.output_error(far) < 0.9 * layer.output_error(near)


def test_the_searched_grid_pays_at_few_bits(make_layer: Callable) -> None:
    layer, fmt = make_layer(), IntGroup(bits=2, group=32)
    errors = [
        layer.output_error(fmt.dequantize(Pass(search=search).quantize(layer.weight, layer.stats, fmt)))
        for search in (False, True)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_act_order_helps_where_channels_differ(make_layer: Callable) -> None:
    fmt, errors = IntGroup(bits=3, group=32), []
    for act_order in (False, True):
        total = 0.0
        for seed in range(4):
            layer = make_layer(seed=seed, skew=1.5)
            codes = Pass(act_order=act_order, sweeps=0).quantize(layer.weight, layer.stats, fmt)
            total += layer.output_error(fmt.dequantize(codes))
        errors.append(total)
    assert errors[1] < 0.97 * errors[0]


def test_uncorrelated_inputs_leave_round_to_nearest(make_layer: Callable) -> None:
    layer, fmt = make_layer(), IntGroup(bits=4, group=32)
    stats = InputStats(torch.diag(layer.stats.gram.diagonal()), layer.stats.drift)
    for act_order in (False, True):
        codes = Pass(search=False, act_order=act_order).quantize(layer.weight, stats, fmt)
        assert torch.equal(codes.codes, fmt.nearest(layer.weight).codes)


def test_codes_are_chosen_for_the_scales_that_are_stored(make_layer: Callable) -> None:
    """float16 rounds the searched scale first: with uncorrelated inputs each code is the nearest on what is read back."""
    layer, fmt = make_layer(), IntGroup(bits=8, group=32)
    stats = InputStats(torch.diag(layer.stats.gram.diagonal()), layer.stats.drift)
    codes = Pass().quantize(layer.weight, stats, fmt)
    scale, zero = (codes.params[name].float().unsqueeze(-1) for name in ("weight_scale", "weight_zero"))
    wanted = (torch.round(layer.weight.view(24, -1, 32) / scale) + zero).clamp(0, 255)
    assert torch.equal(codes.codes.float(), wanted.view(24, 128))


def test_the_other_format_is_refused_with_the_pass_for_it() -> None:
    assert "dgq" in str(Pass().refuses(Int4Dual()))
