"""Intervals: bootstrap percentiles of any metric, Wilson's for a share, McNemar's test for flips.

Source: Efron 1979 (bootstrap percentile interval); Wilson 1927; McNemar 1947 in its exact form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 1000


def bootstrap(
    statistics: Sequence[Tensor], reduces: Sequence[Callable[[Tensor], float]], seed: int
) -> np.ndarray:
    """Reduces resampled rows: (RESAMPLES, len(statistics)).

    statistics: (n, k) each, of the same n samples; every resample draws the same rows of all, which
        is what makes differences between the columns paired
    """
    n = len(statistics[0])
    generator = np.random.default_rng(seed)
    values = np.empty((RESAMPLES, len(statistics)))
    for row in values:
        drawn = torch.from_numpy(generator.integers(0, n, n))
        row[:] = [reduce(rows[drawn]) for rows, reduce in zip(statistics, reduces, strict=True)]
    return values


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the resampled values that are defined."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return math.nan, math.nan
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(defined, [tail, 100 - tail])
    return float(low), float(high)


def wilson(count: int, n: int) -> tuple[float, float]:
    """Interval of the share count / n; unlike the bootstrap it says something when count is 0."""
    z = 1.959963984540054
    share, spread = count / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(broken: int, fixed: int) -> float:
    """Exact two-sided p-value of "as many broken as fixed", a coin thrown broken + fixed times."""
    n, fewer = broken + fixed, min(broken, fixed)
    if n == 0:
        return 1.0
    heads = torch.arange(fewer + 1, dtype=torch.float64)
    logs = math.lgamma(n + 1) - torch.lgamma(heads + 1) - torch.lgamma(n - heads + 1)
    tail = torch.exp(torch.logsumexp(logs, 0) - n * math.log(2)).item()
    return min(1.0, 2 * tail)
