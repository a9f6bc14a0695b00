"""HTML and SVG from Python calls. Text is escaped unless made here: nothing slips through."""

from html import escape

_VOID = {"meta", "br", "img", "link"}


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """<name attribute="..">children</name>; plain strings are escaped, None and False left out.

    A trailing underscore is dropped and others become dashes: class_="x" is class="x",
    text_anchor="end" is text-anchor="end".
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: object) -> Markup:
    """The children one after the other, each escaped unless it is Markup."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, list | tuple):
        return Markup("".join(join(child) for child in children))
    return Markup(escape(str(children)))


def table(head: list[object], rows: list[list[object]], *, numeric: set[int]) -> Markup:
    """A table inside a box that scrolls sideways; columns in `numeric` are set flush right."""

    def row(kind: str, cells: list[object]) -> Markup:
        return tag(
            "tr",
            [
                tag(kind, cell, class_="n" if i in numeric else None)
                if not (isinstance(cell, Markup) and cell.startswith("<td"))
                else cell
                for i, cell in enumerate(cells)
            ],
        )

    body = [row("td", cells) for cells in rows]
    return tag(
        "div",
        tag("table", tag("thead", row("th", head)), tag("tbody", body)),
        class_="scroll",
        tabindex="0",
    )
