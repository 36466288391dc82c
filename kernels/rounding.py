"""Choosing levels for a block of channels one after the other, each choice moving the channels behind it.

These are the inner loops of GPTQ and of coordinate descent (quant/rounding.py), channels as rows [B, N]: a channel is fixed in
all N rows of the weight at once. What a block does to other channels is one matrix product, and stays with the caller.

    gptq_block:     level_j = nearest(w_j / s_j),  error_j = (w_j - level_j s_j) / F_jj,  then w_i -= F_ji error_j for i > j
    descend_block:  best = nearest(level_j + reach_j pull_j),  moved_j = (level_j - best) s_j,  then pull_i += H_ji moved_j
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.kernels.dispatch import import_all
from quant.kernels.minifloat import Minifloat, constants, round_to

AFFINE, FLOAT, TWO_BITS = range(3)  # numbers of the C interface


@dataclass(frozen=True)
class Levels:
    """The levels of K channels [K, N] in units of their steps.

    kind AFFINE: the integers -table .. numbers[0] - table. FLOAT: the values of a Minifloat, numbers its `constants`; no table.
    TWO_BITS: 0, 1, r, 1 + r with r of the table.
    """

    kind: int
    table: Tensor  # [K, N], float32; [K, 0] where there is none
    numbers: tuple[float, ...] = ()

    @classmethod
    def integers(cls, zero: Tensor, count: int) -> Levels:
        """-zero .. count - 1 - zero; zero float32 [K, N]."""
        return cls(AFFINE, zero, (count - 1.0,))

    @classmethod
    def floats(cls, kind: Minifloat, like: Tensor) -> Levels:
        """The values of `kind` for the channels of `like` [K, N]."""
        return cls(FLOAT, like.new_empty(len(like), 0), constants(kind))

    def block(self, channels: slice) -> Levels:
        """Those of some channels."""
        return replace(self, table=self.table[channels])

    def nearest(self, u: Tensor, channel: int) -> Tensor:
        """The level nearest to each of u [N], in one channel."""
        if self.kind == FLOAT:
            return round_to(u, *self.numbers)
        t = self.table[channel]
        if self.kind == AFFINE:
            return u.round().add_(t).clamp_(0, self.numbers[0]).sub_(t)
        first = (u >= (1 + t) / 2).to(u.dtype)
        return first.add_(t * ((u - first) * t > t * t / 2))


def gptq_block(weight: Tensor, step: Tensor, levels: Levels, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and errors [B, N] of a block of channels: weight, step [B, N], factor [B, B] upper triangular, all float32."""
    import_all()
    given = (weight, step, levels.table, factor, levels.kind, list(levels.numbers))
    found: tuple[Tensor, Tensor] = torch.ops.lowbit.gptq_block.default(*given)
    return found


def descend_block(pull: Tensor, level: Tensor, step: Tensor, reach: Tensor, levels: Levels, gram: Tensor) -> Tensor:
    """What a visit to each channel of a block takes off the weight [B, N]; `level` is moved in place.

    pull, level, step, reach [B, N], gram [B, B] symmetric, all float32.
    """
    import_all()
    given = (pull, level, step, reach, levels.table, gram, levels.kind, list(levels.numbers))
    moved: Tensor = torch.ops.lowbit.descend_block.default(*given)
    return moved


def gptq_by_channels(
    weight: Tensor, step: Tensor, table: Tensor, factor: Tensor, kind: int, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """`gptq_block` in torch, on any device."""
    rule, w = Levels(kind, table, tuple(numbers)), weight.clone()
    levels, errors = torch.empty_like(w), torch.empty_like(w)
    for j in range(len(w)):
        levels[j] = rule.nearest(w[j] / step[j], j)
        errors[j] = (w[j] - levels[j] * step[j]) / factor[j, j]
        w[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    return levels, errors


def descend_by_channels(
    pull: Tensor, level: Tensor, step: Tensor, reach: Tensor, table: Tensor, gram: Tensor, kind: int, numbers: list[float]
) -> Tensor:
    """`descend_block` in torch, on any device."""
    rule, here, moved = Levels(kind, table, tuple(numbers)), pull.clone(), torch.empty_like(pull)
    for j in range(len(here)):
        best = rule.nearest(torch.mul(here[j], reach[j]).add_(level[j]), j)
        torch.mul(level[j] - best, step[j], out=moved[j])
        level[j] = best
        here[j + 1 :].addr_(gram[j, j + 1 :], moved[j])
    return moved


torch.library.define(
    "lowbit::gptq_block",
    "(Tensor weight, Tensor step, Tensor table, Tensor factor, int kind, float[] numbers) -> (Tensor, Tensor)",
)
torch.library.impl("lowbit::gptq_block", "CompositeExplicitAutograd", gptq_by_channels)
torch.library.define(
    "lowbit::descend_block",
    "(Tensor pull, Tensor(a!) level, Tensor step, Tensor reach, Tensor table, Tensor gram, int kind, float[] numbers)"
    " -> Tensor",
)
torch.library.impl("lowbit::descend_block", "CompositeExplicitAutograd", descend_by_channels)
