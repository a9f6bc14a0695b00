"""The allocator against every possible plan."""

from itertools import product

import numpy as np
import pytest

from tersor.errors import BudgetError
from tersor.methods.allocate import allocate


def brute_force(options, limit):
    plans = [
        p
        for p in product(*(range(len(c)) for c in options))
        if sum(c[i][0] for c, i in zip(options, p, strict=True)) <= limit
    ]
    return min(sum(c[i][1] for c, i in zip(options, p, strict=True)) for p in plans)


def loss_of(options, taken):
    return sum(c[i][1] for c, i in zip(options, taken, strict=True))


def size_of(options, taken):
    return sum(c[i][0] for c, i in zip(options, taken, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_is_the_best_of_all_plans(seed):
    rng = np.random.default_rng(seed)
    options = [
        [
            (int(s), float(loss))
            for s, loss in zip(rng.integers(1, 400, 5), rng.random(5), strict=True)
        ]
        for _ in range(5)
    ]
    limit = int(sum(min(s for s, _ in c) for c in options) * 1.8)
    assert loss_of(options, allocate(options, limit)) == pytest.approx(
        brute_force(options, limit), abs=1e-12
    )


@pytest.mark.parametrize("seed", range(5))
def test_large_weights_cost_at_most_a_cell_each(seed):
    rng = np.random.default_rng(seed)
    options = [
        [
            (int(2**bits * rng.integers(10_000, 90_000)), float(4.0**-bits * rng.random()))
            for bits in range(5)
        ]
        for _ in range(6)
    ]
    limit = int(sum(c[2][0] for c in options))
    taken = allocate(options, limit)
    assert size_of(options, taken) <= limit
    assert loss_of(options, taken) <= brute_force(options, int(limit * (1 - 6 / 8192)))


def test_worked_by_hand():
    # 10 bytes: the second weight gains 5 from 8 bytes, the first only 1, so the first stays small.
    options = [[(2, 3.0), (8, 2.0)], [(2, 6.0), (8, 1.0)]]
    assert allocate(options, 10) == [0, 1]


def test_a_plan_that_only_just_fits_is_found():
    options = [[(70_001, 0.0), (50_001, 1.0)]] * 3
    assert size_of(options, allocate(options, 150_003)) == 150_003


def test_too_few_bytes_are_refused_with_both_figures():
    with pytest.raises(BudgetError, match=r"sum to 4 bytes, above the 3"):
        allocate([[(2, 0.0)], [(2, 0.0)]], 3)
