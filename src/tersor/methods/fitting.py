"""Finds the step at which the codes of all weights together take a given number of bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tersor.methods import rates
from tersor.methods.survey import Weight

Array = np.ndarray[Any, np.dtype[Any]]

_PASSES, _NEAR, _FAR = 6, 0.005, 0.05
"""NEAR, FAR: shares of the bits asked for; a miss that ends the search, and one to be told of."""
_MOST = 2.0**30
"""Of a code; those that no integer holds are refused when they are chosen."""
_SAMPLE = 2**21
"""Weights from which a first step is estimated."""


@dataclass(frozen=True)
class Fit:
    """Codes of weights, and what they were chosen by.

    step: times the relative step of each weight
    reached: bits that a weight takes on average
    tables, rate: bits and rate of `Terms`
    """

    step: float
    reached: float
    codes: list[Array]
    tables: Array
    rate: float


def fit(weights: Sequence[Weight], bits: float, states: int, thrift: float) -> Fit:
    """Codes that take about `bits` bits a weight, with a step between them and their tables."""
    step, tables = _first_guess(weights, bits, states)
    best: Fit | None = None
    tried: list[tuple[float, float]] = []
    for _ in range(_PASSES):
        found, counts = fit_at(weights, step, states, thrift, tables)
        tried.append((step, found.reached))
        if best is None or abs(found.reached - bits) < abs(best.reached - bits):
            best = found
        if abs(found.reached - bits) <= _NEAR * bits:
            break
        step = _next_step(tried, bits)
        if bits / 2 < found.reached < 2 * bits:
            tables = rates.bits_of(counts)
        else:
            # Where most codes were 0, others would be too dear ever to come back.
            tables, _ = rounded_tables(weights, step, states)
    assert best is not None
    return best


def missed(reached: float, bits: float) -> bool:
    """Whether that is so far from what was asked for that the user must hear of it."""
    return abs(reached - bits) > _FAR * bits


def _next_step(tried: Sequence[tuple[float, float]], bits: float) -> float:
    """Between the nearest steps that took too much and too little, else beyond the last.

    tried: steps, and the bits that they took
    """
    above = min((t for t in tried if t[1] > bits), key=lambda t: t[1], default=None)
    below = max((t for t in tried if t[1] <= bits), key=lambda t: t[1], default=None)
    if above is None or below is None or not above[0] < below[0]:
        step, reached = tried[-1]
        # A bit more halves the step where codes are large; where most are 0 it takes more.
        return step * float(2 ** ((reached - bits) * max(1.0, 1.5 / max(bits, 0.5))))
    share = (above[1] - bits) / (above[1] - below[1])
    return above[0] * float((below[0] / above[0]) ** min(max(share, 0.1), 0.9))


def fit_at(
    weights: Sequence[Weight], step: float, states: int, thrift: float, tables: Array
) -> tuple[Fit, Array]:
    """The codes at a given step, chosen by given tables, and how often each magnitude occurs."""
    rate = thrift * (1 / 12 if states == 1 else 1 / 4)
    found = [
        weight.codes(step * weight.step, states=states, bits=tables, rate=rate)
        for weight in weights
    ]
    counts = rates.count(found, states)
    reached = rates.estimate(found, counts) / sum(weight.matrix.size for weight in weights)
    return Fit(step, reached, [codes for codes, _ in found], tables, rate), counts


def rounded_tables(weights: Sequence[Weight], step: float, states: int) -> tuple[Array, float]:
    """Bits of the codes that rounding alone would give, by table, and what all take together."""
    spacing = 1 if states == 1 else 2
    found = []
    for weight in weights:
        levels = (weight.matrix / np.float32(step * weight.step)).clip(-_MOST, _MOST)
        found.append((np.rint(levels / spacing).astype(np.int32), rates.classes_of(levels, states)))
    counts = rates.count(found, 1)
    taken = rates.estimate(found, counts)
    counts[1::2] = counts[::2]
    return rates.bits_of(counts), taken


def _first_guess(weights: Sequence[Weight], bits: float, states: int) -> tuple[float, Array]:
    """A step at which rounding alone takes `bits`, by bisection, and the bits of its codes."""
    every = max(1, sum(weight.matrix.size for weight in weights) // _SAMPLE)
    samples = [replace(weight, matrix=weight.matrix[::every]) for weight in weights]
    size = sum(sample.matrix.size for sample in samples)
    largest = max(float(np.abs(sample.matrix).max()) / sample.step for sample in samples)
    low, high = np.log(max(largest, 1e-30)) - 16, np.log(max(largest, 1e-30))
    tables = np.zeros((0, 0), np.float32)
    for _ in range(12):
        middle = (low + high) / 2
        tables, taken = rounded_tables(samples, float(np.exp(middle)), states)
        low, high = (middle, high) if taken > bits * size else (low, middle)
    return float(np.exp(high)), tables
