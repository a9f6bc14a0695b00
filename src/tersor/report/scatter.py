"""The scatter plot of all points tried: bytes across, divergence up, the best trade-offs joined.

Positions are percentages and words are HTML, so that text keeps its size on a phone.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

from tersor.report import axes, figures
from tersor.report.markup import Markup, tag

Data = dict[str, Any]


class Spot(NamedTuple):
    """A point's place in percent from the left and from the top."""

    x: float
    y: float
    point: Data


def _finite(value: Any) -> bool:
    """Not so of a trial whose answers were no numbers: it has no place on the plot."""
    return value is not None and math.isfinite(float(value))


def scatter(points: list[Data]) -> Markup:
    """Bytes across, divergence up (logarithmic); the front of best trade-offs, the chosen point."""
    placed = [p for p in points if _finite(p.get("divergence")) and p.get("bytes")]
    if not placed:
        return Markup("")
    across = axes.ticks([float(p["bytes"]) for p in placed])
    up, heights = axes.decades([float(p["divergence"]) for p in placed])
    spots = [
        Spot(axes.along(p["bytes"], across), 100 - axes.along(height, up), p)
        for p, height in zip(placed, heights, strict=True)
    ]
    front = _front(spots)
    ordered = sorted(spots, key=lambda spot: bool(spot.point.get("chosen")))
    svg = tag(
        "svg",
        [axes.line("grid", 0, 100, 100 - axes.along(d, up), 100 - axes.along(d, up)) for d in up],
        [axes.line("grid", axes.along(t, across), axes.along(t, across), 0, 100) for t in across],
        [axes.line("front", a.x, b.x, a.y, b.y) for a, b in pairwise(front)],
        [_circle(spot, spot in front) for spot in ordered],
        role="img",
        aria_label="Size against divergence of every point tried; the figures follow as a table.",
    )
    rows = [tag("span", f"{10.0**d:g}", style=f"top:{100 - axes.along(d, up):.2f}%") for d in up]
    columns = [
        tag("span", figures.size(t), style=f"left:{axes.along(t, across):.2f}%") for t in across
    ]
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
