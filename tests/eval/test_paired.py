"""Paired tests against scipy's own, exact enumeration, and what makes them paired: common noise cancels."""

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from quant.eval.paired import bootstrap, mcnemar, t_test


def test_t_test_is_students_and_common_noise_cancels():
    draw = np.random.default_rng(0)
    windows = draw.normal(3, 1, 12)  # cross-entropies differ far more between windows than between models
    worse = windows + 0.02 + draw.normal(0, 0.005, 12)
    p = t_test(worse - windows)
    assert p == pytest.approx(ttest_rel(worse, windows).pvalue, rel=1e-9)
    assert p < 1e-4
    assert t_test(worse - draw.permutation(windows)) > 0.1  # the same numbers without their pairs show nothing
    assert (t_test([0.0, 0.0]), t_test([0.1, 0.1]), t_test([0.1])) == (1.0, 0.0, None)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 3), (0, 5), (9, 2), (2, 9), (40, 61)])
def test_mcnemar_is_the_exact_binomial(lost, gained):
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_has_the_quantiles_of_all_draws():
    """Three clips have 27 equally likely draws: the interval is between their quantiles, up to the drawing."""
    errors, words = np.array([1.0, -1.0, 2.0]), np.array([4.0, 5.0, 10.0])
    draws = [sum(errors[list(at)]) / sum(words[list(at)]) for at in product(range(3), repeat=3)]
    low, high = bootstrap(errors, words)
    assert low == pytest.approx(np.quantile(draws, 0.025, method="inverted_cdf"))
    assert high == pytest.approx(np.quantile(draws, 0.975, method="inverted_cdf"))
    assert bootstrap(errors, words) == [low, high]
    assert bootstrap(errors, np.array([4.0, 0, 0])) is None


def test_bootstrap_covers_the_truth():
    """95 % intervals of a known mean miss about 3 of 60 data sets."""
    draw = np.random.default_rng(1)
    missed = 0
    for _ in range(60):
        low, high = bootstrap(draw.normal(0.5, 1, 40), np.ones(40))
        missed += not low <= 0.5 <= high
    assert 0 < missed < 3 + 4 * math.sqrt(60 * 0.05 * 0.95)
