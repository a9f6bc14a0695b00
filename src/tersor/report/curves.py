"""Learning curves: the loss of each step, and what the judge said by epoch, both logarithmic."""

import itertools
import math
from typing import Any

from tersor.report import axes, figures
from tersor.report.markup import Markup, tag

Data = dict[str, Any]


def curves(trainings: list[Data]) -> list[Markup]:
    """A picture for each training that has two points or more."""
    return [_picture(t) for t in trainings if len(_finite(t.get("losses"))) > 1]


def _picture(training: Data) -> Markup:
    losses, judged = _finite(training["losses"]), _finite(training.get("judged"))
    up, heights = axes.decades([*losses, *judged])
    steps = len(losses) * int(training.get("stride") or 1)
    across = axes.ticks([0.0, float(steps)])
    places = [100 - axes.along(height, up) for height in heights]
    drawn, epochs = places[: len(losses)], places[len(losses) :]
    right = axes.along(steps, across)
    svg = tag(
        "svg",
        [axes.line("grid", 0, 100, 100 - axes.along(d, up), 100 - axes.along(d, up)) for d in up],
        [
            axes.line("front", right * at / len(drawn), right * (at + 1) / len(drawn), a, b)
            for at, (a, b) in enumerate(itertools.pairwise(drawn))
        ],
        [_dot(right * at / max(1, len(epochs) - 1), y) for at, y in enumerate(epochs)],
        role="img",
        aria_label=f"Loss of {training.get('step')} by step, and the judged states by epoch.",
    )
    rows = [tag("span", f"{10.0**d:g}", style=f"top:{100 - axes.along(d, up):.2f}%") for d in up]
    columns = [tag("span", f"{t:g}", style=f"left:{axes.along(t, across):.2f}%") for t in across]
    kept = training.get("kept")
    known = training.get("judged") or []
    best = ""
    if isinstance(kept, int) and 0 <= kept < len(known) and _finite([known[kept]]):
        best = f", {figures.digits(known[kept])} where it was kept"
    words = f"{training.get('step')}: steps; upwards: loss (line), held-out by epoch (dots{best})"
    return tag(
        "div",
        tag("div", rows, class_="y"),
        svg,
        tag("div", columns, class_="x"),
        tag("div", words, class_="axis"),
        class_="plot",
    )


def _dot(x: float, y: float) -> Markup:
    return tag("circle", class_="point best", r=4, cx=f"{x:.2f}%", cy=f"{y:.2f}%")


def _finite(values: Any) -> list[float]:
    return [float(v) for v in values or () if v is not None and math.isfinite(v)]
