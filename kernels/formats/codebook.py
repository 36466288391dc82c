"""`codebook`: neighbouring weights of a row as sums of vectors from small codebooks, times one scale per row.

    w[n, j g : (j + 1) g] = s[n] * sum_m C[m, code[n, j, m]]          g: `group`, M: `books` of 256 vectors

AQLM's additive codebooks (Egiazarian et al., 2024): 1x8g4, one codebook for four weights, or 2x8g8, two for eight, take two
bits per weight. Codes are a tensor [N, K // g, M], each tile's M bytes side by side on disk; codebooks are float16 and belong
to a weight as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from quant.kernels.format import Codes, Field, Fields, Format, register
from quant.kernels.nearest import nearest

ENTRIES = 256  # of a codebook: one byte per code
ROUNDS = 12  # of k-means for codes without data
TILES = 16384  # a beam search sees at a time, and k-means in all
SEED = 0
TINY = 1e-30


@register
@dataclass(frozen=True, kw_only=True)
class Codebook(Format):
    """books: M. group: the length g of a vector, which must divide K."""

    name: ClassVar[str] = "codebook"
    whole: ClassVar[frozenset[str]] = frozenset({"codebook"})
    additive: ClassVar[frozenset[str]] = frozenset({"codebook"})
    books: int = 1
    group: int = 4

    def __post_init__(self) -> None:
        if not (1 <= self.books <= 8 and 1 <= self.group <= 64):
            raise ValueError(f"codebook has no {self.books} books of vectors of {self.group}; books is 1 to 8, group 1 to 64")

    @property
    def tile(self) -> int:
        return self.group

    def refuses(self, n: int, k: int) -> str | None:
        return f"group {self.group} does not divide K = {k}" if k % self.group else None

    def fields(self, n: int, k: int) -> dict[str, Field]:
        return {
            "weight_packed": Field((n, k // self.group * self.books), torch.uint8),
            "codebook": Field((self.books, ENTRIES, self.group), torch.float16),
            "weight_scale": Field((n, 1), torch.float32),
        }

    def pack(self, codes: Codes) -> Fields:
        return {"weight_packed": codes.codes.flatten(1).contiguous(), **{n: t.contiguous() for n, t in codes.params.items()}}

    def unpack(self, fields: Mapping[str, Tensor], n: int, k: int) -> Codes:
        codes = fields["weight_packed"].view(n, k // self.group, self.books)
        return Codes(codes, {name: fields[name] for name in ("codebook", "weight_scale")})

    def dequantize(self, codes: Codes) -> Tensor:
        n, tiles, _ = codes.codes.shape
        books = codes.params["codebook"].float()
        parts = [embedding(codes.codes[..., m].int(), books[m]) for m in range(self.books)]
        return sum(parts[1:], parts[0]).view(n, tiles * self.group) * codes.params["weight_scale"].float()

    def steps(self, params: Mapping[str, Tensor]) -> Tensor:
        """The size of a weight, float32 [N, 1]: at two bits about the distance of neighbouring levels."""
        size = params["codebook"].float().square().mean((1, 2)).sum().sqrt()
        return (params["weight_scale"].float() * size).abs().clamp_min(TINY)

    def project(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The nearest codes of one codebook; of several, each nearest to what those before it left, then `nearer`."""
        books = params["codebook"].float()
        target = self.unscaled(weight, params["weight_scale"])
        codes = torch.empty(len(target), self.books, dtype=torch.uint8, device=weight.device)
        rest = target.clone()
        for m in range(self.books):
            codes[:, m] = nearest_entries(rest, books[m])
            rest -= books[m][codes[:, m].long()]
        return beam_search(target, books, codes).view(len(weight), -1, self.books)

    def nearer(self, weight: Tensor, codes: Codes) -> Tensor:
        target = self.unscaled(weight, codes.params["weight_scale"])
        found = beam_search(target, codes.params["codebook"].float(), codes.codes.reshape(-1, self.books))
        return found.view(codes.codes.shape)

    def reach(self, codes: Codes) -> Tensor:
        """The squared distance [N, K // g] from a tile's vector within which no other entry is nearer; 0 for several books."""
        n, tiles, books = codes.codes.shape
        if books > 1:
            return torch.zeros(n, tiles, device=codes.codes.device)
        book = codes.params["codebook"][0].float()
        gaps = torch.cdist(book, book).fill_diagonal_(torch.inf).amin(1) / 2
        return (gaps[codes.codes[..., 0].long()] * codes.params["weight_scale"].float()).square()

    def unscaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Tiles [N * K // g, g] in units of their row's scale [N, 1]."""
        return (weight / scale.float().clamp_min(TINY)).view(-1, self.group)

    def nearest(self, weight: Tensor) -> Codes:
        """Rows of unit mean square, codebooks by k-means on what the ones before left."""
        scale = weight.square().mean(1, keepdim=True).sqrt()  # 0 for a row of zeros, which then stays one
        target = self.unscaled(weight, scale)
        books, rest = [], target.clone()
        for m in range(self.books):
            book = k_means(rest, ENTRIES, ROUNDS, SEED + m).half().float()
            rest -= book[nearest_entries(rest, book).long()]
            books.append(book)
        params = {"codebook": torch.stack(books).half(), "weight_scale": scale}
        return Codes(self.project(weight, params), params)


def nearest_entries(target: Tensor, book: Tensor) -> Tensor:
    """uint8 [T]: the entry of float32 [256, g] nearest to each of float32 [T, g]."""
    return nearest(target, book, book.square().sum(1) / 2)


def k_means(points: Tensor, entries: int, rounds: int, seed: int) -> Tensor:
    """float32 [entries, g] for some of the points [T, g], from points at random; an entry without any goes to the farthest."""
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).to(points.device)
    points = points[order[:TILES]]
    book = points[:entries].repeat(-(-entries // len(points)), 1)[:entries].clone()
    for _ in range(rounds):
        codes = nearest_entries(points, book).long()
        count = torch.bincount(codes, minlength=entries)
        book = torch.zeros_like(book).index_add_(0, codes, points) / count.clamp_min(1).unsqueeze(1)
        if bool((count == 0).any()):
            far = (points - book[codes]).square().sum(1)
            empty = (count == 0).nonzero().squeeze(1)
            book[empty] = points[far.topk(min(len(empty), len(points))).indices.repeat(len(empty))[: len(empty)]]
    return book


def beam_search(target: Tensor, books: Tensor, codes: Tensor, width: int = 2, rounds: int = 1) -> Tensor:
    """uint8 codes [T, M], no further from float32 [T, g] than those given.

    One codebook at a time is chosen anew, the `width` best combinations being kept; a width of 256^(M - 1) finds the nearest.
    """
    if len(books) == 1:
        return nearest_entries(target, books[0]).unsqueeze(1)
    size = max(1, TILES // width)
    return torch.cat(
        [
            beam_chunk(t, books, c, width, rounds)
            for t, c in zip(torch.split(target, size), torch.split(codes, size), strict=True)
        ]
    )


def beam_chunk(target: Tensor, books: Tensor, codes: Tensor, width: int, rounds: int) -> Tensor:
    """`beam_search` of some tiles."""
    beams = codes.long().unsqueeze(1)  # [T, beams, M]
    for m in [*range(len(books))] * rounds:
        others = [other for other in range(len(books)) if other != m]
        rest = target.unsqueeze(1) - sum((books[o][beams[..., o]] for o in others), torch.zeros_like(target).unsqueeze(1))
        lost = rest.square().sum(-1, keepdim=True) - 2 * rest @ books[m].T + books[m].square().sum(1)  # [T, beams, 256]
        # combinations that differ in this book alone come from the same rest: count each rest once
        same = (beams[:, :, None, others] == beams[:, None, :, others]).all(-1).tril(-1).any(-1)
        lost = lost.masked_fill(same.unsqueeze(-1), torch.inf).flatten(1)
        best = lost.topk(min(width, lost.shape[1]), largest=False).indices
        beams = beams.gather(1, (best // ENTRIES).unsqueeze(-1).expand(-1, -1, len(books))).clone()
        beams[..., m] = best % ENTRIES
    return beams[:, 0].to(torch.uint8)
