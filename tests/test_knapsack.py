"""The choice is the best there is, within the room, and more room never loses more."""

from __future__ import annotations

import itertools
import random

import pytest

from quant.knapsack import GRAINS, choose


def instance(seed: int, unit: int = 1) -> tuple[list[list[int]], list[list[float]]]:
    draw = random.Random(seed)
    costs = [[unit * draw.randint(1, 30) for _ in range(draw.randint(1, 4))] for _ in range(5)]
    return costs, [[draw.random() for _ in options] for options in costs]


def spent(rows: list[list[int]] | list[list[float]], chosen: list[int]) -> float:
    return sum(row[o] for row, o in zip(rows, chosen, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_it_is_as_good_as_trying_everything(seed: int) -> None:
    costs, losses = instance(seed)
    everything = list(itertools.product(*(range(len(options)) for options in costs)))
    for room in (5, 20, 40, 60, 90, 200):
        possible = [list(way) for way in everything if spent(costs, list(way)) <= room]
        chosen = choose(costs, losses, room)
        if not possible:
            assert chosen is None
            continue
        assert chosen is not None
        assert spent(costs, chosen) <= room
        assert spent(losses, chosen) == pytest.approx(min(spent(losses, way) for way in possible))


@pytest.mark.parametrize("seed", range(6))
def test_grains_keep_the_room_and_the_order(seed: int) -> None:
    """Costs far beyond the number of grains, and of no round size: the room holds, more of it never loses more."""
    costs, losses = instance(seed, unit=GRAINS // 7 + 13)
    before = float("inf")
    for room in range(sum(map(min, costs)), sum(map(max, costs)) + 9999, sum(map(max, costs)) // 37):
        chosen = choose(costs, losses, room)
        if chosen is None:
            assert before == float("inf")
            continue
        assert spent(costs, chosen) <= room
        assert spent(losses, chosen) <= before
        before = spent(losses, chosen)
    assert before == pytest.approx(sum(map(min, losses)))
