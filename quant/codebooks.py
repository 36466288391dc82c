"""Additive codebooks for a weight, chosen by the inputs' Gram matrix: loss tr(D H D'), D = W - W^, W^ = s * sum of vectors.

    codes     tile by tile, book by book: the entry of least loss, all other tiles as they are (AQLM's search, beam 1)
    codebooks least squares in all entries at once, by conjugate gradients
    scales    s = (w H v') / (v H v') per row, v the row before scaling

take turns, each no worse than before (Egiazarian et al., 2024, train codebooks and scales by Adam instead).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from quant.kernels.format import Codes
from quant.kernels.formats.codebook import Codebook
from quant.kernels.nearest import sweep

ENOUGH = 1e-8  # of the first residual's energy: what is left is rounding; two books have directions that change nothing
PANEL = 128  # channels: fewer are more products with the whole slope, more a longer part of it to correct after every tile


def loss(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """tr(D H D')."""
    lost = weight - found
    return float((lost @ gram * lost).sum())


def search_codes(weight: Tensor, gram: Tensor, codes: Tensor, books: Tensor, scale: Tensor) -> Tensor:
    """One sweep: codes uint8 [N, K // g, M] whose loss is no greater.

    weight [N, K], gram [K, K], books [M, 256, g], scale [N, 1], float32. With R = D H, a change d of a row's vectors, in units
    of its scale s, moves the loss by s^2 (d H d' - 2 (R / s) d'). What a panel of tiles has changed reaches the slope R / s of
    the channels behind it in one product, as in blocked GPTQ.
    """
    count, _, group = books.shape
    fmt = Codebook(books=count, group=group)
    lost = weight - fmt.dequantize(Codes(codes, {"codebook": books, "weight_scale": scale}))
    slope = torch.where(scale > 0, (lost @ gram).div_(scale), 0.0)
    found, begin = [], 0
    for tiles in torch.split(codes, max(1, PANEL // group), dim=1):
        end = begin + tiles.shape[1] * group
        changed, moved = sweep(slope[:, begin:end], tiles, books, gram[begin:end, begin:end])
        slope[:, end:].addmm_(moved, gram[begin:end, end:], alpha=-1)
        found.append(changed)
        begin = end
    return torch.cat(found, 1)


def fit_books(weight: Tensor, gram: Tensor, codes: Tensor, books: Tensor, scale: Tensor, rounds: int) -> Tensor:
    """Codebooks [M, 256, g] of smaller loss: `rounds` of conjugate gradients on the normal equations, from those given.

    Entries are preconditioned by how much weight their tiles carry.
    """
    count, entries, group = books.shape
    places = codes.long().flatten(0, 1) + torch.arange(count, device=codes.device) * entries  # [T, M] into [M * 256, g]

    def spread(values: Tensor) -> Tensor:
        return embedding_bag(places, values.view(-1, group), mode="sum").view(weight.shape) * scale

    def gather(matrix: Tensor) -> Tensor:
        out = torch.zeros(count * entries, group, dtype=matrix.dtype, device=matrix.device)
        for column in places.unbind(1):
            out.index_add_(0, column, matrix.view(-1, group))
        return out.view_as(books)

    pull = gather(gram.diagonal() * scale.square())
    inverse = torch.where(pull > 0, 1 / pull.clamp_min(1e-30), 0.0)
    found = books.clone()
    rest = gather((weight - spread(found)) @ gram * scale)
    ready = inverse * rest
    way, energy = ready.clone(), (rest * ready).sum()
    enough = ENOUGH * float(energy)
    for _ in range(rounds):
        seen = gather(spread(way) @ gram * scale)
        size = (way * seen).sum()
        if float(size) <= 0 or float(energy) <= enough:
            break
        found += energy / size * way
        rest -= energy / size * seen
        ready = inverse * rest
        last, energy = energy, (rest * ready).sum()
        way = ready + energy / last * way
    return found


def fit_scales(weight: Tensor, gram: Tensor, unscaled: Tensor) -> Tensor:
    """The scales [N, 1] of least loss for rows [N, K] before scaling."""
    pulled = unscaled @ gram
    found = (pulled * weight).sum(1, keepdim=True) / (pulled * unscaled).sum(1, keepdim=True).clamp_min(1e-30)
    return found.clamp_min(0)


def fit(weight: Tensor, gram: Tensor, fmt: Codebook, sweeps: int, rounds: int, tolerance: float) -> Codes:
    """Codes of a weight float32 [N, K]: from `Codebook.nearest` on, until a sweep gains less than `tolerance` of the loss."""
    best = fmt.nearest(weight)
    codes, books, scale = best.codes, best.params["codebook"].float(), best.params["weight_scale"]
    least = loss(weight, fmt.dequantize(best), gram)
    for _ in range(sweeps):
        codes = search_codes(weight, gram, codes, books, scale)
        books = fit_books(weight, gram, codes, books, scale, rounds)
        params = {"codebook": books, "weight_scale": torch.ones_like(scale)}
        scale = fit_scales(weight, gram, fmt.dequantize(Codes(codes, params)))
        books = books.half().float()
        found = Codes(codes, {"codebook": books.half(), "weight_scale": scale})
        now = loss(weight, fmt.dequantize(found), gram)
        if now < least:
            gained, best, least = 1 - now / least, found, now
        else:
            gained = 0.0
        if gained < tolerance:
            break
    return best
