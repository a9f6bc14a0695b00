"""Histograms of activations, collected once, and the ranges that observers read from them.

Sources: percentile, mean squared error and entropy ranges as compared by Wu et al. 2020,
arXiv:2004.09602, section 3.2 and 6.1; the entropy rule by Migacz 2017, "8-bit inference with
TensorRT", GTC, slides 28-33, with the count of the first bin taken from the second.
Differs: exact zeros are taken to cost nothing (a level stands for them), and the error within a bin
is taken into account, which rounding bin centers alone would hide.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

BINS = 2048
_TRIED, _ROUNDS = 48, 3
"""Clipping points that the rule of least squares tries for each end of a range, and how often."""
_LEVELS = 128
"""Of the entropy rule: as many as |x| has of 8 signed bits."""


class Histogram:
    """Counts of values in equal bins whose edges are whole multiples of their width.

    The width is a power of two, so that a value is counted in exactly its bin. Where one lies
    outside, bins are joined in pairs: counts stay exact, and a bin is less than twice as wide as
    1/2046 of the range of all that was seen.

    counts: (2048,) int64; bin i holds first + i times the width, and up to a width more
    low, high: of the values themselves
    total, zeros: how many values there were, and how many of them 0.0
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.first, self.width = 0, 0.0
        self.low, self.high = math.inf, -math.inf
        self.total = self.zeros = 0

    def add(self, values: Tensor) -> None:
        """Counts values of any shape. Raises ValueError where one is not finite."""
        flat = values.detach().flatten().float().cpu()
        if not flat.numel():
            return
        low, high = (float(end) for end in flat.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{int((~flat.isfinite()).sum())} of {flat.numel()} are not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total += flat.numel()
        self.zeros += int((flat == 0).sum())
        self._grow()
        places = (flat.double() / self.width).floor().long() - self.first
        self.counts += torch.bincount(places.clamp(0, BINS - 1), minlength=BINS)

    @property
    def centers(self) -> Tensor:
        """(2048,) float64, the middle of each bin."""
        return (torch.arange(BINS, dtype=torch.float64) + self.first + 0.5) * self.width

    def _grow(self) -> None:
        """Makes room for low..high, by wider bins where that takes more than there are."""
        bins = self.first + torch.arange(BINS)
        if not self.width:
            # Two to spare: ends need not fall on edges.
            spread, size = self.high - self.low, max(abs(self.low), abs(self.high))
            self.width = 2.0 ** math.ceil(math.log2(max(spread / (BINS - 2), 1e-9 * size, 1e-30)))
        lowest, highest = self._ends()
        while highest - lowest >= BINS:
            self.width *= 2
            bins //= 2
            lowest, highest = self._ends()
        filled = self.counts > 0
        first = lowest - (BINS - 1 - highest + lowest) // 2
        counts = torch.zeros(BINS, dtype=torch.int64)
        self.counts = counts.index_add_(0, bins[filled] - first, self.counts[filled])
        self.first = first

    def _ends(self) -> tuple[int, int]:
        return math.floor(self.low / self.width), math.floor(self.high / self.width)


def whole_range(seen: Histogram) -> tuple[float, float]:
    """From the lowest to the highest value: nothing is clipped."""
    return seen.low, seen.high


def percentile_range(seen: Histogram, share: float = 0.9999) -> tuple[float, float]:
    """What is left when (1 - share) / 2 of the values are clipped at each end."""
    below = seen.counts.cumsum(0).double() / seen.total
    low = int((below > (1 - share) / 2).nonzero()[0]) + seen.first
    high = int((below >= 1 - (1 - share) / 2 - 1e-12).nonzero()[0]) + seen.first + 1
    return max(low * seen.width, seen.low), min(high * seen.width, seen.high)


def least_squares_range(seen: Histogram, bits: int = 8) -> tuple[float, float]:
    """The range whose 2**bits levels leave the least mean squared error.

    Each end is tried at 48 fractions of what was seen on its side of zero, down to 1/59, in turn
    with the other.
    """
    fractions = 2.0 ** (-torch.arange(_TRIED, dtype=torch.float64) / 8)
    lows, highs = fractions * min(seen.low, 0.0), fractions * max(seen.high, 0.0)
    filled = seen.counts > 0
    counts, centers = seen.counts.double(), seen.centers
    if seen.zeros:
        counts[-seen.first] -= seen.zeros
    counts, centers = counts[filled], centers[filled]
    low, high = lows[0], highs[0]
    for _ in range(_ROUNDS):
        high = highs[_errors(low, highs, counts, centers, seen.width, bits).argmin()]
        low = lows[_errors(lows, high, counts, centers, seen.width, bits).argmin()]
    return float(low), float(high)


def _errors(
    low: Tensor, high: Tensor, counts: Tensor, centers: Tensor, width: float, bits: int
) -> Tensor:
    """(ranges,) summed squared errors of values in bins, on levels from `low` to `high`."""
    top = 2**bits - 1
    step = ((high - low) / top).clamp(min=1e-300)[:, None]
    zero = (-low.reshape(-1, 1) / step).round()
    near = centers / step
    whole = near.round()
    outside = (whole < -zero) | (whole > top - zero)
    error = (near - torch.minimum(whole.maximum(-zero), top - zero)).square()
    # Of a bin as wide as a step or wider, the center says nothing about its values.
    spread = (width / step).square() / 12
    error = torch.where((width > step / 2) & ~outside, 1 / 12, error + spread)
    found: Tensor = (error * step.square()) @ counts
    return found


def entropy_range(seen: Histogram) -> tuple[float, float]:
    """Clips |x| where its distribution and the one that 128 levels make of it diverge least."""
    some = seen.counts > 0
    bins, width = (seen.first + torch.arange(BINS))[some], seen.width
    places = torch.where(bins < 0, -bins - 1, bins)
    # Of values far from zero, bins are joined until as many as there are reach down to it.
    while int(places.max()) >= BINS:
        places, width = places // 2, 2 * width
    magnitudes = torch.zeros(BINS, dtype=torch.float64)
    magnitudes.index_add_(0, places, seen.counts[some].double())
    filled = int(magnitudes.nonzero().max()) + 1
    counts = magnitudes[:filled].numpy()
    # The zeros of a ReLU say nothing about where to clip, and would outweigh everything.
    counts[0] = counts[1] if filled > 1 else counts[0]
    apart = [_divergence(counts, clip) for clip in range(_LEVELS, filled + 1)]
    least = min(apart, default=math.inf)
    clip = width * (_LEVELS + apart.index(least) if least < math.inf else filled)
    return max(seen.low, -clip), min(seen.high, clip)


def _divergence(counts: Array, clip: int) -> float:
    """KL(P || Q) in nats: P has what is clipped in its last bin, Q is P in 128 levels."""
    inside = counts[:clip]
    wanted = inside.copy()
    wanted[-1] += counts[clip:].sum()
    starts = np.arange(_LEVELS) * clip // _LEVELS
    filled = inside > 0
    share = np.add.reduceat(inside, starts) / np.maximum(
        np.add.reduceat(filled, starts, dtype=int), 1
    )
    level = np.searchsorted(starts, np.arange(clip), side="right") - 1
    made = np.where(filled, share[level], 0.0)
    some = wanted > 0
    # A few bins alone would be met exactly, however little of the rest were left.
    if filled.sum() < _LEVELS or (made[some] == 0).any():
        return math.inf
    p, q = wanted[some] / wanted.sum(), made[some] / made.sum()
    return float((p * np.log(p / q)).sum())
