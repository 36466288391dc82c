"""Between canonical codes [N, K] and the blocks of 32 rows that the C++ kernels stream.

A block is stored k by k: one 32-bit word of each row, so that 16 rows fill a vector register. N is padded with zero
rows to whole blocks, K with zero codes to a multiple of 8, or of 16 for codes of 2 and 3 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant.kernels.cpu import memory
from quant.kernels.dispatch import Kernel, Prepared
from quant.kernels.formats.int_group import unpack_bits

ROWS = 32
PAIRS = ((0, 2), (4, 6), (1, 3), (5, 7))  # k in the low and high nibble of each byte of a lane, order `pairs`
HALVES = ((0, 4), (1, 5), (2, 6), (3, 7))  # order `halves`


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] -> uint8 [N, K / 2], even k in the low nibble."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def pad(t: Tensor, columns_to: int = 1) -> Tensor:
    """[N, C] padded with zeros to a multiple of 32 rows and of `columns_to` columns."""
    return nn.functional.pad(t, (0, -t.shape[1] % columns_to, 0, -t.shape[0] % ROWS))


def block_nibbles(packed: Tensor, order: tuple[tuple[int, int], ...]) -> Tensor:
    """uint8 [N, K / 2], even k in the low nibble -> [N / 32, K / 8, 32, 4], byte b of a row holding the two k of order[b].

    Eight codes at a time, as one little-endian word: nibbles that move by the same distance move together.
    """
    words = pad(packed, 4).view(torch.int32)
    masks: dict[int, int] = {}  # distance in nibbles -> where those nibbles arrive
    for to, k in enumerate(k for pair in order for k in pair):
        masks[to - k] = masks.get(to - k, 0) | 15 << 4 * to
    moved = torch.zeros_like(words)
    for distance, mask in masks.items():
        there = words << 4 * distance if distance >= 0 else words >> -4 * distance
        moved |= there.bitwise_and_(mask - (mask >> 31 << 32))  # as a signed number
    return block_words(moved)


def unblock_nibbles(blocks: Tensor, order: tuple[tuple[int, int], ...], n: int, k: int) -> Tensor:
    """Inverse of `block_nibbles`: codes uint8 [n, k]."""
    tiles = blocks.new_empty(*blocks.shape[:3], 8)
    low, high = ([pair[i] for pair in order] for i in (0, 1))
    tiles[..., low] = blocks & 15
    tiles[..., high] = blocks >> 4
    return tiles.transpose(1, 2).flatten(0, 1).flatten(1)[:n, :k]


def block_pairs(codes: Tensor) -> Tensor:
    """2-bit codes [N, K] -> uint8 [N / 32, K / 16, 32, 4]: even k in the lower half of a row's word, odd k in the upper."""
    codes = pad(codes, 16)
    halves = codes.view(codes.shape[0], -1, 2, 4, 2).transpose(3, 4)  # [N, K / 16, byte, even or odd, 4]
    halves = halves.transpose(2, 3).flatten(2, 3)  # [N, K / 16, 4 bytes, 4]
    packed = halves[..., 0] | halves[..., 1] << 2 | halves[..., 2] << 4 | halves[..., 3] << 6
    return packed.view(-1, ROWS, *packed.shape[1:]).transpose(1, 2).contiguous()


def unblock_pairs(blocks: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `block_pairs`."""
    packed = blocks.transpose(1, 2).flatten(0, 1)  # [N, K / 16, 4]
    halves = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1)  # [N, K / 16, 4 bytes, 4]
    codes = halves.view(*halves.shape[:2], 2, 2, 4).transpose(2, 3).transpose(3, 4)  # [N, K / 16, byte, 4, even or odd]
    return codes.flatten(1)[:n, :k]


def block_tops(tops: Tensor) -> Tensor:
    """Single bits [N, K] -> uint8 [N / 32, K / 16, 32, 2]: even k in the first byte of a row, odd k in the second."""
    tops = pad(tops, 16)
    octets = tops.view(tops.shape[0], -1, 8, 2).transpose(2, 3)  # [N, K / 16, even or odd, 8]
    packed = (octets << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return packed.view(-1, ROWS, *packed.shape[1:]).transpose(1, 2).contiguous()


def unblock_tops(blocks: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `block_tops`."""
    packed = blocks.transpose(1, 2).flatten(0, 1)  # [N, K / 16, 2]
    octets = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return octets.transpose(2, 3).flatten(1)[:n, :k]


def block_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """A bit stream uint8 [N, K * bits / 8] of 2, 3, 4 or 8 bits -> uint8 [N / 32, K / unit, bytes of a unit], see weights.h."""
    if bits == 8:
        return block_bytes(packed).flatten(2)
    if bits == 4:
        return block_nibbles(packed, PAIRS).flatten(2)
    codes = unpack_bits(packed, bits, k)
    if bits == 2:
        return block_pairs(codes).flatten(2)
    return torch.cat((block_pairs(codes & 3).flatten(2), block_tops(codes >> 2).flatten(2)), 2)


def unblock_codes(blocks: Tensor, bits: int, n: int, k: int, rows: Tensor | None = None) -> Tensor:
    """Codes uint8 [n, k] of `block_codes`. rows int64 [n]: only these, in this order."""
    parts = [_rows(blocks[:, :, : 4 * ROWS], 4)]
    if bits == 3:
        parts.append(_rows(blocks[:, :, 4 * ROWS :], 2))
    if rows is not None:
        parts = [part[rows // ROWS, :, rows % ROWS].unsqueeze(2) for part in parts]  # blocks of one row
    if bits == 4:
        return unblock_nibbles(parts[0], PAIRS, n, k)
    if bits == 8:
        return unblock_bytes(parts[0], n, k)
    low = unblock_pairs(parts[0], n, k)
    return low if bits == 2 else low | unblock_tops(parts[1], n, k) << 2


def block_bytes(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] -> uint8 [N / 32, K / 4, 32, 4]."""
    return block_words(pad(codes, 8).view(torch.int32))


def block_words(words: Tensor) -> Tensor:
    """One int32 per k, [N, C] with N a multiple of 32 -> uint8 [N / 32, C, 32, 4]."""
    blocks = words.view(-1, ROWS, words.shape[1]).transpose(1, 2).contiguous()
    return blocks.view(torch.uint8).view(*blocks.shape, 4)


def unblock_bytes(blocks: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `block_bytes`."""
    return blocks.transpose(1, 2).flatten(0, 1).flatten(1)[:n, :k].contiguous()


def block_groups(values: Tensor) -> Tensor:
    """Per-group values [N, K / G] -> [N / 32, K / G, 32]."""
    values = pad(values)
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()


def unblock_groups(blocks: Tensor, n: int, rows: Tensor | None = None) -> Tensor:
    """Inverse of `block_groups`. rows int64 [n]: only these, in this order."""
    if rows is not None:
        return blocks[rows // ROWS, :, rows % ROWS]
    return blocks.transpose(1, 2).reshape(-1, blocks.shape[1])[:n].contiguous()


def _rows(units: Tensor, width: int) -> Tensor:
    return units.reshape(*units.shape[:2], ROWS, width)


class BlockKernel(Kernel):
    """A kernel whose prepared tensors are blocks along their first dimension, or one float per row."""

    def join(self, prepared: Sequence[Prepared]) -> tuple[Prepared, list[Prepared]] | None:
        together, parts = [], []
        for pieces in zip(*prepared, strict=True):
            rows = pieces[0].dim() == 1  # a layer's rows begin at a whole block
            starts = [0]
            for piece in pieces:
                starts.append(starts[-1] + (-(-len(piece) // ROWS) * ROWS if rows else len(piece)))
            whole = memory.empty((starts[-1], *pieces[0].shape[1:]), pieces[0].dtype)
            views = [whole[start : start + len(piece)] for start, piece in zip(starts, pieces, strict=False)]
            for view, piece in zip(views, pieces, strict=True):
                view.copy_(piece)
            together.append(whole)
            parts.append(views)
        return tuple(together), list(zip(*parts, strict=True))
