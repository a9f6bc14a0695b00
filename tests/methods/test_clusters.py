"""k-means on a line: Lloyd's iteration, its starts, weights and prices, against slow ones."""

import math
from itertools import combinations

import pytest
import torch

from tersor.methods.share.clusters import Values, clusters

STARTS = ["linear", "density", "random", "best"]


def normal(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(n, seed):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def error(numbers, values, importance=1.0):
    return ((numbers[:, None] - values).square().amin(1) * importance).sum().item()


def naive_lloyd(numbers, centers, importance):
    """Assign each number to its nearest center, move each center to its mean, repeat."""
    while True:
        owner = (numbers[:, None] - centers).abs().argmin(1)
        assert torch.bincount(owner, minlength=len(centers)).all()
        moved = torch.stack(
            [
                (numbers * importance)[owner == i].sum() / importance[owner == i].sum()
                for i in range(len(centers))
            ]
        )
        if torch.allclose(moved, centers, rtol=0, atol=1e-13):
            return moved
        centers = moved


def best(numbers, count, importance):
    """The least squared error over every way to cut the sorted numbers into `count` stretches."""
    order = numbers.argsort()
    x, h = numbers[order], importance[order]

    def cost(part, weigh):
        return (weigh * (part - (weigh * part).sum() / weigh.sum()).square()).sum().item()

    return min(
        sum(map(cost, x.tensor_split(list(cuts)), h.tensor_split(list(cuts))))
        for cuts in combinations(range(1, len(x)), count - 1)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", ["linear", "density"])
@pytest.mark.parametrize("weighed", [False, True])
def test_equals_a_slow_lloyd(count, seed, start, weighed):
    numbers = normal(400, seed)
    importance = uniform(400, seed) if weighed else torch.ones(400, dtype=torch.float64)
    if start == "linear":
        centers = torch.linspace(numbers.min(), numbers.max(), count, dtype=torch.float64)
    else:
        ranks = [int((i + 0.5) / count * 400) for i in range(count)]
        centers = numbers.sort().values[ranks]
    expected = naive_lloyd(numbers, centers, importance)
    found = clusters(numbers, count, start, importance=importance if weighed else None)
    assert torch.allclose(found.values, expected, rtol=0, atol=1e-10)
    assert not found.prices.any()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighed", [False, True])
def test_the_best_start_is_the_best_there_is(count, seed, weighed):
    numbers = normal(14, seed)
    importance = uniform(14, seed) if weighed else torch.ones(14, dtype=torch.float64)
    found = clusters(numbers, count, "best", importance=importance)
    # Where numbers count differently, the nearest value is still the best for each.
    assert error(numbers, found.values, importance) == pytest.approx(
        best(numbers, count, importance), rel=1e-9
    )


@pytest.mark.parametrize("count", [4, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_no_start_ends_lower_than_the_best(count, seed):
    numbers = torch.cat((normal(20_000, seed), 30 * normal(20, seed + 9)))
    errors = {
        start: error(numbers, clusters(numbers, count, start, generator=drawn()).values)
        for start in STARTS
    }
    # Among so many numbers it may cut at some places only, and Lloyd's iteration goes on from it.
    assert errors["best"] <= 1.01 * min(errors.values())
    assert errors["density"] > 1.2 * errors["best"]


@pytest.mark.parametrize("count", [2, 7, 16, 100, 256])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", ["normal", "outliers", "steps"])
def test_every_value_is_the_mean_of_its_numbers_and_none_is_idle(count, start, kind):
    numbers = normal(3000, count)
    if kind == "outliers":
        numbers[:3] *= 1000
    if kind == "steps":
        numbers = (numbers * 200).round() / 200
    values = clusters(numbers, count, start, generator=drawn()).values
    assert len(values) == count
    assert (values.diff() > 0).all()
    owner = (numbers[:, None] - values).abs().argmin(1)
    assert torch.bincount(owner, minlength=count).all()
    means = torch.stack([numbers[owner == i].mean() for i in range(count)])
    assert torch.allclose(values, means, rtol=1e-9, atol=1e-12)


def test_clusters_worked_by_hand():
    # From 0 and 10: 0 1 2 | 9 10 gives 1 and 9.5, and no number changes sides.
    assert clusters(torch.tensor([0.0, 10.0, 1.0, 9.0, 2.0]), 2).values.tolist() == [1.0, 9.5]
    # Were 9 worth three others, the second value would be (3 * 9 + 10) / 4.
    counts = torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0])
    weighed = clusters(torch.tensor([0.0, 10.0, 1.0, 9.0, 2.0]), 2, importance=counts)
    assert weighed.values.tolist() == pytest.approx([1.0, 9.25])


def test_an_idle_value_moves_to_the_worst_number():
    # From 0, 5 and 10 the middle one has no number. Of 0, 1, 3 (mean 4/3) the worst is 3.
    assert clusters(torch.tensor([0.0, 1.0, 3.0, 10.0]), 3).values.tolist() == [0.5, 3.0, 10.0]


@pytest.mark.parametrize("count", [4, 5, 256])
@pytest.mark.parametrize("start", STARTS)
def test_few_distinct_numbers_are_kept_exactly(count, start):
    numbers = torch.tensor([3.0, -1.0, 3.0, 0.0, 0.25, 0.0])
    assert clusters(numbers, count, start).values.tolist() == [-1.0, 0.0, 0.25, 3.0]


@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_an_even_start_keeps_large_numbers_closer(count, seed):
    numbers = normal(4000, seed)
    linear, density = (
        (numbers[:, None] - clusters(numbers, count, start).values).abs().amin(1).max()
        for start in ("linear", "density")
    )
    assert linear < 0.9 * density


@pytest.mark.parametrize("count", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", range(5))
def test_codes_are_those_of_the_least_cost(count, seed):
    book = Values(normal(count, seed), uniform(count, seed + 1) * 0.3)
    numbers = normal(2000, seed + 2) * 2
    cost = (numbers[:, None] - book.values).square() + book.prices
    codes = book.codes(numbers)
    taken = cost.gather(1, codes[:, None])[:, 0]
    assert torch.allclose(taken, cost.amin(1), rtol=0, atol=1e-12)


def test_codes_worked_by_hand():
    # (x - 0)^2 = (x - 2)^2 + 1 at x = 1.25; a price of 5 for the value between is never paid.
    book = Values(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 5.0]))
    assert book.codes(torch.tensor([1.2, 1.25, 1.3])).tolist() == [1, 1, 0]
    # Of equal values the cheaper, then the first.
    twice = Values(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert twice.codes(torch.tensor([0.0, 1.0])).tolist() == [2, 1]


def naive_priced(numbers, centers, bit, importance):
    """Each number to its cheapest value, values to means, prices to shares, until nothing moves."""
    prices = torch.zeros_like(centers)
    costs = []
    while True:
        cost = (numbers[:, None] - centers).square() + prices
        owner = cost.argmin(1)
        costs.append(float((importance * cost.amin(1)).sum()))
        used = [i for i in range(len(centers)) if (owner == i).any()]
        mass = torch.stack([importance[owner == i].sum() for i in used])
        moved = torch.stack([(numbers * importance)[owner == i].sum() for i in used]) / mass
        paid = bit * (mass.sum() / mass).log2()
        if len(moved) == len(centers) and torch.allclose(moved, centers, rtol=0, atol=1e-13):
            return moved, paid, costs
        centers, prices = moved, paid


@pytest.mark.parametrize("thrift", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighed", [False, True])
def test_priced_values_equal_a_slow_search(thrift, seed, weighed):
    numbers = normal(400, seed)
    importance = uniform(400, seed) if weighed else torch.ones(400, dtype=torch.float64)
    importance = importance / importance.mean()
    centers = torch.linspace(numbers.min(), numbers.max(), 12, dtype=torch.float64)
    bit = thrift * 2 * math.log(2) * error(numbers, centers, importance) / 400
    values, prices, costs = naive_priced(numbers, centers, bit, importance)
    found = clusters(numbers, 12, importance=importance, thrift=thrift)
    assert torch.allclose(found.values, values, rtol=0, atol=1e-10)
    assert torch.allclose(found.prices, prices, rtol=0, atol=1e-10)
    # After the first round, which pays nothing, the cost never rises.
    assert costs[1:] == sorted(costs[1:], reverse=True)


def test_a_bit_saves_what_it_costs():
    # At thrift 1 a bit is paid as much error as one more bit of even steps would save.
    numbers, spent = normal(50_000, 0), []
    for thrift in (0.9, 1.1):
        book = clusters(numbers, 256, thrift=thrift)
        codes = book.codes(numbers)
        share = codes.bincount().double() / len(codes)
        bits = float(-(share * share.clamp(min=1e-12).log2()).sum())
        spent.append((bits, float((numbers - book.values[codes]).square().mean())))
    (more, small), (less, large) = spent
    even = float((numbers.max() - numbers.min()) ** 2 / 255**2 / 12)
    assert (large - small) / (more - less) == pytest.approx(2 * math.log(2) * even, rel=0.3)
