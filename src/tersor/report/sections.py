"""The sections of the page, one function each; a section without data is left out."""

import json
import re
from collections.abc import Callable
from typing import Any

from tersor.report import charts, facts, figures
from tersor.report.curves import curves
from tersor.report.markup import Markup, join, table, tag
from tersor.report.scatter import scatter

Data = dict[str, Any]

EXAMPLES = 24
TEXT = 400
LAYERS = 400

_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}\Z")


def sections(report: Data, *, pictures: bool) -> list[Markup]:
    """Everything below the head of the page, in reading order."""
    drawn = [_section(report, *section) for section in _SECTIONS]
    return [
        *drawn,
        _flips(report, pictures),
        _recipe(report),
        _reproduce(report),
        _environment(report),
    ]


def _section(report: Data, heading: str, lead: str, draw: Callable[[Data], object]) -> Markup:
    content = join(draw(report))
    return (
        tag("section", tag("h2", heading), tag("p", lead) if lead else None, content)
        if content
        else content
    )


def _limits(report: Data) -> object:
    rows: list[list[object]] = []
    for limit in facts.limits(report):
        word = {True: "met", False: "not met", None: ""}[limit.met]
        shade = {True: "good", False: "bad", None: None}[limit.met]
        rows.append([tag("code", limit.asked), limit.reached, tag("span", word, class_=shade)])
    return table(["asked", "reached", ""], rows, numeric=set()) if rows else None


def _before_after(report: Data) -> object:
    rows = []
    for fact in facts.facts(report):
        shade = {True: "good", False: "bad", None: None}[fact.good]
        rows.append(
            tag(
                "tr",
                tag("td", fact.label),
                tag("td", fact.before, class_="n", data_label="before"),
                tag("td", fact.after, class_="n", data_label="after"),
                tag("td", fact.note, class_=shade),
            )
        )
    head = tag(
        "tr",
        tag("th", ""),
        tag("th", "before", class_="n"),
        tag("th", "after", class_="n"),
        tag("th", "change"),
    )
    return tag("table", tag("thead", head), tag("tbody", rows), class_="stack") if rows else None


def _layers(report: Data) -> object:
    layers = report.get("layers") or []
    if not layers:
        return None
    rows: list[list[object]] = [
        [
            tag("span", layer["name"], class_="mono"),
            figures.shape(layer.get("shape")),
            layer.get("option") or layer.get("form") or "",
            figures.size(layer["bytes_before"]),
            figures.size(layer.get("bytes_after") or 0),
        ]
        for layer in layers[:LAYERS]
    ]
    full = table(["layer", "shape", "stored as", "before", "after"], rows, numeric={3, 4})
    return [
        charts.layer_bars(layers),
        tag("details", tag("summary", "What each layer was stored as"), full),
    ]


def _sensitivity(report: Data) -> object:
    rows = report.get("sensitivity") or []
    if not rows:
        return None
    chosen = {layer["name"]: str(layer.get("option")) for layer in report.get("layers") or []}
    drawn, left_out = charts.heat(rows, chosen)
    more = f"{left_out} less sensitive layers are in report.json." if left_out else None
    return [drawn, tag("p", more, class_="soft") if more else None]


def _points(report: Data) -> object:
    points = report.get("points") or []
    if not points:
        return None
    names = list(dict.fromkeys(name for point in points for name in point.get("metrics") or {}))
    rows: list[list[object]] = [
        [
            figures.size(point["bytes"]),
            "" if point.get("divergence") is None else figures.digits(point["divergence"]),
            *[_metric(point, name) for name in names],
            f"{'chosen. ' if point.get('chosen') else ''}{point.get('note') or ''}",
        ]
        for point in sorted(points, key=lambda p: p["bytes"])
    ]
    full = table(["bytes", "divergence", *names, "note"], rows, numeric=set(range(2 + len(names))))
    return [scatter(points), tag("details", tag("summary", "All points as a table"), full)]


def _metric(point: Data, name: str) -> str:
    measured = (point.get("metrics") or {}).get(name)
    measured = measured.get("value") if isinstance(measured, dict) else measured
    return "" if measured is None else figures.value(float(measured), "")


def _classes(report: Data) -> object:
    rows = (report.get("comparison") or {}).get("per_class") or []
    most = max((abs(row["delta"]) for row in rows), default=0.0)
    lines: list[list[object]] = [
        [
            str(row["class"]),
            row.get("n", ""),
            figures.value(row["before"], "points"),
            figures.value(row["after"], "points"),
            figures.change(row["delta"], "points", ""),
            tag("td", charts.class_bar(row["delta"], most), class_="aside", style="width:30%"),
        ]
        for row in rows
    ]
    return (
        table(["class", "samples", "before", "after", "change", ""], lines, numeric={1, 2, 3, 4})
        if rows
        else None
    )


def _flips(report: Data, pictures: bool) -> Markup:
    comparison = report.get("comparison") or {}
    flips = comparison.get("flips") or {}
    if not flips:
        return Markup("")
    counts = ", ".join(
        f"{flips[key]} {words}" for key, words in _WAYS.items() if flips.get(key) is not None
    )
    counts = counts or f"{flips.get('total', 0)} decisions changed"
    if comparison.get("mcnemar") is not None:
        counts += f"; McNemar's exact test of the two: p = {comparison['mcnemar']:.2g}"
    examples = (flips.get("examples") or [])[:EXAMPLES]
    words = any("text" in (example.get("input") or {}) for example in examples)
    return tag(
        "section",
        tag("h2", "Decisions that changed"),
        tag("p", counts + ("." if pictures else ". The pictures did not fit into the page.")),
        tag(
            "div",
            [_example(e, pictures) for e in examples],
            class_="flips words" if words else "flips",
        ),
    )


_WAYS = {"broken": "newly wrong", "fixed": "newly right", "other": "wrong in another way"}


def _example(example: Data, pictures: bool) -> Markup:
    shown, source = None, example.get("input") or {}
    if pictures and _PICTURE.match(str(source.get("image"))):
        shown = tag("img", src=source["image"], alt=f"sample {example.get('index')}")
    elif source.get("text") is not None:
        text = str(source["text"])
        shown = tag(
            "blockquote", text[:TEXT] + ("\N{HORIZONTAL ELLIPSIS}" if len(text) > TEXT else "")
        )
    truth = example.get("target")
    right = None if truth is None else "good" if example.get("after") == truth else "bad"
    place = f"sample {example.get('index')}"
    return tag(
        "figure",
        shown,
        tag(
            "figcaption",
            f"{example.get('before')} \N{RIGHTWARDS ARROW} ",
            tag("b", example.get("after"), class_=right),
            tag("br"),
            tag(
                "span",
                place if truth is None else f"truth: {truth} \N{MIDDLE DOT} {place}",
                class_="soft",
            ),
        ),
    )


def _recipe(report: Data) -> Markup:
    steps = [
        tag(
            "li",
            tag("code", step["method"]),
            f" {figures.options(step.get('options') or {})}",
            tag("div", figures.plain(step["outcome"]), class_="soft")
            if step.get("outcome")
            else "",
        )
        for step in report.get("recipe") or []
    ]
    return (
        tag("section", tag("h2", "Recipe"), tag("ol", steps, class_="steps"))
        if steps
        else Markup("")
    )


def _reproduce(report: Data) -> Markup:
    command = report.get("command")
    return tag("section", tag("h2", "Reproduce"), tag("pre", command)) if command else Markup("")


def _environment(report: Data) -> Markup:
    rows = [
        (tag("dt", name), tag("dd", value if isinstance(value, str) else json.dumps(value)))
        for name, value in (report.get("environment") or {}).items()
    ]
    return tag("section", tag("h2", "Environment"), tag("dl", rows)) if rows else Markup("")


_SECTIONS: list[tuple[str, str, Callable[[Data], object]]] = [
    ("Budget", "", _limits),
    (
        "Before and after",
        "Intervals are 95 % bootstrap intervals; a change is paired, sample by sample.",
        _before_after,
    ),
    (
        "Size by layer",
        "Bytes before the file's entropy coding, in the order of the network.",
        _layers,
    ),
    (
        "Sensitivity",
        "How far the outputs move when only this layer is stored this way, logarithmic shades.",
        _sensitivity,
    ),
    (
        "Points tried",
        "Divergence is the sum over the layers; lower and further left is better.",
        _points,
    ),
    (
        "Training",
        "Held-out figures are those that chose which state was kept.",
        lambda report: curves(report.get("training") or []),
    ),
    ("By class", "", _classes),
]
