"""The scatter plot of all points tried: bytes across, divergence up, the best trade-offs joined.

Positions are percentages and words are HTML, so that text keeps its size on a phone.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

from tersor.report import figures
from tersor.report.markup import Markup, tag

Data = dict[str, Any]


class Spot(NamedTuple):
    """A point's place in percent from the left and from the top."""

    x: float
    y: float
    point: Data


def scatter(points: list[Data]) -> Markup:
    """Bytes across, divergence up (logarithmic); the front of best trade-offs, the chosen point."""
    placed = [p for p in points if p.get("divergence") is not None and p.get("bytes")]
    if not placed:
        return Markup("")
    across = _ticks([float(p["bytes"]) for p in placed])
    up, heights = _decades([float(p["divergence"]) for p in placed])
    spots = [
        Spot(_along(p["bytes"], across), 100 - _along(height, up), p)
        for p, height in zip(placed, heights, strict=True)
    ]
    front = _front(spots)
    ordered = sorted(spots, key=lambda spot: bool(spot.point.get("chosen")))
    svg = tag(
        "svg",
        [_line("grid", 0, 100, 100 - _along(d, up), 100 - _along(d, up)) for d in up],
        [_line("grid", _along(t, across), _along(t, across), 0, 100) for t in across],
        [_line("front", a.x, b.x, a.y, b.y) for a, b in pairwise(front)],
        [_circle(spot, spot in front) for spot in ordered],
        role="img",
        aria_label="Size against divergence of every point tried; the figures follow as a table.",
    )
    rows = [tag("span", f"{10.0**d:g}", style=f"top:{100 - _along(d, up):.2f}%") for d in up]
    columns = [tag("span", figures.size(t), style=f"left:{_along(t, across):.2f}%") for t in across]
    words = "bytes of the file; upwards: divergence from the original, logarithmic"
    return tag(
        "div",
        tag("div", rows, class_="y"),
        svg,
        tag("div", columns, class_="x"),
        tag("div", words, class_="axis"),
        class_="plot",
    )


def _circle(spot: Spot, best: bool) -> Markup:
    x, y, point = f"{spot.x:.2f}%", f"{spot.y:.2f}%", spot.point
    text = f"{figures.size(point['bytes'])}, divergence {figures.digits(point['divergence'])}"
    words = tag("title", f"{text} {point.get('note') or ''}".strip())
    if not point.get("chosen"):
        return tag("circle", words, class_="point best" if best else "point", r=5, cx=x, cy=y)
    # The label grows towards the middle of the plot, so that it stays inside.
    left = spot.x > 50
    shift, anchor = (-17, "end") if left else (17, "start")
    return tag(
        "g",
        tag("circle", class_="ring", r=11, cx=x, cy=y),
        tag("circle", words, class_="point chosen", r=6, cx=x, cy=y),
        tag("text", "chosen", x=x, y=y, dx=shift, dy=5, text_anchor=anchor),
    )


def _front(spots: list[Spot]) -> list[Spot]:
    """The spots that no other beats in both bytes and divergence, from the smallest up."""
    best: list[Spot] = []
    for spot in sorted(spots, key=lambda s: (s.x, -s.y)):
        if not best or spot.y > best[-1].y:
            best.append(spot)
    return best


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> Markup:
    ends = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    return tag("line", class_=kind, **{name: f"{at:.2f}%" for name, at in ends.items()})


def _along(value: float, ticks: list[float]) -> float:
    return 100 * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _ticks(values: list[float]) -> list[float]:
    """Three to six round numbers that enclose the values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    step: float = 10.0 ** math.floor(math.log10(span / 2))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _decades(values: list[float]) -> tuple[list[float], list[float]]:
    """Whole powers of ten that enclose the values, and the logarithm of each value.

    A point without any divergence sits on the lowest line.
    """
    positive = [v for v in values if v > 0] or [1.0]
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    ticks = [float(exponent) for exponent in range(low, high + 1)]
    return ticks, [math.log10(v) if v > 0 else float(low) for v in values]
