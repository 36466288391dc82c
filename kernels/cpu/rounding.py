"""`lowbit::gptq_block` and `lowbit::descend_block` on the CPU: a panel of rows stays in the L1 cache for a block.

In torch each channel costs some ten calls on short vectors. Levels are the same on every instruction set, and those of the
torch forms but where rounding decides a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.cpu import library
from quant.kernels.rounding import FLOAT, descend_by_channels, gptq_by_channels

CHANNELS = 256  # of a block, at most: six panels of it fit into a core's cache


def _fit(*pairs: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raise ValueError unless every tensor is float32, contiguous rows, and has its shape."""
    for given, shape in pairs:
        if tuple(given.shape) != shape or given.dtype != torch.float32:
            raise ValueError(f"{given.dtype} {tuple(given.shape)} does not fit a block of channels; needed: float32 {shape}")


def _numbers(numbers: list[float]) -> list[float]:
    return [*numbers, 0.0, 0.0, 0.0][:3]


def cpu_gptq_block(
    weight: Tensor, step: Tensor, table: Tensor, factor: Tensor, kind: int, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """As kernels.rounding.gptq_block."""
    b, n = weight.shape
    if weight.dtype != torch.float32 or b > CHANNELS:
        return gptq_by_channels(weight, step, table, factor, kind, numbers)
    _fit((step, (b, n)), (table, (b, 0 if kind == FLOAT else n)), (factor, (b, b)))
    weight, step, table, factor = (t.contiguous() for t in (weight, step, table, factor))
    levels, errors = torch.empty_like(weight), torch.empty_like(weight)
    given = (t.data_ptr() for t in (weight, step, table, factor, levels, errors))
    library.load().lowbit_gptq_block(*given, n, b, kind, *_numbers(numbers))
    return levels, errors


def cpu_descend_block(
    pull: Tensor, level: Tensor, step: Tensor, reach: Tensor, table: Tensor, gram: Tensor, kind: int, numbers: list[float]
) -> Tensor:
    """As kernels.rounding.descend_block."""
    b, n = pull.shape
    if pull.dtype != torch.float32 or b > CHANNELS or not level.is_contiguous():
        return descend_by_channels(pull, level, step, reach, table, gram, kind, numbers)
    _fit((level, (b, n)), (step, (b, n)), (reach, (b, n)), (table, (b, 0 if kind == FLOAT else n)), (gram, (b, b)))
    pull, step, reach, table, gram = (t.contiguous() for t in (pull, step, reach, table, gram))
    moved = torch.empty_like(pull)
    given = (t.data_ptr() for t in (pull, level, step, reach, table, gram, moved))
    library.load().lowbit_descend_block(*given, n, b, kind, *_numbers(numbers))
    return moved


if library.available():
    torch.library.impl("lowbit::gptq_block", "cpu", cpu_gptq_block)
    torch.library.impl("lowbit::descend_block", "cpu", cpu_descend_block)
