"""Imports point downstairs only, and rooms on one floor do not import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {
    "errors": 0,
    "files": 1,
    "progress": 1,
    "version": 0,
    "task": 1,
    "forms": 1,
    "surgery": 2,
    "program": 3,
    "recipe": 3,
    "codec": 4,
    "measure": 4,
    "train": 4,
    "methods": 5,
    "export": 5,
    "report": 5,
    "plan": 6,
    "checkpoints": 6,
    "federated": 6,
    "sources": 7,
    "serve": 7,
    "corpus": 7,
    "cli": 8,
    "studio": 8,
}
# The package's front door and `python -m tersor` may open every room; no room may open them.
FRONT = {"__init__", "__main__"}
SOURCE = Path(__file__).parents[1] / "src" / "tersor"


def imported(code: str, package: str) -> Iterator[tuple[int, str]]:
    """Yields (line, room) for each import of tersor in `code`; the front door is the room ""."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if top == "tersor":
                yield node.lineno, room if room in FLOORS else ""


def faults(code: str, room: str, package: str) -> list[str]:
    """Names each import in `code`, a file of `room`, that does not point downstairs."""
    found = []
    for line, other in imported(code, package):
        if other == "":
            found.append(f"line {line}: imports the front door; import the room that has the name")
        elif other != room and FLOORS[other] >= FLOORS[room]:
            found.append(
                f"line {line}: {room} (floor {FLOORS[room]}) imports {other} "
                f"(floor {FLOORS[other]}); move what both need downstairs"
            )
    return found


def test_every_import_points_downstairs():
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        inside = path.relative_to(SOURCE)
        room = inside.parts[0].removesuffix(".py")
        if room in FRONT:
            continue
        assert room in FLOORS, f"src/tersor/{inside} has no floor; give it one in FLOORS"
        package = ".".join(["tersor", *inside.parent.parts])
        found += [
            f"src/tersor/{inside} {fault}" for fault in faults(path.read_text(), room, package)
        ]
    assert found == []


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("from tersor.forms.form import Form", 0),
        ("from tersor import errors", 0),
        ("import torch, numpy", 0),
        ("from .hold import hold", 0),
        ("from tersor.surgery.hold import hold", 0),
        ("from ..forms import form", 0),
        ("from tersor.codec import read", 1),
        ("from ..codec import read", 1),
        ("from .. import codec, errors, plan", 2),
        ("def f():\n    import tersor.measure.size", 1),
        ("if TYPE_CHECKING:\n    from tersor.plan import Budget", 1),
        ("import tersor", 1),
        ("from tersor import compress", 1),
    ],
)
def test_the_walk_sees_each_way_to_import(code, count):
    assert len(faults(code, "surgery", "tersor.surgery")) == count
