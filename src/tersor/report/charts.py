"""The page's pictures: bars and a heat map; the scatter plot has a file of its own.

Positions are percentages and words are HTML, so that text keeps its size on a phone.
"""

import math
from typing import Any

from tersor.report import figures
from tersor.report.markup import Markup, tag

Data = dict[str, Any]

BARS = 40
ROWS = 60


def layer_bars(layers: list[Data]) -> Markup:
    """One row per layer: its bytes before, and over them its bytes after."""
    shown, rest = _largest(layers, "bytes_before", BARS)
    rows = [(layer["name"], figures.shape(layer.get("shape")), *_sum([layer])) for layer in shown]
    if rest:
        rows.append((f"{len(rest)} smaller layers", "", *_sum(rest)))
    most = max((max(before, after) for _, _, before, after in rows), default=0) or 1
    legend = tag(
        "p",
        tag("span", tag("i", style="background:var(--before)"), "before"),
        tag("span", tag("i", style="background:var(--accent)"), "after"),
        class_="legend",
    )
    return tag("div", legend, [_layer_bar(*row, most) for row in rows])


def _sum(layers: list[Data]) -> tuple[float, float]:
    """Bytes before and after of some layers together."""
    before, after = ("bytes_before", "bytes_after")
    return sum(layer.get(before) or 0 for layer in layers), sum(
        layer.get(after) or 0 for layer in layers
    )


def _layer_bar(name: str, shape: str, before: float, after: float, most: float) -> Markup:
    picture = tag(
        "svg",
        tag("rect", class_="old", width=_share(before, most), height="100%", rx=2),
        tag("rect", class_="new", y="25%", width=_share(after, most), height="50%", rx=2),
        role="img",
        aria_label=f"{figures.size(before)} before, {figures.size(after)} after",
    )
    text = f"{figures.size(before)} \N{RIGHTWARDS ARROW} {figures.size(after)}"
    return tag(
        "div",
        # A name that is too long loses its beginning, which it shares with its neighbours.
        tag("span", tag("bdi", name), class_="name mono", title=f"{name} {shape}".strip()),
        picture,
        tag("span", text, class_="n"),
        class_="bar",
    )


def class_bar(delta: float, most: float) -> Markup:
    """A bar to the right of the middle for a gain, to the left for a loss."""
    width = 50 * abs(delta) / (most or 1)
    return tag(
        "svg",
        tag(
            "rect",
            class_="up" if delta > 0 else "down",
            x=f"{50 if delta > 0 else 50 - width:.2f}%",
            y="15%",
            width=f"{width:.2f}%",
            height="70%",
            rx=2,
        ),
        tag("line", class_="zero", x1="50%", x2="50%", y1="0", y2="100%"),
        width="100%",
        height="14",
        aria_hidden="true",
    )


def heat(sensitivity: list[Data], chosen: dict[str, str]) -> tuple[Markup, int]:
    """Layers down, options across; the darker, the more the outputs move. And the layers left out.

    chosen: layer -> the option it got, which is outlined
    """
    # JSON has no infinity: what is null there broke the outputs altogether.
    cells = {
        (row["layer"], row["option"]): math.inf if (d := row["divergence"]) is None else float(d)
        for row in sensitivity
    }
    options = _by_harm(cells)
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    worst = {layer: max(v for (name, _), v in cells.items() if name == layer) for layer in layers}
    kept = set(sorted(layers, key=lambda layer: -worst[layer])[:ROWS])
    positive = [v for v in cells.values() if 0 < v < math.inf]
    low, high = _logs(positive)
    shared = _shared_prefix(options)
    head = tag("tr", tag("th", "layer"), [tag("th", option[len(shared) :]) for option in options])
    rows = []
    for layer in (name for name in layers if name in kept):
        row = [tag("td", layer, class_="mono", title=layer)]
        row += [
            _cell(cells.get((layer, option)), low, high, chosen.get(layer) == option)
            for option in options
        ]
        rows.append(tag("tr", row))
    body = tag("table", tag("thead", head), tag("tbody", rows), class_="heat")
    return tag("div", body, class_="scroll", tabindex="0"), len(layers) - len(kept)


def _cell(divergence: float | None, low: float, high: float, chosen: bool) -> Markup:
    if divergence is None:
        return tag("td", "")
    depth = 1.0 if divergence == math.inf else 0.0
    if 0 < divergence < math.inf and high > low:
        depth = (math.log10(divergence) - low) / (high - low)
    return tag(
        "td",
        figures.power(divergence),
        class_="chosen" if chosen else None,
        style=f"background:rgba(var(--heat),{0.5 * depth:.2f})",
    )


def _largest(rows: list[Data], key: str, limit: int) -> tuple[list[Data], list[Data]]:
    """The `limit` largest rows in their own order, and the others."""
    order = sorted(range(len(rows)), key=lambda i: -rows[i][key])
    kept = set(order[:limit])
    return [r for i, r in enumerate(rows) if i in kept], [
        r for i, r in enumerate(rows) if i not in kept
    ]


def _by_harm(cells: dict[tuple[str, str], float]) -> list[str]:
    sums: dict[str, list[float]] = {}
    for (_, option), divergence in cells.items():
        sums.setdefault(option, []).append(divergence)
    return sorted(sums, key=lambda option: sum(sums[option]) / len(sums[option]))


def _logs(values: list[float]) -> tuple[float, float]:
    return (math.log10(min(values)), math.log10(max(values))) if values else (0.0, 0.0)


def _shared_prefix(options: list[str]) -> str:
    """The words that all options begin with, which the column heads can do without."""
    words = [option.split(" ") for option in options]
    common = 0
    while len(options) > 1 and all(
        len(w) > common + 1 and w[common] == words[0][common] for w in words
    ):
        common += 1
    return "".join(word + " " for word in words[0][:common]) if words else ""


def _share(part: float, whole: float) -> str:
    return f"{max(0.0, 100 * part / whole):.2f}%"
