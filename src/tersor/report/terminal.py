"""The report and the other verbs' answers as tables for a terminal.

Every cell is `Text`, so that nothing in a name or a note is read as rich's markup.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.report import facts, figures

Data = dict[str, Any]

_STYLE = {True: "green", False: "red", None: ""}
LAYERS = 30


def console() -> Console:
    """Standard output, 80 columns and plain where it is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=100, no_color=True, highlight=False)


def terminal(report: Data, *, to: Console | None = None) -> None:
    """Prints a report: the verdict, before and after, layers, notes."""
    (to or console()).print(report_view(report), crop=False)


def report_view(report: Data) -> RenderableType:
    """What `terminal` prints."""
    sentence, met = facts.verdict(report)
    parts: list[RenderableType] = [
        Text.assemble((facts.title(report), "bold"), "  ", (sentence, _STYLE[met])),
        _before_after(facts.facts(report)),
        *_limits(report),
        *_layers(report.get("layers") or []),
        *_flips(report.get("comparison") or {}),
        *notes_view(facts.notes(report)),
    ]
    files = {**(report.get("files") or {}), "again": report.get("command")}
    parts += [
        # Not wrapped, so that a path or a command can be copied whole.
        Text(f"{name}: {value}", no_wrap=True, overflow="ignore")
        for name, value in files.items()
        if value
    ]
    return Group(*parts)


def comparison_view(comparison: Data) -> RenderableType:
    """Two models side by side."""
    return Group(
        _before_after(facts.quality(comparison)),
        *_classes(comparison.get("per_class") or []),
        *_flips(comparison),
        *notes_view([str(note) for note in comparison.get("notes") or ()]),
    )


def grid(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: set[int], title: str = ""
) -> Table:
    """A plain table; columns in `numeric` are set flush right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(head):
        right = index in numeric
        table.add_column(
            Text(name, style="bold"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def _before_after(found: list[facts.Fact]) -> Table:
    rows = [(f.label, f.before, f.after, Text(f.note, style=_STYLE[f.good])) for f in found]
    return grid(["", "before", "after", "change"], rows, numeric={1, 2})


def _limits(report: Data) -> list[RenderableType]:
    rows = [
        (
            limit.asked,
            limit.reached,
            Text({True: "met", False: "not met", None: ""}[limit.met], style=_STYLE[limit.met]),
        )
        for limit in facts.limits(report)
    ]
    return [Text(), grid(["asked", "reached", ""], rows, numeric=set())] if rows else []


def _layers(layers: list[Data]) -> list[RenderableType]:
    if not layers:
        return []
    largest = sorted(layers, key=lambda layer: -layer["bytes_before"])[:LAYERS]
    rows = [
        (
            layer["name"],
            figures.shape(layer.get("shape")),
            layer.get("option") or layer.get("form") or "",
            figures.size(layer["bytes_before"]),
            figures.size(layer.get("bytes_after") or 0),
        )
        for layer in layers
        if layer in largest
    ]
    title = f"the {len(rows)} largest of {len(layers)} layers" if len(layers) > len(rows) else ""
    head = ["layer", "shape", "stored as", "before", "after"]
    return [Text(), grid(head, rows, numeric={3, 4}, title=title)]


def _classes(classes: list[Data]) -> list[RenderableType]:
    rows = [
        (
            row["class"],
            row.get("n", ""),
            figures.value(row["before"], "points"),
            figures.value(row["after"], "points"),
            figures.change(row["delta"], "points", ""),
        )
        for row in classes
    ]
    head = ["class", "samples", "before", "after", "change"]
    return [Text(), grid(head, rows, numeric={1, 2, 3, 4})] if rows else []


def _flips(comparison: Data) -> list[RenderableType]:
    flips = comparison.get("flips") or {}
    if not flips.get("total"):
        return []
    words = {"broken": "newly wrong", "fixed": "newly right", "other": "wrong in another way"}
    counts = [f"{flips[key]} {word}" for key, word in words.items() if flips.get(key) is not None]
    text = f"{flips['total']:,} decisions changed" + (": " + ", ".join(counts) if counts else "")
    return [Text(), Text(text)]


def notes_view(notes: list[str]) -> list[RenderableType]:
    """What must not be overlooked."""
    return [Text(), *(Text(f"note: {note}", style="yellow") for note in notes)] if notes else []
