"""Coded attention probabilities: both forms of a value, the error bound, order, masks, integer sums, and codes without exp."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quant.kernels.softmax import attend, codes_of_logits, codes_of_probabilities, split_product, values

BITS = [2, 3, 4, 6]


def logits(rows: int = 40, keys: int = 300, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, keys, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", BITS)
def test_both_forms_of_a_value_are_equal(bits: int) -> None:
    """2^(-q/2) == 2^(-ceil(q/2)) (1 + odd(q) (sqrt2 - 1)); the code above the last stands for zero."""
    q = torch.arange(2**bits, dtype=torch.int32)
    shift_form = 2.0 ** -((q + 1) // 2).double() * (1 + (q % 2).double() * (math.sqrt(2) - 1))
    assert torch.allclose(values(q, bits).double(), shift_form, rtol=1e-6)
    assert values(torch.tensor([2**bits]), bits) == 0


@pytest.mark.parametrize("bits", BITS)
def test_a_value_that_is_kept_errs_by_less_than_19_percent_and_order_stays(bits: int) -> None:
    p = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) ** 6
    codes = codes_of_probabilities(p, bits)
    back, kept = values(codes, bits), codes < 2**bits
    assert float(((back - p).abs() / p)[kept].max()) <= 2**0.25 - 1 + 1e-5
    assert float(((back - p).abs() / p)[kept].max()) > 0.18  # the bound is met
    assert float(p[~kept].max()) <= 2 ** (-(2**bits - 0.5) / 2) * (1 + 1e-5)  # only these are zero
    assert (back[p.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_codes_from_logits_are_those_from_exp(bits: int) -> None:
    scores = logits().double()
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    assert torch.equal(codes_of_logits(scores, bits), codes_of_probabilities(p, bits))


def test_masked_entries_are_zero() -> None:
    scores = logits(4, 10)
    for nothing in (-math.inf, torch.finfo(torch.float32).min):
        scores[:, 3] = nothing
        codes = codes_of_logits(scores, 4)
        assert (values(codes, 4)[:, 3] == 0).all()
        assert (values(codes, 4).amax(1) == 1).all()
    assert values(codes_of_probabilities(torch.zeros(3), 4), 4).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_shifts_and_two_sums_are_the_product(bits: int) -> None:
    """E over even codes and O over odd ones: E + sqrt2 O, with enough guard bits, is the dequantized matmul."""
    codes = codes_of_logits(logits(), bits)
    v = torch.randint(-128, 128, (300, 7), generator=torch.Generator().manual_seed(2))
    wanted = (2.0 ** (-codes.double() / 2)).masked_fill(codes >= 2**bits, 0) @ v.double()
    got = split_product(codes, v, bits)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-12


def test_the_float_row_sum_normalizes_better_than_that_of_the_codes() -> None:
    scores = logits(400).double()
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    coded, true = values(codes_of_logits(scores, 4), 4).double(), torch.softmax(scores, -1)
    error = [float((coded / total - true).norm()) for total in (p.sum(-1, keepdim=True), coded.sum(-1, keepdim=True))]
    assert error[0] < error[1]


@pytest.mark.parametrize(("tokens", "keys", "heads", "groups"), [(1, 37, 4, 2), (300, 300, 2, 2), (5, 64, 3, 1)])
def test_attention_is_the_definition(tokens: int, keys: int, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, heads, tokens, 16, generator=generator)
    k, v = torch.randn(2, 2, groups, keys, 16, generator=generator).unbind()
    seen = torch.arange(keys - tokens, keys)[:, None] >= torch.arange(keys)
    mask = torch.zeros(2, 1, tokens, keys).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask[1, :, :, :3] = torch.finfo(torch.float32).min  # padding on the left
    for given in (mask, None):
        got = attend(q, k, v, given, 0.25, 4)
        assert got.shape == (2, tokens, heads, 16)
        for b in range(2):
            for h in range(heads):
                s = q[b, h] @ k[b, h * groups // heads].T * 0.25
                s = s if given is None else s + given[b, 0]
                p = torch.softmax(s, -1)
                top = p.amax(-1, keepdim=True)
                coded = values(torch.round(-2 * torch.log2(p / top)).clamp(0, 16).int(), 4) * top
                assert (got[b, :, h] - coded @ v[b, h * groups // heads]).norm() < 0.01 * got[b, :, h].norm()
    fine = attend(q, k, v, mask, 0.25, 4)
    full = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
    plain = torch.nn.functional.scaled_dot_product_attention(q, *full, mask, scale=0.25)
    assert 0 < float((fine - plain.transpose(1, 2)).norm() / plain.norm()) < 0.2
