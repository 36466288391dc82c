"""FineQuant: groups as long as the weights allow, eight bits where four fail, steps of either sign; nothing but weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from quant.kernels.formats.int_group import IntGroup
from quant.passes.finequant import Pass, by_rate, by_threshold, candidates, noise, relative_spread
from quant.stats import InputStats
from quant.targets import Target

ROW = IntGroup(bits=4, group=-1, symmetric=True)
NO_DATA = InputStats.without_data(0, torch.device("cpu"), 0)


def normal(n: int = 256, k: int = 2048, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def student(n: int = 256, k: int = 2048, seed: int = 0) -> Tensor:
    """t with three degrees of freedom."""
    torch.manual_seed(seed)
    return torch.distributions.StudentT(3.0).sample((n, k))


def outlier(channels: int = 1) -> Tensor:
    """Normal with channels 40 times as large, evenly spread."""
    w = normal()
    w[:, :: w.shape[1] // channels] *= 40
    return w


def chosen(weights: Mapping[str, Tensor], fmt: IntGroup = ROW, **options: object) -> dict[str, IntGroup]:
    """The formats that a family of layers gets."""
    family = [Target(name, *w.shape, False, fmt, "none", family="one") for name, w in weights.items()]
    return {name: choice.format for name, choice in Pass(**options).refine([family], lambda name: weights[name]).items()}


def group(weight: Tensor, fmt: IntGroup = ROW, **options: object) -> int:
    return chosen({"a": weight}, fmt, **options)["a"].group


def back(weight: Tensor, fmt: IntGroup, grid: str = "search") -> Tensor:
    """The weight as it is stored."""
    codes = Pass(grid=grid).quantize(weight, NO_DATA, fmt)
    fmt.check(fmt.pack(codes), *weight.shape)
    return fmt.dequantize(codes)


def test_the_rate_rule_stops_where_the_sheet_says() -> None:
    assert group(normal()) == 128
    assert group(student()) == 32
    assert group(outlier(16)) == 32
    assert group(torch.ones(4, 2048)) == -1


def test_the_threshold_rule_leaves_normal_weights_and_halves_others() -> None:
    first = IntGroup(bits=4, group=128, symmetric=True)
    assert group(normal(), first, rule="threshold") == 128
    assert group(student(), first, rule="threshold") == 32
    assert group(normal(), first, rule="threshold", alpha=1.0) == 32
    assert group(student(), first, rule="threshold", alpha=0.5) == 128


@pytest.mark.parametrize("make", [normal, student, outlier])
@pytest.mark.parametrize("options", [{"rule": "rate"}, {"rule": "threshold"}])
def test_the_choice_is_blind_to_scale_and_order_of_rows(make: Callable[[], Tensor], options: dict[str, object]) -> None:
    w = make()
    fmt = ROW if options["rule"] == "rate" else IntGroup(bits=4, group=128, symmetric=True)
    wanted = group(w, fmt, **options)
    assert group(w * 1e-3, fmt, **options) == wanted
    assert group(w[torch.randperm(len(w))], fmt, **options) == wanted


def test_an_outlier_channel_makes_groups_shorter() -> None:
    assert 0 < group(outlier(4)) < group(normal())


def test_two_steps_are_looked_at_before_stopping() -> None:
    """The outlier separates at the second step only."""
    spread, cost = [8.0, 7.9, 2.0, 1.9], [4.1, 4.2, 4.4, 4.8]
    assert by_rate(spread, cost, ahead=1) == 0
    assert by_rate(spread, cost, ahead=2) == 2
    assert by_rate(spread, cost, trade=0.0) == 3
    assert by_rate([0.0, 0.0], [4.0, 4.1]) == 0


def test_the_spread_never_grows_when_groups_are_halved() -> None:
    for w in (normal(), student(), outlier()):
        spread = [relative_spread(w, IntGroup(bits=4, group=g, symmetric=True)) for g in (2048, 1024, 512, 128, 64, 32)]
        assert all(0 < new <= old for old, new in itertools.pairwise(spread))
        assert by_threshold(spread, 1e-9) == 0


def test_predicted_noise_bounds_what_is_measured() -> None:
    for w, g in ((normal(), 128), (student(), 128), (student(), 32)):
        fmt = IntGroup(bits=4, group=g, symmetric=True)
        lost = w - fmt.dequantize(fmt.nearest(w))
        measured = float(lost.square().sum() / w.square().sum())
        predicted = noise(relative_spread(w, fmt), 4)
        assert 0.6 * predicted < measured < predicted


def test_candidates_divide_k_and_end_at_the_smallest() -> None:
    assert [f.group for f in candidates(ROW, 576, 32)] == [-1, 288, 192, 96, 64, 32]
    assert [f.group for f in candidates(ROW, 4096, 16)] == [-1, 1024, 512, 256, 128, 64, 32, 16]


def test_a_family_takes_the_shortest_groups_and_the_most_bits() -> None:
    assert {f.group for f in chosen({"a": normal(), "b": student()}).values()} == {32}
    wild = torch.distributions.StudentT(1.5).sample((64, 2048))
    mixed = chosen({"a": normal(), "b": wild})
    assert {(f.bits, f.group) for f in mixed.values()} == {(8, 32)}
    assert {f.bits for f in chosen({"a": normal(), "b": wild}, tau=1e6).values()} == {4}
    assert chosen({"a": wild})["a"].bits == 8


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("size", [16, 64, -1])
def test_errors_stay_within_half_a_step(bits: int, size: int) -> None:
    """Half a step inside the representable range; beyond it only positive codes are missing, and by one."""
    w, fmt = student(32, 192), IntGroup(bits=bits, group=size, symmetric=True)
    half = 2 ** (bits - 1)
    for grid in ("search", "signed", "absmax"):
        codes = Pass(grid=grid).quantize(w, NO_DATA, fmt)
        step = codes.params["weight_scale"].float().repeat_interleave(192 // fmt.groups(192), 1)
        place = w / step
        inside = (place > -half - 0.5) & (place < half - 0.5)
        error = (w - fmt.dequantize(codes)).abs() / step.abs()
        assert float(error[inside].max()) <= 0.5 + 1e-4
        if grid != "search":
            slack = half * 2.0**-11 + 1e-4  # the scale is rounded to float16
            assert float(error.max()) <= 1.0 + slack
            outside = ~inside & (error > 0.5 + slack)
            assert bool((place[outside] > 0).all())
        if grid == "absmax":
            assert bool((step > 0).all())


def test_the_signed_grid_keeps_the_extreme_and_the_search_loses_least() -> None:
    w, fmt = student(64, 512), IntGroup(bits=4, group=64, symmetric=True)
    grouped, signed = w.view(64, 8, 64), back(w, fmt, "signed").view(64, 8, 64)
    at = grouped.abs().argmax(-1, keepdim=True)
    assert torch.allclose(signed.gather(-1, at), grouped.gather(-1, at), rtol=1e-3)
    assert bool((Pass(grid="signed").quantize(w, NO_DATA, fmt).params["weight_scale"] < 0).any())
    lost = {grid: (w - back(w, fmt, grid)).view(64, 8, 64).square().sum(-1) for grid in ("search", "signed", "absmax")}
    plain = (w - fmt.dequantize(fmt.nearest(w))).view(64, 8, 64).square().sum(-1)
    assert bool((lost["search"] <= lost["signed"] * (1 + 1e-5)).all())
    assert bool((lost["search"] <= plain * (1 + 1e-5)).all())
    assert float(lost["signed"].sum()) < 0.95 * float(lost["absmax"].sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("grid", ["search", "signed"])
def test_what_is_quantized_already_stays_as_it_is(bits: int, grid: str) -> None:
    for fmt in (IntGroup(bits=bits, group=32, symmetric=True), IntGroup(bits=bits, group=-1, symmetric=True)):
        once = back(student(64, 256), fmt, grid)
        assert torch.equal(back(once, fmt, grid), once)


def test_zeros_and_tiny_weights_are_exact_or_nearly() -> None:
    w = torch.zeros(4, 64)
    w[1] = 1e-6 * normal(1, 64)[0]
    w[2, :32] = 1.0
    for grid in ("search", "signed", "absmax"):
        stored = back(w, IntGroup(bits=4, group=32, symmetric=True), grid)
        assert bool((stored[0] == 0).all())
        assert bool((stored[2, 32:] == 0).all())
        assert stored.isfinite().all()


def test_formats_without_symmetry_are_refused() -> None:
    assert "format.symmetric" in str(Pass().refuses(IntGroup(bits=4, group=64)))
