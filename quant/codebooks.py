"""Additive codebooks for a weight, chosen by the inputs' Gram matrix: loss tr(D H D'), D = W - W^, W^ = s * sum of vectors.

    codes     tile by tile, book by book: the entry of least loss, all other tiles as they are (AQLM's search, beam 1)
    codebooks least squares in all entries at once, by conjugate gradients
    scales    s = (w H v') / (v H v') per row, v the row before scaling

take turns, each no worse than before (Egiazarian et al., 2024, train codebooks and scales by Adam instead).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.format import Codes
from quant.kernels.formats.codebook import Codebook

ENOUGH = 1e-8  # of the first residual's energy: what is left is rounding; two books have directions that change nothing


def loss(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """tr(D H D')."""
    lost = weight - found
    return float((lost @ gram * lost).sum())


def search_codes(weight: Tensor, gram: Tensor, codes: Tensor, books: Tensor, scale: Tensor) -> Tensor:
    """One sweep: codes uint8 [N, K // g, M] whose loss is no greater.

    weight [N, K], gram [K, K], books [M, 256, g], scale [N, 1], float32. For a tile with block B of H, slope R = D H in it,
    and a change d = s (C[c] - C[old]) the loss moves by d B d' - 2 R d'.
    """
    count, _, group = books.shape
    codes = codes.clone()
    fmt = Codebook(books=count, group=group)
    lost = weight - fmt.dequantize(Codes(codes, {"codebook": books, "weight_scale": scale}))
    slope = lost @ gram
    squared = scale.square()
    for tile in range(codes.shape[1]):
        at = slice(tile * group, (tile + 1) * group)
        block = gram[at, at]
        pulled = books @ block  # [M, 256, g]
        size = (pulled * books).sum(-1)
        here, moved = slope[:, at].clone(), torch.zeros_like(slope[:, at])
        for m in range(count):
            old = codes[:, tile, m].long()
            # d B d' - 2 R d' up to a constant: s^2 (c B c' - 2 c B old') - 2 s R c'
            score = squared * size[m] - 2 * (squared * pulled[m][old] + scale * here) @ books[m].T
            new = score.argmin(1)
            step = scale * (books[m][new] - books[m][old])
            codes[:, tile, m] = new.to(torch.uint8)
            here -= step @ block
            moved += step
        slope -= moved @ gram[at]
    return codes


def fit_books(weight: Tensor, gram: Tensor, codes: Tensor, books: Tensor, scale: Tensor, rounds: int) -> Tensor:
    """Codebooks [M, 256, g] of smaller loss: `rounds` of conjugate gradients on the normal equations, from those given.

    Entries are preconditioned by how much weight their tiles carry.
    """
    count, entries, group = books.shape
    n, tiles, _ = codes.shape
    places = codes.long() + torch.arange(count, device=codes.device) * entries  # [N, tiles, M] into [M * 256, g]

    def spread(values: Tensor) -> Tensor:
        return values.view(-1, group)[places].sum(2).view(n, tiles * group) * scale

    def gather(matrix: Tensor) -> Tensor:
        parts = (matrix * scale).view(n, tiles, 1, group).expand(-1, -1, count, -1).reshape(-1, group)
        out = torch.zeros(count * entries, group, dtype=matrix.dtype, device=matrix.device)
        return out.index_add_(0, places.reshape(-1), parts).view_as(books)

    weigh = (gram.diagonal().view(1, tiles, group) * scale.square().unsqueeze(1)).expand(n, -1, -1)
    pull = torch.zeros(count * entries, group, dtype=gram.dtype, device=gram.device)
    for m in range(count):
        pull.index_add_(0, places[..., m].reshape(-1), weigh.reshape(-1, group))
    pull = pull.view_as(books)
    inverse = torch.where(pull > 0, 1 / pull.clamp_min(1e-30), 0.0)
    found = books.clone()
    rest = gather((weight - spread(found)) @ gram)
    ready = inverse * rest
    way, energy = ready.clone(), (rest * ready).sum()
    enough = ENOUGH * float(energy)
    for _ in range(rounds):
        seen = gather(spread(way) @ gram)
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
