"""Memory for weights that one token streams through: in huge pages, where Linux grants them.

With 4 kB pages the hardware stops asking ahead at every page's end and looks the next one up; in pages of 2 MB one
thread reads a third faster. Small tensors share a chunk, which is freed when the last of them is.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
HUGE_BYTES = 2 << 20
ALIGN = 64


class Arena:
    """Hands out pieces of one chunk until it is full, then of the next."""

    def __init__(self) -> None:
        self.chunk: mmap.mmap | None = None
        self.at = self.end = 0

    def empty(self, nbytes: int) -> Tensor:
        """Zeroed uint8 [nbytes], aligned to a cache line."""
        if self.chunk is None or self.at + nbytes > self.end:
            self.end = max(CHUNK_BYTES, nbytes) + HUGE_BYTES
            self.chunk = mmap.mmap(-1, self.end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.chunk.madvise(mmap.MADV_HUGEPAGE)
            # from the first huge page on
            self.at = -torch.frombuffer(self.chunk, dtype=torch.uint8, count=1).data_ptr() % HUGE_BYTES
        piece = torch.frombuffer(self.chunk, dtype=torch.uint8, offset=self.at, count=nbytes)
        self.at += -(-nbytes // ALIGN) * ALIGN
        return piece


_arena = Arena()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of any content, in huge pages where there are such."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    try:
        return _arena.empty(nbytes).view(dtype).view(shape)
    except OSError:  # a kernel built without them refuses the advice
        return torch.empty(shape, dtype=dtype)
