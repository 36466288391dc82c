"""`lowbit::nearest` and `lowbit::sweep` on the CPU: scores stay in registers in C++, where the library is there.

Codes are the same on every instruction set; they differ from those of the torch forms only where two entries are equally near
up to the rounding of a score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.cpu import library
from quant.kernels.nearest import by_scores, by_tiles

ENTRIES = 256  # of a book, at most: a code is a byte


def _fit(what: str, *pairs: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError unless every tensor has its shape."""
    if any(tuple(given.shape) != shape for given, shape in pairs):
        told = ", ".join(f"{tuple(given.shape)} for {shape}" for given, shape in pairs)
        raise ValueError(f"{what} do not fit each other: {told}")


def cpu_nearest(target: Tensor, book: Tensor, size: Tensor) -> Tensor:
    """As kernels.nearest.nearest."""
    if target.dtype != torch.float32:
        return by_scores(target, book, size)
    entries, length = book.shape
    _fit("target, book, size", (target, (len(target), length)), (book, (min(entries, ENTRIES), length)), (size, (entries,)))
    target, book, size = (t.float().contiguous() for t in (target, book, size))
    codes = torch.empty(len(target), dtype=torch.uint8)
    given = (t.data_ptr() for t in (target, book, size, codes))
    library.load().lowbit_nearest(*given, len(target), entries, length)
    return codes


def cpu_sweep(slope: Tensor, codes: Tensor, books: Tensor, size: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """As kernels.nearest.sweep."""
    if slope.dtype != torch.float32:
        return by_tiles(slope, codes, books, size, block)
    n, tiles, count = codes.shape
    _, entries, length = books.shape
    width = tiles * length
    _fit(
        "slope, codes, books, size, block",
        *((slope, (n, width)), (codes, (n, tiles, count)), (books, (count, ENTRIES, length)), (size, (tiles, count, entries))),
        (block, (width, width)),
    )
    codes, moved = codes.to(torch.uint8, copy=True, memory_format=torch.contiguous_format), torch.empty(n, width)
    slope, books, size, block = (t.float().contiguous() for t in (slope, books, size, block))
    given = (t.data_ptr() for t in (slope, codes, books, size, block, moved))
    library.load().lowbit_sweep(*given, n, tiles, count, entries, length)
    return codes, moved


if library.available():
    torch.library.impl("lowbit::nearest", "cpu", cpu_nearest)
    torch.library.impl("lowbit::sweep", "cpu", cpu_sweep)
