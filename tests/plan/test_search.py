"""The search for a file of a given size, over routes whose files are made up."""

from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, log2
from types import SimpleNamespace

import pytest

from tersor.errors import BudgetError
from tersor.plan import search
from tersor.plan.budget import Budget
from tersor.plan.route import Plan, Route
from tersor.plan.trial import Point


@dataclass
class Shop:
    """A bench whose files have the bytes that `size` says. written: the payloads in turn"""

    size: object
    budget: Budget = field(default_factory=lambda: Budget(size=1000))
    written: list = field(default_factory=list)

    @property
    def study(self):
        return SimpleNamespace(size_before=10**9, before={}, task=None)

    def attempt(self, plan):
        self.written.append(plan.spent)
        return Point(plan, self.size(plan.spent))

    def judge(self, point):
        return point


def one_number(weights):
    """Plans as the coded route makes them."""

    def propose(payload):
        bits = round(min(max(8 * payload / weights, 0.1), 16), 3)
        return Plan([{"bits": bits}], round(bits * weights / 8))

    return Route(propose, ceil(weights / 80), weights, 4 * weights, lambda _: [])


def test_a_miss_by_a_few_bytes_is_not_tried_again():
    # The dear choice takes 900 bytes, the file 110 more, 10 too many. A little less for the weights
    # still leaves room for the dear choice; only less than 900 lead to the cheap one.
    def propose(payload):
        dear = payload >= 900
        return Plan([{"dear": dear}], 900 if dear else 500, 0.0 if dear else 1.0)

    shop = Shop(lambda spent: spent + 110)
    route = Route(propose, 500, 900, 900, lambda _: [])
    assert search.fit(shop, route, 1000 + search._MARGIN).bytes == 610
    assert shop.written == [900, 500]


@pytest.mark.parametrize("overhead", [500, 30_000])
@pytest.mark.parametrize("slope", [0.5, 0.9, 1.1])
@pytest.mark.parametrize("scatter", [0.0, 0.003])
def test_four_files_or_fewer_come_within_half_a_percent_of_the_limit(overhead, slope, scatter):
    # Sizes scatter from one rate to the next, since codes take steps towards their rate.
    def size(spent):
        return round(slope * spent * (1 + scatter * ((spent * 7919) % 101 / 50 - 1)) + overhead)

    for limit in (50_000, 164_000, 333_333):
        shop = Shop(size)
        found = search.fit(shop, one_number(10**6), limit)
        assert 0.995 * limit <= found.bytes <= limit - search._MARGIN
        assert len(shop.written) <= 4


def test_bytes_that_grow_unevenly_are_still_met():
    shop = Shop(lambda spent: round(20_000 * log2(1 + spent / 5_000)))
    found = search.fit(shop, one_number(10**6), 60_000)
    assert 0.995 * 60_000 <= found.bytes <= 60_000


def test_a_limit_beyond_the_finest_codes_ends_with_them():
    shop = Shop(lambda spent: spent)
    assert search.fit(shop, one_number(1000), 3_500).bytes == 2_000
    assert search.fit(shop, one_number(1000), 4_000 + search._MARGIN).bytes == 4_000
    assert shop.written == [2_000, 4_000]


def test_a_limit_below_the_coarsest_codes_is_refused_after_two_files():
    shop = Shop(lambda spent: spent + 900)
    with pytest.raises(BudgetError, match=r"allows 700 bytes, but the smallest file .* 1,009"):
        search.fit(shop, one_number(1000), 700)
    assert len(shop.written) == 2


def test_the_front_is_what_the_route_expects():
    route = Route(lambda p: Plan([], p, 1 / p), 100, 800, 3200, lambda _: [])
    rows = search.front(route, Point(Plan([], 200), 250), steps=4)
    assert rows == [(150, 0.01), (250, 0.005), (450, 0.0025), (850, 0.00125)]
    assert search.front(one_number(100), Point(Plan([], 20), 50)) == []


def test_the_smallest_file_is_found_by_halving(monkeypatch):
    # Quality holds from 2,345 bytes on.
    monkeypatch.setattr(search, "_short", lambda _, p: "lost" if p.bytes < 2_345 else "")
    shop = Shop(lambda spent: spent, Budget(drop=1))
    found = search.smallest(shop, one_number(8_000))
    assert 2_345 <= found.bytes < 2_345 * 1.02
    assert len(shop.written) == search._HALVINGS
    assert all(a != b for a, b in pairwise(shop.written))
