"""Device layouts of all GPU kernels: "split slices". Canonical codes [N, K] <-> planes of bytes and parameter words.

K is cut into blocks of SLICES * SLICE. Byte j of a row of a block holds the codes of k = SLICE * i + j for every slice i, each
slice in its own bit field: a field of a 32-bit word belongs to one slice of activations, so that unpacking needs no shuffle.

    weight  uint8 [blocks * PLANES * N + slack, SLICE]    a tile of rows is one contiguous run of memory
    words   int32 [blocks * GROUPS * N + slack]           the parameters of a group, see `jit/unpack.py`; GROUPS per block

SLICE is a multiple of 16 bytes, and the slack lets a tile that sticks out of N read without a mask. K is padded with code 0:
tokens are zero there. Where MIXED, the k of a 4-byte word are in the order 0, 2, 1, 3 (see `jit/fragments.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 128  # largest BN of any tile: the slack, in rows


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What one storage looks like. fields[i] says where slice i lies: (plane, first bit of the code, bits, bit of the byte)."""

    name: str  # of the function that unpacks it
    bits: int
    planes: int
    fields: tuple[tuple[tuple[int, int, int, int], ...], ...]
    integer: bool = False  # int8 tokens, int32 sums
    mixed: bool = False
    parameters: bool = True  # words are there
    scale_on_sum: bool = True  # few tokens: the group scale may multiply the sum instead of the weights
    module: str = "unpack"  # file of the function in `jit/`
    # (SLICE, GROUPS): the first whose groups of SLICES * SLICE / GROUPS divide the group length is taken
    blockings: tuple[tuple[int, int], ...]

    @property
    def slices(self) -> int:
        return len(self.fields)

    def words(self, groups: int) -> int:
        """Parameter words per row and block: the word of int4_dual holds two groups."""
        return 0 if not self.parameters else 1 if self.integer else groups

    def blocking(self, group: int) -> tuple[int, int] | None:
        """(SLICE, GROUPS) for a group length, -1 for one group per row; None where no blocking fits."""
        fits = ((s, g) for s, g in self.blockings if group == -1 or group % (s * self.slices // g) == 0)
        return next(fits, None)


NIBBLES = (((0, 0, 4, 0),), ((0, 0, 4, 4),))
BYTES = (((0, 0, 8, 0),),)
PAIRS = tuple(((0, 0, 2, 2 * i),) for i in range(4))
TRIPLES = tuple(((i // 4, 0, 2, 2 * (i % 4)), (2, 2, 1, 2 * (i % 4) + 1 - i // 4)) for i in range(8))
FOUR_PLANES = tuple(((i // 2, 0, 4, 4 * (i % 2)),) for i in range(8))
POLICIES = {
    policy.name: policy
    for policy in (
        Policy(name="dual4", bits=4, planes=1, fields=NIBBLES, integer=True, blockings=((64, 1),)),
        Policy(name="dual4_pair", bits=4, planes=1, fields=NIBBLES, integer=True, blockings=((64, 2), (32, 2))),
        Policy(name="bytes8", bits=8, planes=1, fields=BYTES, integer=True, parameters=False, blockings=((128, 1),)),
        Policy(name="int2", bits=2, planes=1, fields=PAIRS, mixed=True, blockings=((64, 2), (32, 2), (16, 2))),
        Policy(name="int3", bits=3, planes=3, fields=TRIPLES, mixed=True, blockings=((16, 1), (16, 2), (16, 4))),
        Policy(name="int4", bits=4, planes=1, fields=NIBBLES, mixed=True, blockings=((64, 1), (32, 1), (16, 1))),
        Policy(
            name="e2m1", module="e2m1", bits=4, planes=4, fields=FOUR_PLANES, scale_on_sum=False, blockings=((16, 2), (16, 1))
        ),
        Policy(
            name="float4", module="float4", bits=4, planes=1, fields=NIBBLES, mixed=True, blockings=((64, 1), (32, 1), (16, 1))
        ),
        Policy(
            name="float8",
            module="float8",
            bits=8,
            planes=1,
            fields=BYTES,
            mixed=True,
            scale_on_sum=False,
            blockings=((128, 1),),
        ),
        Policy(name="int8", bits=8, planes=1, fields=BYTES, blockings=((128, 1), (64, 1), (32, 1))),
    )
}


def blocks_of(policy: Policy, k: int, slice_: int) -> int:
    return -(-k // (policy.slices * slice_))


def pack_weight(codes: Tensor, policy: Policy, slice_: int) -> Tensor:
    """uint8 codes [N, K] -> weight as at the head of this file."""
    n, k = codes.shape
    blocks = blocks_of(policy, k, slice_)
    padded = torch.nn.functional.pad(codes, (0, blocks * policy.slices * slice_ - k))
    parts = padded.view(n, blocks, policy.slices, slice_).permute(2, 1, 0, 3)  # [SLICES, blocks, N, SLICE]
    if policy.mixed:
        parts = parts.reshape(*parts.shape[:3], -1, 2, 2).transpose(-1, -2).reshape(parts.shape)
    weight = codes.new_zeros(blocks * policy.planes * n + WIDEST, slice_)
    planes = weight[: blocks * policy.planes * n].view(blocks, policy.planes, n, slice_)
    for part, places in zip(parts, policy.fields, strict=True):
        for plane, start, bits, at in places:
            planes[:, plane] |= ((part >> start) & (2**bits - 1)) << at
    return weight


def unpack_weight(weight: Tensor, policy: Policy, n: int, k: int) -> Tensor:
    """Exact inverse of `pack_weight`: uint8 codes [N, K]."""
    slice_ = weight.shape[1]
    blocks = blocks_of(policy, k, slice_)
    planes = weight[: blocks * policy.planes * n].view(blocks, policy.planes, n, slice_)
    parts = weight.new_zeros(policy.slices, blocks, n, slice_)
    for part, places in zip(parts, policy.fields, strict=True):
        for plane, start, bits, at in places:
            part |= ((planes[:, plane] >> at) & (2**bits - 1)) << start
    if policy.mixed:
        parts = parts.reshape(policy.slices, blocks, n, -1, 2, 2).transpose(-1, -2).reshape(parts.shape)
    return parts.permute(2, 1, 0, 3).reshape(n, -1)[:, :k].contiguous()


def group_of_run(k: int, group: int, runs: int, run: int) -> Tensor:
    """Group index of each of `runs` runs of `run` codes; runs of padding take the last group."""
    return (torch.arange(runs) * run // group).clamp_max(k // group - 1)


def to_words(values: Tensor) -> Tensor:
    """int64 [N, rows] in 0..2^32 - 1 -> words int32 [rows * N + slack]."""
    words = torch.zeros(values.numel() + WIDEST, dtype=torch.int32, device=values.device)
    flat = values.t().reshape(-1)
    words[: values.numel()] = torch.where(flat < 2**31, flat, flat - 2**32).to(torch.int32)
    return words


def from_words(words: Tensor, n: int) -> Tensor:
    """Inverse of `to_words`: int64 [N, rows]."""
    return words[: words.numel() - WIDEST].view(-1, n).t().to(torch.int64) & 0xFFFFFFFF


ONE = 0x3C00  # float16 bits of 1


def scale_words(scale: Tensor, high: Tensor, policy: Policy, blocking: tuple[int, int], k: int) -> tuple[Tensor, Tensor]:
    """Scales float16 [N, K // G] under `high` int64 [N, K // G], 16 bits each -> (words, row_scale float32 [N]).

    A scale per row, float32 [N, 1], is row_scale itself; the words of one block, of scale 1, then serve all.
    """
    n, count = scale.shape
    slice_, groups = blocking
    if scale.dtype == torch.float32:
        return to_words((high << 16 | ONE).expand(n, groups)), scale.flatten().clone()
    low = scale.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    runs = blocks_of(policy, k, slice_) * groups
    picked = group_of_run(k, k // count, runs, policy.slices * slice_ // groups).to(scale.device)
    return to_words((high << 16 | low)[:, picked]), torch.ones(n, device=scale.device)


def scales_of(words: Tensor, row_scale: Tensor, policy: Policy, slice_: int, k: int, group: int) -> tuple[Tensor, Tensor]:
    """Inverse of `scale_words`: (scale, high)."""
    values = from_words(words, len(row_scale))  # [N, runs]
    if group == -1:
        return row_scale.unsqueeze(1), values[:, :1] >> 16
    run = policy.slices * slice_ * blocks_of(policy, k, slice_) // values.shape[1]
    values = values[:, :: group // run][:, : k // group]  # the first run of each group
    low = values & 0xFFFF
    scale = torch.where(low < 2**15, low, low - 2**16).to(torch.int16).contiguous().view(torch.float16)
    return scale, values >> 16


def pick_rows(tensor: Tensor, n: int, rows: Tensor) -> Tensor:
    """A weight or words of n rows -> those of `rows` int64 [M], a layout of its own."""
    picked = tensor[: len(tensor) - WIDEST].view(-1, n, *tensor.shape[1:])[:, rows].flatten(0, 1)
    return torch.cat((picked, picked.new_zeros(WIDEST, *tensor.shape[1:])))


def spread_zero(zero: Tensor, bits: int) -> Tensor:
    """The zero point as the fields of one byte would hold it: 0x55 * z, 0x11 * z or z, for 2, 3 and 4, or 8 bits."""
    return zero * {2: 0x55, 3: 0x11, 4: 0x11, 8: 1}[bits]
