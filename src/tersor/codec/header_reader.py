"""Reads the header of a file that nobody vouches for: each field checked, each size bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tersor.codec.container import Text, canonical
from tersor.codec.errors import Unreadable, expect, whole
from tersor.codec.header import Entry, Formed, Header, Kind, Plain
from tersor.codec.leaves import Leaf, all_leaves
from tersor.codec.tables import check_base, chunks_of, contents_of, kind_of, run_of
from tersor.forms import KINDS
from tersor.program.program import DTYPES

DEEPEST = 8
"""Most forms inside one another."""
LONGEST_NAME = 1024
LARGEST_SIZE = 2**40
SMALLEST_LIMIT = 2**30
"""What any file may unfold to in memory; more only in proportion to its length."""
STORED_RATIO = 64
DENSE_RATIO = 1024

STRUCTURE = "+structure"
"""Only `load(path, into=...)` needs it, so a reader may pass over it."""

_NEEDED = {"writer": str, "modules": list}
_OPTIONAL = {
    "tied": dict,
    "constants": dict,
    "kinds": list,
    "runs": list,
    "base": str,
    "recipe": list,
    "metrics": dict,
    "provenance": dict,
}


def parse(text: Text) -> Header:
    """Reads and checks the header. Raises Unreadable with the first rule that it breaks."""
    given = _json(text.header)
    fields = _header_fields(given)
    structure = given.get(STRUCTURE, {})
    expect(isinstance(structure, dict), f'"{STRUCTURE}" of the header is no mapping')
    entries = _entries(fields["modules"], fields["tied"])
    constants = tuple(_constant(name, value) for name, value in fields["constants"].items())
    names = [name for entry in entries for name in entry.names]
    expect(len(names) == len(set(names)), "a name of a tensor occurs twice")
    kinds = tuple(kind_of(n, row) for n, row in enumerate(fields["kinds"]))
    runs = tuple(run_of(n, row) for n, row in enumerate(fields["runs"]))
    leaves = tuple(all_leaves(entries, constants))
    inside = contents_of(kinds, runs, leaves)
    chunks = chunks_of(runs, [[leaves[i].matrix for i in indices] for indices in inside], text)
    check_base(fields["base"], kinds, runs, text.features)
    _check_limits(entries, leaves, kinds, text.file_bytes)
    return Header(
        writer=fields["writer"],
        entries=entries,
        constants=constants,
        kinds=kinds,
        runs=runs,
        chunks=chunks,
        leaves=leaves,
        inside=inside,
        base=fields["base"],
        recipe=fields["recipe"],
        structure=structure,
        metrics=fields["metrics"],
        provenance=fields["provenance"],
        identity=text.identity,
        program_bytes=len(text.program),
        chunks_at=text.chunks_at,
        file_bytes=text.file_bytes,
    )


def _json(text: bytes) -> Any:
    try:
        value = json.loads(text)
        same = canonical(value) == text
    except RecursionError:
        raise Unreadable("its header is nested too deeply") from None
    except (ValueError, UnicodeError) as error:
        raise Unreadable(f"its header cannot be read as JSON ({error})") from None
    # One text per value: a repeated key or a space would not survive being written again.
    expect(same, "its header is not written as tersor writes it")
    return value


def _header_fields(value: Any) -> dict[str, Any]:
    """All fields, those that were left out because they are empty too."""
    expect(isinstance(value, dict), "the header is no JSON object")
    # Fields of optional features, which a reader may pass over.
    fields = {name: part for name, part in value.items() if not name.startswith("+")}
    kinds = _NEEDED | _OPTIONAL
    known = _NEEDED.keys() <= fields.keys() <= kinds.keys()
    expect(
        known, f"the fields of the header are not {sorted(_NEEDED)} and some of {sorted(_OPTIONAL)}"
    )
    for name, part in fields.items():
        expect(type(part) is kinds[name], f'"{name}" of the header is no {kinds[name].__name__}')
        expect(name in _NEEDED or bool(part), f'"{name}" of the header is empty')
    return {name: kind() for name, kind in _OPTIONAL.items()} | fields


def _entries(modules: list[Any], tied: dict[str, Any]) -> tuple[Entry, ...]:
    other: dict[str, list[str]] = {}
    for name, first in tied.items():
        check_name(name)
        expect(isinstance(first, str), f'"{name}" is tied to no name')
        other.setdefault(first, []).append(name)
    found = []
    for row in modules:
        path, layer, tensors = _items(row, 3, "a module")
        expect(isinstance(layer, str) and len(layer) <= LONGEST_NAME, "a layer's type is no name")
        expect(isinstance(tensors, dict) and tensors != {}, "a module holds no tensors")
        expect(path == "" or is_name(path), f"{path!r:.60} is no name of a module")
        for leaf, value in tensors.items():
            name = f"{path}.{leaf}" if path else leaf
            expect("." not in leaf, f"{name!r:.60} is no name of a tensor")
            check_name(name)
            names = (name, *other.pop(name, ()))
            found.append(Entry(names, layer, _Where(name).tensor(value, 0)))
    expect(not other, "a tensor is tied to one that is not there")
    return tuple(found)


def _constant(name: str, value: Any) -> tuple[str, Plain]:
    check_name(name)
    plain = _Where(name).tensor(value, 0)
    if not isinstance(plain, Plain):
        raise Unreadable(f'the constant "{name}" is stored as a form')
    return name, plain


def check_name(name: Any) -> None:
    """Raises Unreadable unless a tensor may be called that."""
    expect(is_name(name), f"{name!r:.60} is no name of a tensor")


def is_name(name: Any) -> bool:
    """Whether a tensor may be called that."""
    fits = isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()
    return fits and all(name.split("."))


@dataclass(frozen=True)
class _Where:
    """Reads a tensor's description, naming it in what is raised."""

    name: str

    def tensor(self, value: Any, depth: int) -> Plain | Formed:
        expect(isinstance(value, list) and value != [], f'"{self.name}" is not described')
        if not isinstance(value[0], str):
            expect(whole(value[0]), f'the kind of "{self.name}" is no number')
            return Plain(self.shape(value[1:]), value[0])
        expect(depth < DEEPEST, f'"{self.name}" has more than {DEEPEST} forms inside one another')
        expect(len(value) in (4, 5), f'"{self.name}" is no list of 4 or 5')
        form, shape, config, parts, dtype = (*value, "float32")[:5]
        expect(form in KINDS, f'"{self.name}" is stored as {form!r:.40}, an unknown form')
        known = isinstance(dtype, str) and dtype in DTYPES
        expect(known and value[4:] != ["float32"], f'"{self.name}" is of the type {dtype!r:.40}')
        for part in (config, parts):
            expect(isinstance(part, dict), f'"{self.name}" has {part!r:.40} for options or parts')
        return Formed(
            form=form,
            shape=self.shape(shape),
            dtype=DTYPES[dtype],
            config=config,
            parts=tuple((name, self.tensor(part, depth + 1)) for name, part in parts.items()),
        )

    def shape(self, sizes: Any) -> tuple[int, ...]:
        fits = isinstance(sizes, list) and len(sizes) <= 16 and all(map(whole, sizes))
        expect(fits, f'the shape of "{self.name}" is {sizes!r:.60}')
        total = math.prod(max(1, size) for size in sizes)
        expect(total <= LARGEST_SIZE, f'"{self.name}" has {total} elements, above {LARGEST_SIZE}')
        return tuple(sizes)


def _check_limits(
    entries: Sequence[Entry],
    leaves: Sequence[Leaf],
    kinds: Sequence[Kind],
    file_bytes: int,
) -> None:
    stored = sum(max(f.plain.count * kinds[f.plain.kind].dtype.itemsize, 1) for f in leaves)
    most = max(SMALLEST_LIMIT, STORED_RATIO * file_bytes)
    expect(stored <= most, f"its tensors unfold to {stored} bytes, above the limit of {most}")
    dense = sum(_dense_bytes(entry.tensor) for entry in entries)
    most = max(SMALLEST_LIMIT, DENSE_RATIO * file_bytes)
    expect(dense <= most, f"its weights unfold to {dense} bytes, above the limit of {most}")


def _dense_bytes(tensor: Plain | Formed) -> int:
    """Bytes of the weights that the forms give back, nested ones included."""
    if isinstance(tensor, Plain):
        return 0
    inner = sum(_dense_bytes(part) for _, part in tensor.parts)
    return math.prod(tensor.shape) * tensor.dtype.itemsize + inner


def _items(value: Any, count: int, what: str) -> list[Any]:
    expect(isinstance(value, list) and len(value) == count, f"{what} is no list of {count}")
    return list(value)
