"""Searches over codebooks: the nearest entry for each of many short vectors, and a sweep over neighbouring tiles of a weight.

    nearest:   code[t] = argmin_c size[c] - <target[t], C[c]>

is the entry of least |target - C|^2 with size = |C|^2 / 2, and of least d B d', d = target B^-1 - C, with size = C B C' / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.dispatch import import_all

TARGETS = 16384  # scored at a time


def nearest(target: Tensor, book: Tensor, size: Tensor) -> Tensor:
    """uint8 [T] of target [T, g], book [E, g], size [E], float32; E is at most 256. By the fastest kernel of their device."""
    import_all()
    found: Tensor = torch.ops.lowbit.nearest.default(target, book, size)
    return found


def sweep(slope: Tensor, codes: Tensor, books: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, tiles, M] chosen anew one after the other, and what that adds to the vectors, float32 [N, tiles * g].

    Lowers d B d' - 2 slope d' in what is added, d [tiles * g], row by row: slope float32 [N, tiles * g], codes uint8
    [N, tiles, M], books float32 [M, 256, g], block B float32 [tiles * g, tiles * g], symmetric. By the fastest kernel.
    """
    import_all()
    size = entry_sizes(books, block)
    found: tuple[Tensor, Tensor] = torch.ops.lowbit.sweep.default(slope, codes, books, size, block)
    return found


def entry_sizes(books: Tensor, block: Tensor) -> Tensor:
    """C B C' / 2 of every entry in every tile: [tiles, M, 256]."""
    group = books.shape[2]
    tiles = len(block) // group
    own = block.view(tiles, group, tiles, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [tiles, g, g]
    return (books @ own.unsqueeze(1) * books).sum(-1) / 2


def by_scores(target: Tensor, book: Tensor, size: Tensor) -> Tensor:
    """`nearest` with every score written to memory: on any device."""
    parts = [torch.addmm(size, rows, book.T, alpha=-1).argmin(1) for rows in torch.split(target, TARGETS)]
    return torch.cat(parts).to(torch.uint8)


def by_tiles(slope: Tensor, codes: Tensor, books: Tensor, size: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """`sweep` with `by_scores` of one tile after the other: on any device. size: `entry_sizes`."""
    codes, slope, moved = codes.clone(), slope.clone(), torch.zeros_like(slope)
    group = books.shape[2]
    for tile in range(codes.shape[1]):
        at, on = slice(tile * group, (tile + 1) * group), slice(tile * group, None)
        for m, book in enumerate(books):
            old = book[codes[:, tile, m].long()]
            new = by_scores(slope[:, at] + old @ block[at, at], book, size[tile, m])
            codes[:, tile, m] = new
            step = book[new.long()] - old
            moved[:, at] += step
            slope[:, on] -= step @ block[at, on]
    return codes, moved


torch.library.define("lowbit::nearest", "(Tensor target, Tensor book, Tensor size) -> Tensor")
torch.library.impl("lowbit::nearest", "CompositeExplicitAutograd", by_scores)
torch.library.register_fake("lowbit::nearest", lambda target, _b, _s: target.new_empty(len(target), dtype=torch.uint8))
torch.library.define(
    "lowbit::sweep", "(Tensor slope, Tensor codes, Tensor books, Tensor size, Tensor block) -> (Tensor, Tensor)"
)
torch.library.impl("lowbit::sweep", "CompositeExplicitAutograd", by_tiles)
torch.library.register_fake("lowbit::sweep", lambda slope, codes, *_: (torch.empty_like(codes), torch.empty_like(slope)))
