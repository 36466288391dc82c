"""AQLM: every step lowers the loss, codebooks and scales are where its gradient vanishes, codes are the best of their tile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quant.codebooks import fit_books, fit_scales, loss, search_codes
from quant.kernels.format import Codes
from quant.kernels.formats.codebook import Codebook
from quant.kernels.formats.int_group import IntGroup
from quant.passes import aqlm, gptq
from quant.stats import InputStats

FORMATS = [Codebook(books=1, group=4), Codebook(books=2, group=8)]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=["1x8g4", "2x8g8"])


def start(fmt: Codebook, make_layer: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
    """weight, gram, codes, books, scale."""
    layer = make_layer(n=96)
    codes = fmt.nearest(layer.weight)
    return layer.weight, layer.stats.gram, codes.codes, codes.params["codebook"].float(), codes.params["weight_scale"]


def lost(fmt: Codebook, weight: torch.Tensor, gram: torch.Tensor, codes: torch.Tensor, *params: torch.Tensor) -> float:
    names = ("codebook", "weight_scale")
    return loss(weight, fmt.dequantize(Codes(codes, dict(zip(names, params, strict=True)))), gram)


@formats
def test_a_sweep_of_codes_lowers_the_loss_and_ends_at_the_best_of_each_tile(
    fmt: Codebook, make_layer: Callable[..., Any]
) -> None:
    weight, gram, codes, *params = start(fmt, make_layer)
    values = [lost(fmt, weight, gram, codes, *params)]
    for _ in range(30):
        codes = search_codes(weight, gram, codes, *params)
        values.append(lost(fmt, weight, gram, codes, *params))
    assert all(now <= before * 1.00001 for before, now in itertools.pairwise(values))
    assert values[1] < 0.9 * values[0]
    for m in range(fmt.books):  # no single code can do better
        for entry in range(0, 256, 51):
            tried = codes.clone()
            tried[3, 5, m] = entry
            assert lost(fmt, weight, gram, tried, *params) >= values[-1] * 0.99999


@formats
def test_codebooks_are_least_squares(fmt: Codebook, make_layer: Callable[..., Any]) -> None:
    weight, gram, codes, books, scale = (t.double() if t.is_floating_point() else t for t in start(fmt, make_layer))
    found = fit_books(weight, gram, codes, books, scale, 400).requires_grad_()
    before = books.clone().requires_grad_()
    slopes = []
    for given in (before, found):
        d = weight - fmt.dequantize(Codes(codes, {"codebook": given, "weight_scale": scale})).double()
        (d @ gram * d).sum().backward()
        slopes.append(float(given.grad.norm()))
    assert slopes[1] < 1e-3 * slopes[0]
    assert lost(fmt, weight, gram, codes, found.detach(), scale) < 0.9 * lost(fmt, weight, gram, codes, books, scale)


@formats
def test_scales_are_least_squares(fmt: Codebook, make_layer: Callable[..., Any]) -> None:
    weight, gram, codes, books, scale = start(fmt, make_layer)
    plain = fmt.dequantize(Codes(codes, {"codebook": books, "weight_scale": torch.ones_like(scale)}))
    found = fit_scales(weight, gram, plain)
    best = lost(fmt, weight, gram, codes, books, found)
    for factor in (0.99, 1.01):
        assert lost(fmt, weight, gram, codes, books, found * factor) > best


def test_codebooks_lose_less_than_gptq_of_more_bits(make_layer: Callable[..., Any]) -> None:
    layer, fmt, grid = make_layer(n=256, k=256, tokens=600), Codebook(), IntGroup(bits=2, group=64)
    coded = fmt.dequantize(aqlm.Pass(shrink=0).quantize(layer.weight, layer.stats, fmt))
    plain = grid.dequantize(gptq.Pass().quantize(layer.weight, layer.stats, grid))
    assert layer.output_error(coded) < 0.95 * layer.output_error(plain)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_channels_without_data_are_near_their_entries(share: float, make_layer: Callable[..., Any]) -> None:
    """Some, and all of them."""
    fmt, layer = FORMATS[0], make_layer(n=96)
    silent = int(share * layer.x.shape[1])
    x = layer.x.clone()
    x[:, :silent] = 0
    stats = InputStats.empty(x.shape[1], torch.device("cpu"), drift=False)
    stats.add(x.unsqueeze(0), None, None)
    stats.finish()
    codes = aqlm.Pass().quantize(layer.weight, stats, fmt)
    vectors = (layer.weight / codes.params["weight_scale"])[:, :silent].reshape(-1, fmt.group)
    book = codes.params["codebook"][0].float()
    chosen = book[codes.codes[:, : silent // fmt.group, 0].flatten().long()]
    assert (vectors - chosen).norm() < 1.05 * torch.cdist(vectors, book).amin(1).norm()  # codebooks move once more after codes
