import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tersor.measure.statistics import bootstrap, interval, mcnemar, wilson


def naive_mcnemar(broken, fixed):
    n = broken + fixed
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(min(broken, fixed) + 1))
    return float(min(1, 2 * tail))


@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (5, 5), (9, 7), (0, 10), (31, 12), (400, 500)])
def test_mcnemar_equals_the_sum_in_fractions(pair):
    assert mcnemar(*pair) == pytest.approx(naive_mcnemar(*pair), rel=1e-9)
    assert mcnemar(*pair) == pytest.approx(mcnemar(*pair[::-1]), rel=1e-12)


def test_mcnemar_worked_by_hand():
    # Six coins, at most one head: (1 + 6) / 64, both sides.
    assert mcnemar(1, 5) == pytest.approx(14 / 64)


def test_wilson_worked_by_hand_and_never_empty():
    # z^2 = 3.8415; 0 of 1017: z^2 / (n + z^2). 10 of 1017 from the formula, by hand.
    assert wilson(0, 1017) == pytest.approx((0, 3.8415 / 1020.8415), abs=1e-6)
    assert wilson(1017, 1017) == pytest.approx((1017 / 1020.8415, 1), abs=1e-6)
    assert wilson(10, 1017) == pytest.approx((0.00535, 0.01800), abs=1e-5)


def test_bootstrap_of_a_mean_has_the_width_that_theory_gives():
    rows = torch.randn(2000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = interval(bootstrap([rows], [lambda r: r.mean().item()], 0)[:, 0])
    half = 1.96 * rows.std().item() / 2000**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (high + low) / 2 == pytest.approx(rows.mean().item(), abs=half / 5)


def test_bootstrap_repeats_and_pairs_its_columns():
    rows = torch.rand(50, 1, dtype=torch.float64)
    mean = lambda r: r.mean().item()  # noqa: E731
    drawn = bootstrap([rows, rows + 3], [mean, mean], 5)
    assert drawn.shape == (1000, 2)
    assert np.allclose(drawn[:, 1] - drawn[:, 0], 3)
    assert drawn[:, 0].std() > 0.01
    assert (bootstrap([rows], [mean], 5) == drawn[:, :1]).all()
    assert (bootstrap([rows], [mean], 6) != drawn[:, :1]).any()


def test_interval_leaves_out_what_is_not_defined():
    values = np.array([math.nan, *range(101)])
    assert interval(values) == pytest.approx((2.5, 97.5))
    assert all(map(math.isnan, interval(np.array([math.nan]))))
