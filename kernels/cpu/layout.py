"""Between canonical codes [N, K] and the blocks of 32 rows that the C++ kernels stream.

A block is stored k by k: eight k (4-bit codes) or four k (8-bit codes) of 16 rows fill 64 bytes, a vector register in
which each 32-bit lane is one row. N is padded with zero rows to whole blocks, K with zero codes to a multiple of 8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 32
PAIRS = ((0, 2), (4, 6), (1, 3), (5, 7))  # k in the low and high nibble of each byte of a lane, order `pairs`
HALVES = ((0, 4), (1, 5), (2, 6), (3, 7))  # order `halves`


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2], even k in the low nibble -> codes uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Inverse of `unpack_nibbles`."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def pad(t: Tensor, columns_to: int = 1) -> Tensor:
    """[N, C] padded with zeros to a multiple of 32 rows and of `columns_to` columns."""
    return nn.functional.pad(t, (0, -t.shape[1] % columns_to, 0, -t.shape[0] % ROWS))


def block_nibbles(codes: Tensor, order: tuple[tuple[int, int], ...]) -> Tensor:
    """Codes [N, K] -> uint8 [N / 32, K / 8, 32, 4], byte b of a row holding the two k of order[b]."""
    codes = pad(codes, 8)
    tiles = codes.view(codes.shape[0] // ROWS, ROWS, -1, 8).transpose(1, 2)  # [N / 32, K / 8, 32, 8]
    low, high = ([pair[i] for pair in order] for i in (0, 1))
    return (tiles[..., low] | tiles[..., high] << 4).contiguous()


def unblock_nibbles(blocks: Tensor, order: tuple[tuple[int, int], ...], n: int, k: int) -> Tensor:
    """Inverse of `block_nibbles`: codes uint8 [n, k]."""
    tiles = blocks.new_empty(*blocks.shape[:3], 8)
    low, high = ([pair[i] for pair in order] for i in (0, 1))
    tiles[..., low] = blocks & 15
    tiles[..., high] = blocks >> 4
    return tiles.transpose(1, 2).reshape(blocks.shape[0] * ROWS, -1)[:n, :k]


def block_bytes(codes: Tensor) -> Tensor:
    """Codes [N, K] -> uint8 [N / 32, K / 4, 32, 4]."""
    codes = pad(codes, 8)
    return codes.view(codes.shape[0] // ROWS, ROWS, -1, 4).transpose(1, 2).contiguous()


def unblock_bytes(blocks: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `block_bytes`."""
    return blocks.transpose(1, 2).reshape(blocks.shape[0] * ROWS, -1)[:n, :k].contiguous()


def block_groups(values: Tensor) -> Tensor:
    """Per-group values [N, K / G] -> [N / 32, K / G, 32]."""
    values = pad(values)
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def unblock_groups(blocks: Tensor, n: int) -> Tensor:
    """Inverse of `block_groups`."""
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1])[:n].contiguous()
