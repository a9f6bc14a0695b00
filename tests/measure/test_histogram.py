"""Histograms count exactly however they grow, and ranges are what slow references find."""

import math
from itertools import pairwise

import pytest
import torch

from tersor.forms.grid import Grid
from tersor.measure.histogram import (
    BINS,
    Histogram,
    entropy_range,
    least_squares_range,
    percentile_range,
    whole_range,
)


def of(values, parts=7):
    histogram = Histogram()
    for part in values.chunk(parts):
        histogram.add(part)
    return histogram


def made(name):
    draw = torch.Generator().manual_seed(1)
    normal = torch.randn(40000, generator=draw)
    return {
        "normal": normal,
        "rectified": normal.relu(),
        "heavy": normal**3,
        "one side": -normal.abs() - 2,
        "growing": normal * torch.linspace(1e-3, 50, 40000),
    }[name]


names = pytest.mark.parametrize("name", ["normal", "rectified", "heavy", "one side", "growing"])


@names
def test_every_value_is_counted_in_its_bin(name):
    values = made(name)
    histogram = of(values)
    edges = (torch.arange(BINS + 1).double() + histogram.first) * histogram.width
    # A bin of two halves is exact: bins were only ever joined, never cut.
    expected = torch.histogram(values.double(), edges)[0].long()
    assert torch.equal(histogram.counts, expected)
    assert histogram.total == int(histogram.counts.sum()) == len(values)
    assert histogram.zeros == int((values == 0).sum())
    assert (histogram.low, histogram.high) == (float(values.min()), float(values.max()))
    assert histogram.width <= 2.01 * (histogram.high - histogram.low) / (BINS - 2)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="2 of 3 are not finite"):
        Histogram().add(torch.tensor([1.0, math.nan, math.inf]))


@names
def test_percentiles_are_those_of_the_sorted_values(name):
    values, histogram = made(name), of(made(name))
    low, high = percentile_range(histogram, 0.99)
    expected = values.double().quantile(torch.tensor([0.005, 0.995]).double())
    assert abs(low - float(expected[0])) <= 1.01 * histogram.width
    assert abs(high - float(expected[1])) <= 1.01 * histogram.width
    assert whole_range(histogram) == (float(values.min()), float(values.max()))


@names
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_least_squares_is_as_good_as_trying_every_range_on_the_values(name, bits):
    values = made(name)

    def error(low, high):
        return float((Grid.spanning(low, high, bits=bits)(values) - values).square().mean())

    fractions = [2 ** (-n / 4) for n in range(12)]
    ends = [
        (min(float(values.min()), 0) * a, max(float(values.max()), 0) * b)
        for a in fractions
        for b in fractions
    ]
    best = min(error(low, high) for low, high in ends if low < high)
    assert error(*least_squares_range(of(values), bits)) <= 1.06 * best


def slow_entropy(counts):
    """Migacz 2017, slide 31, bin by bin; the first bin's count is the second's."""
    counts = [float(n) for n in counts]
    counts[0] = counts[1]
    best, clip = math.inf, None
    for i in range(128, len(counts) + 1):
        inside = counts[:i]
        wanted = [*inside[:-1], inside[-1] + sum(counts[i:])]
        made = [0.0] * i
        starts = [n * i // 128 for n in range(129)]
        for begin, end in pairwise(starts):
            filled = [n for n in range(begin, end) if inside[n] > 0]
            for n in filled:
                made[n] = sum(inside[begin:end]) / len(filled)
        if any(p > 0 and q == 0 for p, q in zip(wanted, made, strict=True)):
            continue
        total, other = sum(wanted), sum(made)
        apart = sum(
            p / total * math.log((p / total) / (q / other))
            for p, q in zip(wanted, made, strict=True)
            if p > 0
        )
        if apart < best - 1e-12:
            best, clip = apart, i
    return clip


def test_entropy_clips_where_the_slow_reference_does():
    values = made("normal").abs()
    values[:3] = torch.tensor([6.0, 7.0, 7.9])
    fine = of(values)
    # Coarser bins, because the reference takes a second for each hundred.
    coarse = Histogram()
    coarse.width, coarse.low, coarse.high = fine.width * 4, fine.low, fine.high
    coarse.counts = torch.histc(values, BINS, 0, BINS * coarse.width).long()
    coarse.total, coarse.zeros = fine.total, fine.zeros
    counts = coarse.counts[: int(coarse.counts.nonzero().max()) + 1].tolist()
    clip = slow_entropy(counts)
    assert clip < len(counts)
    assert entropy_range(coarse) == (fine.low, clip * coarse.width)


def test_few_levels_are_not_clipped_by_entropy():
    values = torch.tensor([0.0, 1.0, 5.0]).repeat(100)
    assert entropy_range(of(values)) == (0.0, 5.0)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_values_far_from_zero_are_not_clipped_by_entropy(spread):
    # Without joining, a million bins of this width would lie between them and zero.
    values = 1000 + spread * torch.linspace(0, 1, 500)
    assert entropy_range(of(values)) == (1000, float(values.max()))
