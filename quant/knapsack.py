"""The choice of one option per item that loses least within a budget, exactly up to the grain of the budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GRAINS = 1 << 16  # the largest possible sum of costs is so many grains


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], room: int) -> list[int] | None:
    """Per item the index of its option: their costs sum to at most `room`, their losses to the least there is; None: no room.

    costs[i][o] > 0, losses[i][o] >= 0. Dynamic programming over the budget in grains of which an option takes a whole number,
    rounded up. The grain depends on the costs alone, so a larger room never loses more.
    """
    grain = max(1, -(-sum(max(options) for options in costs) // GRAINS))
    width = room // grain + 1
    best = np.zeros(width)  # least loss of the items so far, by grains that may be used
    taken = []
    for options, lost in zip(costs, losses, strict=True):
        rows = np.full((len(options), width), np.inf)
        for o, (cost, loss) in enumerate(zip(options, lost, strict=True)):
            size = -(-cost // grain)
            if size < width:
                rows[o, size:] = best[: width - size] + loss
        taken.append(rows.argmin(0).astype(np.int16))
        best = rows.min(0)
    if not np.isfinite(best[-1]):
        return None
    at, chosen = width - 1, []
    for options, took in zip(reversed(costs), reversed(taken), strict=True):
        chosen.append(int(took[at]))
        at -= -(-options[chosen[-1]] // grain)
    return chosen[::-1]
