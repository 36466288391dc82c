"""Whether two models differ, from what both did on the same units (windows, clips, items): tests and intervals of paired data.

All are two-sided: a p value is the chance of a difference at least as large if the two models were equally good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import bdtr, stdtr

LEVEL = 0.05  # p values below it are called significant; intervals cover 1 - LEVEL
RESAMPLES = 10_000
CHUNK = 500  # resamples drawn at once: 500 x 5000 clips are 20 MB


def t_test(differences: Sequence[float]) -> float | None:
    """p value of Student's paired t test that the mean of `differences` is zero; None where one value gives no spread.

    Differences that are all the same leave no doubt: 1 where they are zero, else 0.
    """
    count = len(differences)
    if count < 2:
        return None
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if deviation == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(count - 1, -abs(mean) * math.sqrt(count) / deviation))


def mcnemar(lost: int, gained: int) -> float:
    """p value of McNemar's exact test: of the items on which just one model is right, half should be right in either.

    lost: the reference alone is right. gained: the model alone is.
    """
    return min(1.0, float(2 * bdtr(min(lost, gained), lost + gained, 0.5)))


def bootstrap(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> list[float] | None:
    """Percentile interval [low, high] of sum(numerator) / sum(denominator), [U] each, over RESAMPLES draws of the units.

    For a paired difference the numerator is the difference of each unit. None for fewer than two units that count.
    """
    counted = denominator > 0
    if np.count_nonzero(counted) < 2:
        return None
    units = len(numerator)
    draw = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for _ in range(RESAMPLES // CHUNK):
        times = draw.multinomial(units, np.full(units, 1 / units), size=CHUNK)  # how often each unit was drawn
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(times @ numerator / (times @ denominator))
    ratios = np.concatenate(found)
    return [float(x) for x in np.quantile(ratios[np.isfinite(ratios)], [LEVEL / 2, 1 - LEVEL / 2])]
