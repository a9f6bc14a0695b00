"""What pictures with axes share: round numbers, and places in percent."""

import math

from tersor.report.markup import Markup, tag


def line(kind: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    """A straight line between two places in percent."""
    ends = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    return tag("line", class_=kind, **{name: f"{at:.2f}%" for name, at in ends.items()})


def along(value: float, ticks: list[float]) -> float:
    """Where a value lies between the first and the last tick, in percent."""
    return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])


def ticks(values: list[float]) -> list[float]:
    """Three to six round numbers that enclose the values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step: float = 10.0 ** math.floor(math.log10(span / 2))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def decades(values: list[float]) -> tuple[list[float], list[float]]:
    """Whole powers of ten that enclose the values, and the logarithm of each value.

    A point without any divergence sits on the lowest line.
    """
    positive = [v for v in values if v > 0] or [1.0]
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    ticks = [float(exponent) for exponent in range(low, high + 1)]
    return ticks, [math.log10(v) if v > 0 else float(low) for v in values]
