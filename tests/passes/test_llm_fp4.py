"""llm_fp4: each search never loses to its start, closed forms equal the sums they stand for, the joint choice pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.kernels.activations.fp_shift import FpShift
from quant.kernels.activations.none import Unquantized
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.formats.int_group import IntGroup
from quant.kernels.minifloat import EXPONENTS, Minifloat
from quant.minifloat_search import (
    channel_sizes,
    compensated,
    noisy_gram,
    ratios,
    search_input,
    search_weight,
    shifts,
)
from quant.passes.llm_fp4 import Pass
from quant.search import gram_blocks, output_error
from quant.stats import InputStats

SPACES = ("clip", "paper")
RULES = [FpShift(bits=bits, dynamic=dynamic) for bits in (4, 8) for dynamic in (False, True)]
RULES += [FpShift(bits=bits, dynamic=True, group=32) for bits in (4, 8)]
rules = pytest.mark.parametrize("rule", RULES, ids=str)


def sequences(x: Tensor, length: int = 8) -> InputStats:
    """Statistics of short sequences, of which every token is kept."""
    stats = InputStats.empty(x.shape[1], x.device, drift=False)
    stats.add(x.view(-1, length, x.shape[1]), None, None)
    stats.finish()
    return stats


def joint_error(x: Tensor, weight: Tensor, fmt: FpChannel, codes: Codes, rule: FpShift, inputs: Fields) -> float:
    """||X W^T - Xq Wq^T|| / ||X W^T|| in float64."""
    wanted = x.double() @ weight.double().T
    given = rule.quantize(x, inputs).double() @ fmt.dequantize(codes).double().T
    return float((given - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("fmt", [FpChannel(), FpChannel(group=32), FpChannel(bits=8)], ids=str)
def test_the_weight_search_never_loses_to_the_full_range(fmt: FpChannel, space: str, make_layer: Callable) -> None:
    layer = make_layer(n=8)
    gram, groups = layer.stats.gram, fmt.groups(128)
    blocks = gram_blocks(gram, 128 // groups)

    def loss(step: Tensor, e: int) -> float:
        lost = (layer.weight - fmt.dequantize(fmt.encode(layer.weight, step, e))).view(8, groups, -1).double()
        return float(sum((lost[:, g] @ blocks[g].double() * lost[:, g]).sum() for g in range(groups)))

    full = {e: loss(fmt.range_step(layer.weight, e), e) for e in EXPONENTS[fmt.bits]}
    found = {e: loss(*search_weight(layer.weight, blocks, fmt, [e], space)) for e in EXPONENTS[fmt.bits]}
    step, chosen = search_weight(layer.weight, blocks, fmt, EXPONENTS[fmt.bits], space)
    assert all(found[e] <= full[e] * (1 + 1e-5) for e in full)
    assert chosen == min(found, key=lambda e: found[e])
    assert loss(step, chosen) < 0.99 * min(full.values())
    assert torch.equal(step, fmt.storable(step))


def test_the_paper_grid_scales_the_exponent_bias() -> None:
    """gamma * b: at row maximum 0.05, E2M1 has b = 7.9; gamma 0.01 zeroes the row, the last clips to about a third."""
    kind, absmax = Minifloat(2, 1), torch.tensor([0.05, 12.0])
    found = torch.stack([r.expand(2) for r in ratios("paper", kind, absmax)])
    assert len(found) == 101
    assert found[0].tolist() == [1, 1]
    assert found[1, 0] > 200
    assert found[-1, 0] == pytest.approx(1 / 3, abs=0.03)
    bias = 4 - math.log2(0.05) + math.log2(1.5) - 1  # eq. 7
    gamma = 0.01 + 1.19 * 0.5
    largest = 1.5 * 2 ** (3 - gamma * bias)  # Qmax(e, m, b)
    assert float(found[51, 0]) == pytest.approx(largest / 0.05, rel=1e-4)
    assert (found[:, 1] - 1).abs().max() < 1e-5  # b = 0: all candidates coincide


@rules
@pytest.mark.parametrize("space", SPACES)
def test_the_token_search_never_loses_to_the_full_range(rule: FpShift, space: str, make_layer: Callable) -> None:
    layer = make_layer(n=16, tokens=160)
    x, fmt = layer.x, FpChannel()
    codes, tokens = fmt.nearest(layer.weight), (x, torch.ones(len(x)))
    start = rule.fit(x, x.abs().amax(0))
    rounded = fmt.dequantize(codes)
    for shifted in (False, True):
        sizes = channel_sizes(rule, tokens, x.abs().amax(0))
        found = search_input(rule, tokens, sizes, layer.weight, rounded, EXPONENTS[rule.bits], space, shifted)
        rule.check(found, 16, 128)
        before, after = (joint_error(x, layer.weight, fmt, codes, rule, inputs) for inputs in (start, found))
        assert after <= before * (1 + 1e-6)
        assert after < 0.9 * before or rule.bits == 8 or rule.dynamic


@pytest.mark.parametrize("n", [16, 160])
def test_the_sampled_error_is_the_error_of_the_output(n: int, make_layer: Callable) -> None:
    """Weights of tokens are the sum over repeated tokens; no ratio near the one found has a smaller ||X W^T - Xq Wq^T||."""
    layer, rule, fmt = make_layer(n=n, tokens=80), FpShift(bits=4), FpChannel()
    rounded = fmt.dequantize(fmt.nearest(layer.weight))
    count = torch.arange(80).remainder(3) + 1.0
    repeated = layer.x.repeat_interleave(count.long(), 0)
    sizes = layer.x.abs().amax(0)
    args = (sizes, layer.weight, rounded, EXPONENTS[4])
    weighted = search_input(rule, (layer.x, count), *args)
    plain = search_input(rule, (repeated, torch.ones(len(repeated))), *args)
    assert all(torch.equal(weighted[name], plain[name]) for name in plain)
    codes = fmt.nearest(layer.weight)
    found = joint_error(repeated, layer.weight, fmt, codes, rule, plain)
    for ratio in (0.75, 1.35):
        other = plain | {"input_scale": plain["input_scale"] * ratio}
        assert found < joint_error(repeated, layer.weight, fmt, codes, rule, other)


def test_shifts_follow_the_channel_sizes() -> None:
    kind, sizes = Minifloat(2, 1), torch.tensor([8.0, 4.0, 3.0, 1.0, 0.4, 0.0])
    n = shifts(sizes, sizes.amax(), kind)
    assert n.tolist() == [0, 1, 1, 3, 3, 3]  # round(log2(top / size)), at most 2^e - 1; the largest stays
    smaller = sizes.clone()
    smaller[1] /= 4
    assert shifts(smaller, sizes.amax(), kind)[1] == n[1] + 2


def test_the_closed_form_of_the_row_error(make_layer: Callable) -> None:
    """w' = A^-1 B w turns ||Xq wq - X w||^2 into (wq - w')^T A (wq - w') + const."""
    layer, rule = make_layer(n=6, tokens=400), FpShift(bits=4)
    x = layer.x.double()
    seen = rule.quantize(layer.x, rule.fit(layer.x, layer.x.abs().amax(0))).double()
    gram, cross = seen.T @ seen + 1e-6 * torch.eye(128), seen.T @ x
    aim = compensated(layer.weight, gram, cross, damp=1e-9)
    consts = []
    for e in (1, 2, 3):
        q = FpChannel().dequantize(FpChannel().encode(layer.weight, FpChannel().range_step(layer.weight, e), e)).double()
        by_tokens = (seen @ q.T - x @ layer.weight.double().T).square().sum(0)
        lost = q - aim.double()
        consts.append(by_tokens - ((lost @ gram) * lost).sum(1))
    for other in consts[1:]:
        assert torch.allclose(consts[0], other, rtol=1e-3, atol=1e-3 * float(consts[0].abs().max()))


def test_the_noisy_gram_is_that_of_rounded_gaussian_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40000, 24, generator=generator) @ (torch.eye(24) + 0.2 * torch.randn(24, 24, generator=generator))
    rule = FpShift(bits=4)
    inputs = rule.stored(x.abs().amax() * 0.8 / 1.75, torch.zeros(24), 1)
    seen = rule.quantize(x, inputs)
    gram, cross = noisy_gram(x.T @ x, (x[:4000], torch.ones(4000)), seen[:4000])
    for given, wanted in ((gram, seen.T @ seen), (cross, seen.T @ x)):
        assert (given - wanted).norm() < 0.02 * wanted.norm()
    wanted = seen.T @ seen - x.T @ x  # and not by luck: the change itself is met
    assert (gram - x.T @ x - wanted).norm() < 0.35 * wanted.norm()


@rules
@pytest.mark.parametrize("fmt", [FpChannel(), FpChannel(group=32)], ids=str)
def test_every_step_pays(rule: FpShift, fmt: FpChannel, make_layer: Callable) -> None:
    """Full range > searched > rounded by GPTQ, on tokens that were not seen, summed over layers."""
    naive = Pass(rounds=0, round="nearest")
    paper, ours = Pass(round="nearest", compensate=False, space="paper", window=-1), Pass()
    totals = []
    for quantizer in (naive, paper, ours):
        total = 0.0
        for seed in range(3):
            layer = make_layer(n=32, tokens=4000, seed=seed)
            stats, fresh = sequences(layer.x[:3200]), layer.x[3200:]
            codes, inputs = quantizer.decide(layer.weight, stats, fmt, rule)
            fmt.check(fmt.pack(codes), 32, 128)
            rule.check(inputs, 32, 128)
            total += joint_error(fresh, layer.weight, fmt, codes, rule, inputs)
        totals.append(total)
    assert totals[1] < totals[0]
    assert totals[2] < 0.97 * totals[1]


def test_the_naive_form_is_round_to_nearest(make_layer: Callable) -> None:
    layer, fmt, rule = make_layer(), FpChannel(), FpShift(bits=4)
    codes, inputs = Pass(rounds=0, round="nearest").decide(layer.weight, layer.stats, fmt, rule)
    plain, full = fmt.nearest(layer.weight), rule.fit(layer.x, layer.stats.absmax)
    assert torch.equal(codes.codes, plain.codes)
    assert all(torch.equal(inputs[name], full[name]) for name in full)


def test_behind_float_tokens_it_is_the_weight_search_alone(make_layer: Callable) -> None:
    layer, fmt = make_layer(), FpChannel(group=32)
    codes, inputs = Pass().decide(layer.weight, layer.stats, fmt, Unquantized())
    assert not inputs
    assert torch.equal(codes.codes, Pass().quantize(layer.weight, layer.stats, fmt).codes)
    near = Pass(round="nearest").quantize(layer.weight, layer.stats, fmt)
    lost = [output_error(layer.weight - fmt.dequantize(c), layer.stats.gram) for c in (codes, near, fmt.nearest(layer.weight))]
    assert lost[0] < 0.8 * lost[1] < 0.8 * lost[2]


def test_exponents_can_be_fixed_and_other_formats_are_refused(make_layer: Callable) -> None:
    layer, rule = make_layer(), FpShift(bits=4)
    for e in EXPONENTS[4]:
        fixed = Pass(weight_exponents=(e,), input_exponents=(e,))
        codes, inputs = fixed.decide(layer.weight, layer.stats, FpChannel(), rule)
        assert codes.params["weight_exponents"].tolist() == inputs["input_exponents"].tolist() == [e]
    assert "llm_fp4 writes fp_channel, not int_group" in str(Pass().refuses(IntGroup()))
    assert replace(rule, rotate=32).config() == {"name": "fp_shift", "rotate": 32, "bits": 4}
