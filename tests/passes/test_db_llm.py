"""db_llm: least squares never loses, planes are the nearest levels, and each step lowers the output error of the one before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quant.dual import fit, lost, ordered, planes, search_scales, weighed
from quant.grid import Dual
from quant.kernels.format import Codes, Format
from quant.kernels.formats.binary_dual import BinaryDual, levels
from quant.kernels.formats.int_group import IntGroup
from quant.passes.base import Quantizer
from quant.passes.db_llm import Pass
from quant.passes.gptq import Pass as Gptq
from quant.passes.rtn import Pass as Rtn
from quant.refit import refit_planes

N, GROUPS, SIZE = 30, 5, 32


def problem(seed: int, blocks: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [N, G, size] with skewed groups, a metric, scales in order and of both orientations."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(N, GROUPS, SIZE, generator=generator) + torch.randn(N, GROUPS, 1, generator=generator) * 0.7
    x = torch.randn(GROUPS, 200, SIZE, generator=generator) * torch.rand(GROUPS, 1, SIZE, generator=generator)
    gram = x.transpose(1, 2) @ x
    scales = torch.tensor([1.4, -0.6]) * torch.where(torch.rand(N, GROUPS, 1, generator=generator) < 0.5, -1.0, 1.0)
    return values, gram if blocks else gram.diagonal(dim1=1, dim2=2).contiguous(), scales


def test_planes_are_those_of_the_nearest_level() -> None:
    values, metric, scales = problem(0, False)
    for ratio in (-1.0, -0.5, -0.01, 0.3, 1.0):
        tried = torch.stack((scales[..., 0], ratio * scales[..., 0]), -1)
        distance = torch.stack([(values - level.unsqueeze(-1)).abs() for level in levels(tried)]).amin(0)
        assert torch.allclose(lost(values, tried, metric), (metric * distance.square()).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("blocks", [False, True])
def test_fitted_scales_leave_a_residual_orthogonal_to_both_planes(blocks: bool) -> None:
    values, metric, scales = problem(1, blocks)
    first, second = planes(values, scales)
    fitted = fit(values, first, second, scales, metric)

    def loss(a: torch.Tensor) -> torch.Tensor:
        error = values - a[..., :1] * first - a[..., 1:] * second
        return (weighed(error, metric) * error).sum(-1)

    assert bool((loss(fitted) <= loss(scales) * (1 + 1e-5)).all())
    residual = weighed(values - fitted[..., :1] * first - fitted[..., 1:] * second, metric)
    moved = (fitted != scales).all(-1)
    assert float(moved.float().mean()) > 0.9
    for plane in (first, second):
        inner = (residual * plane).sum(-1)[moved]
        size = (weighed(values, metric) * values).sum(-1).sqrt()[moved] * (weighed(plane, metric) * plane).sum(-1).sqrt()[moved]
        assert float((inner.abs() / size).max()) < 1e-3


def test_an_empty_plane_keeps_its_scales() -> None:
    values, metric, scales = problem(2, False)
    nothing, some = torch.zeros_like(values), torch.ones_like(values)
    assert torch.equal(fit(values, some, nothing, scales, metric), scales)
    assert torch.equal(fit(values, some, some, scales, metric), scales)


def test_alternation_never_loses_in_its_own_metric() -> None:
    """Squared errors of normal weights in groups of 64: full range, searched step and orientation, least squares."""
    w = torch.randn(500, 64, generator=torch.Generator().manual_seed(3))
    metric, fmt = torch.ones(1, 64), BinaryDual(group=-1)
    errors = [float((fmt.dequantize(fmt.nearest(w)) - w).square().mean())]
    for rounds in (0, 1, 3, 10):
        (scales,) = search_scales(w, metric, rounds)
        errors.append(float(lost(w.view(500, 1, 64), scales, metric).mean()) / 64)
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.85 * errors[0]
    assert errors[-1] < 0.95 * errors[1]


def test_a_weight_of_two_planes_is_found_again() -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 4, (8, 128), generator=generator, dtype=torch.uint8)
    scale = torch.tensor([0.5, -0.23]) * (0.5 + torch.rand(8, 4, 1, generator=generator))
    weight = BinaryDual(group=32).dequantize(Codes(codes, {"weight_scale": scale}))
    (found,) = search_scales(weight, torch.ones(4, 32), 10)
    assert torch.allclose(found, scale, rtol=1e-4)
    x = torch.randn(300, 128, generator=generator)
    bits = torch.stack((codes & 1, codes >> 1), 1).float()
    fitted = refit_planes(weight, x.T @ x, bits, 1.2 * scale.transpose(1, 2)).transpose(1, 2)
    assert float((fitted - scale).norm() / scale.norm()) < 0.01


def test_ordered_scales_are_the_same_weight() -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 4, (6, 64), generator=generator, dtype=torch.uint8)
    scale, fmt = torch.randn(6, 4, 2, generator=generator), BinaryDual(group=16)
    turned, swapped = ordered(scale, codes)
    assert bool((turned[..., 0].abs() >= turned[..., 1].abs()).all())
    before, after = (fmt.dequantize(Codes(c, {"weight_scale": s})) for c, s in ((codes, scale), (swapped, turned)))
    assert torch.equal(before, after)
    grid = Dual.of(turned)
    values = grid.levels(swapped) * grid.step.repeat_interleave(16, 1)
    assert torch.allclose(values, before, atol=1e-6)
    assert torch.equal(grid.codes(grid.levels(swapped)), swapped)
    rule, order = grid.rule(torch.arange(64)), torch.randn(6, 64, generator=generator)
    rounded = torch.stack([rule.nearest(order[:, j], j) for j in range(64)], 1)
    distance = torch.stack([(order - v.repeat_interleave(16, 1)).abs() for v in levels(turned / turned[..., :1])]).amin(0)
    assert torch.allclose((rounded - order).abs(), distance, atol=1e-6)


def test_every_step_lowers_the_output_error(make_layer: Callable) -> None:
    """Nearest levels; searched; fitted; GPTQ; refitted: on the mean of some layers, and below gptq's grid of equal steps."""
    fmt = BinaryDual(group=32)
    steps = [
        Pass(round="nearest", alternations=0),
        Pass(round="nearest"),
        Pass(refits=0),
        Pass(),
    ]
    layers = [make_layer(seed=seed) for seed in range(4)]

    def total(quantizer: Quantizer, fmt: Format) -> float:
        return sum(y.output_error(fmt.dequantize(quantizer.quantize(y.weight, y.stats, fmt))) for y in layers)

    errors = [total(quantizer, fmt) for quantizer in (Rtn(), *steps)]
    assert errors == sorted(errors, reverse=True)
    affine = IntGroup(bits=2, group=32)
    assert errors[-1] < total(Gptq(refits=2), affine)
