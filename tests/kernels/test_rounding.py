"""A block of channels rounded in C++ has the levels of the torch form, on every instruction set, for every kind of levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels.cpu import library
from quant.kernels.cpu.rounding import cpu_descend_block, cpu_gptq_block
from quant.kernels.minifloat import Minifloat
from quant.kernels.rounding import TWO_BITS, Levels, descend_by_channels, gptq_by_channels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_library = pytest.mark.skipif(not library.available(), reason="the C++ kernels are not built")
OnEveryIsa = Callable[[Callable[[], Any]], list[Any]]
KINDS = ("3 bits", "8 bits", "E2M1", "E4M3", "two bits")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels_of(kind: str, like: Tensor) -> Levels:
    if kind == "two bits":
        return Levels(TWO_BITS, random(*like.shape, seed=1).clamp(-1, 1))
    if kind.startswith("E"):
        return Levels.floats(Minifloat(int(kind[1]), int(kind[3])), like)
    count = 2 ** int(kind[0])
    return Levels.integers(random(*like.shape, seed=1).add_(count / 2).round_().clamp_(0, count - 1), count)


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) < 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_the_nearest_of_all(kind: str) -> None:
    u = random(3, 500).mul_(4)
    rule = levels_of(kind, u)
    for j in range(3):
        if kind == "two bits":
            r = rule.table[j]
            every = torch.stack([torch.zeros_like(r), torch.ones_like(r), r, 1 + r])
        elif kind.startswith("E"):
            values = Minifloat(int(kind[1]), int(kind[3])).magnitudes
            every = torch.cat((values, -values)).unsqueeze(1).expand(-1, 500)
        else:
            every = torch.arange(2.0 ** int(kind[0])).unsqueeze(1) - rule.table[j]
        distance = (rule.nearest(u[j].clone(), j) - u[j]).abs()
        assert torch.allclose(distance, (every - u[j]).abs().amin(0), atol=1e-6)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "rows"), [(1, 1), (64, 17), (128, 1001), (7, 32)])
def test_gptq_is_that_of_torch(channels: int, rows: int, kind: str, on_every_isa: OnEveryIsa) -> None:
    weight, step = random(channels, rows), random(channels, rows, seed=2).abs() + 0.3
    factor = torch.triu(random(channels, channels, seed=3) / channels + torch.eye(channels))
    rule = levels_of(kind, weight)
    wanted = gptq_by_channels(weight, step, rule.table, factor, rule.kind, list(rule.numbers))
    for got in on_every_isa(lambda: cpu_gptq_block(weight, step, rule.table, factor, rule.kind, list(rule.numbers))):
        assert torch.equal(got[0], wanted[0])
        assert close(got[1], wanted[1])


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "rows"), [(1, 1), (64, 17), (128, 1001), (7, 32)])
def test_descent_is_that_of_torch(channels: int, rows: int, kind: str, on_every_isa: OnEveryIsa) -> None:
    pull, step = random(channels, rows), random(channels, rows, seed=2).abs() + 0.3
    root = random(channels, channels + 3, seed=3)
    gram, reach = root @ root.T / channels, random(channels, rows, seed=4).abs()
    rule = levels_of(kind, pull)
    start = torch.stack([rule.nearest(row.clone(), j) for j, row in enumerate(random(channels, rows, seed=5).mul_(3))])

    def run(call: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        level = start.clone()
        return call(pull, level, step, reach, rule.table, gram, rule.kind, list(rule.numbers)), level

    moved, level = run(descend_by_channels)
    assert channels == 1 or not torch.equal(level, start)
    for got in on_every_isa(lambda: run(cpu_descend_block)):
        assert torch.equal(got[1], level)
        assert close(got[0], moved)


@needs_library
def test_a_block_that_does_not_fit_is_refused() -> None:
    weight = random(4, 8)
    with pytest.raises(ValueError, match="does not fit a block of channels"):
        cpu_gptq_block(weight, random(4, 7), weight, random(4, 4), 0, [7.0])
    with pytest.raises(ValueError, match="does not fit a block of channels"):
        cpu_descend_block(weight, weight, weight, weight, weight, random(3, 3), 0, [7.0])
