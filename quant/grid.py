"""Grids that weights are rounded to: level times step, the step shared by a group of G channels along K.

    q[n, k] = step[n, k // G] * level        level: the integers -zero .. levels - 1 - zero, or the values of a small float,
                                             or 0, 1, r and 1 + r with an r of the group

Rounding methods (`rounding.py`) work on levels and know nothing else about a grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.kernels.minifloat import Minifloat
from quant.kernels.rounding import TWO_BITS, Levels


@dataclass(frozen=True)
class Grid(ABC):
    """step: float32 [N, K // G], positive."""

    step: Tensor

    @abstractmethod
    def rule(self, order: Tensor) -> Levels:
        """The levels that there are in each channel, channels in the given order, int64 [K]."""

    @abstractmethod
    def levels(self, codes: Tensor) -> Tensor:
        """uint8 codes [N, K] -> levels, float32 [N, K]."""

    @abstractmethod
    def codes(self, levels: Tensor) -> Tensor:
        """Inverse of `levels`."""

    def steps(self, order: Tensor) -> Tensor:
        """The step of each channel in the given order: [K, N]."""
        return self._by_channel(self.step, order)

    def rows(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return replace(self, step=self.step[rows])

    def _by_channel(self, values: Tensor, order: Tensor) -> Tensor:
        """[N, K // G] -> [K, N]: channels as rows, so that each visit reads contiguous memory."""
        return values.T[order // (len(order) // values.shape[1])].contiguous()


@dataclass(frozen=True)
class Affine(Grid):
    """Equally spaced levels. zero: [N, K // G], the code of level 0. count: number of levels."""

    zero: Tensor
    count: int

    def rule(self, order: Tensor) -> Levels:
        return Levels.integers(self._by_channel(self.zero, order), self.count)

    def levels(self, codes: Tensor) -> Tensor:
        return codes.float() - self._per_weight(codes)

    def codes(self, levels: Tensor) -> Tensor:
        return (levels + self._per_weight(levels)).to(torch.uint8)

    def rows(self, rows: slice) -> Affine:
        return replace(self, step=self.step[rows], zero=self.zero[rows])

    def _per_weight(self, like: Tensor) -> Tensor:
        return self.zero.repeat_interleave(like.shape[1] // self.zero.shape[1], 1)


@dataclass(frozen=True)
class FloatGrid(Grid):
    """The values of 4- or 8-bit floats, E2M1 for instance, of either sign."""

    kind: Minifloat

    def rule(self, order: Tensor) -> Levels:
        return Levels.floats(self.kind, self.steps(order))

    def levels(self, codes: Tensor) -> Tensor:
        return self.kind.decode(codes)

    def codes(self, levels: Tensor) -> Tensor:
        return self.kind.encode(levels)


@dataclass(frozen=True)
class Dual(Grid):
    """Sums of two scaled bits: step a1, either sign, and ratio a2 / a1 in [-1, 1], [N, K // G]. Codes B1 + 2 * B2."""

    ratio: Tensor

    @classmethod
    def of(cls, scales: Tensor) -> Dual:
        """scales: [N, K // G, 2], none 0, a1 not smaller than a2 (`dual.ordered`)."""
        return cls(scales[..., 0], scales[..., 1] / scales[..., 0])

    def rule(self, order: Tensor) -> Levels:
        return Levels(TWO_BITS, self._by_channel(self.ratio, order))

    def levels(self, codes: Tensor) -> Tensor:
        return (codes & 1) + (codes >> 1) * self._per_weight(codes)

    def codes(self, levels: Tensor) -> Tensor:
        r = self._per_weight(levels)
        first = levels >= (1 + r) / 2
        second = (levels - first.to(levels.dtype)) * r > r * r / 2
        return first.to(torch.uint8) | second.to(torch.uint8) << 1

    def rows(self, rows: slice) -> Dual:
        return replace(self, step=self.step[rows], ratio=self.ratio[rows])

    def _per_weight(self, like: Tensor) -> Tensor:
        return self.ratio.repeat_interleave(like.shape[1] // self.ratio.shape[1], 1)
