"""One static HTML file: no network, no script, readable on a phone."""

import os
from pathlib import Path
from typing import Any

from tersor.errors import FileError
from tersor.files import write_text
from tersor.report import facts
from tersor.report.markup import Markup, tag
from tersor.report.sections import sections

Data = dict[str, Any]

LARGEST = 1_000_000


def html(report: Data, path: str | os.PathLike[str]) -> Path:
    """Writes `report` as a page under 1 MB. Raises OutputError, FileError if it is no report."""
    path = Path(path)
    text = render(report)
    if len(text.encode()) > LARGEST:
        # Pictures weigh most; everything else is bounded by the number of rows shown.
        text = render(report, pictures=False)
    return write_text(path, text)


def render(report: Data, *, pictures: bool = True) -> str:
    """The page as text."""
    try:
        body = [_top(report), sections(report, pictures=pictures)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(
            f"this is not a report of tersor: {type(error).__name__} at {error}; "
            "run `tersor compress` again into a new folder"
        ) from error
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        tag("title", f"{facts.title(report)} \N{MIDDLE DOT} tersor"),
        tag("style", Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))),
    )
    footer = tag(
        "footer",
        f"Written by tersor {report.get('tersor', '')}. The same figures are in report.json.",
    )
    return "<!doctype html>\n" + tag(
        "html", head, tag("body", tag("main", body, footer)), lang="en"
    )


def _top(report: Data) -> Markup:
    sentence, met = facts.verdict(report)
    shade = {True: " good", False: " bad", None: ""}[met]
    mark = {True: "\N{CHECK MARK} ", False: "\N{BALLOT X} ", None: ""}[met]
    notes = [tag("li", note) for note in facts.notes(report)]
    return tag(
        "header",
        tag("p", "Compression report"),
        tag("h1", facts.title(report)),
        tag("span", mark + sentence, class_="badge" + shade),
        _tiles(report),
        tag("ul", notes, class_="notes") if notes else None,
    )


def _tiles(report: Data) -> Markup:
    tiles = []
    shrink = facts.shrink(report)
    if shrink:
        before, after, factor = shrink
        tiles.append(
            _tile("Size of the file", f"{before} \N{RIGHTWARDS ARROW} {after}", factor, wide=True)
        )
    for fact in facts.highlights(report.get("comparison") or {}):
        before, after = fact.before.partition(" (")[0], fact.after.partition(" (")[0]
        figure = f"{before} \N{RIGHTWARDS ARROW} {after}" if before else after
        tiles.append(_tile(fact.label, figure, fact.note))
    return tag("div", tiles, class_="tiles")


def _tile(what: str, figure: str, note: str, *, wide: bool = False) -> Markup:
    return tag(
        "div",
        tag("div", what, class_="what"),
        tag("div", figure, class_="figure"),
        tag("div", note, class_="note"),
        class_="tile wide" if wide else "tile",
    )
