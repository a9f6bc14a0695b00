"""Reads the header of a file that nobody vouches for: each field checked, each size bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tersor.codec.coders import Shape
from tersor.codec.container import Text, canonical
from tersor.codec.errors import Unreadable
from tersor.codec.geometry import pieces
from tersor.codec.header import Chunk, Entry, Formed, Header, Kind, Plain, Run
from tersor.codec.leaves import Leaf, all_leaves, arranged
from tersor.codec.pack import CODERS, INTEGERS, MOST_CODE, word_coders
from tersor.forms import KINDS
from tersor.program.program import DTYPES

DEEPEST = 8
"""Most forms inside one another."""
LONGEST_NAME = 1024
LARGEST_SIZE = 2**40
LARGEST_CHUNK = 2**24
"""Most elements in a chunk: a decoder may take 40 bytes for each while it works."""
SMALLEST_LIMIT = 2**30
"""What any file may unfold to in memory; more only in proportion to its length."""
STORED_RATIO = 64
DENSE_RATIO = 1024

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
    fields = _header_fields(_json(text.header))
    entries = _entries(fields["modules"], fields["tied"])
    constants = tuple(_constant(name, value) for name, value in fields["constants"].items())
    names = [name for entry in entries for name in entry.names]
    expect(len(names) == len(set(names)), "a name of a tensor occurs twice")
    kinds = tuple(_kind(n, row) for n, row in enumerate(fields["kinds"]))
    runs = tuple(_run(n, row) for n, row in enumerate(fields["runs"]))
    leaves = tuple(all_leaves(entries, constants))
    inside = _contents(kinds, runs, leaves)
    chunks = _chunks(runs, [[leaves[i].matrix for i in indices] for indices in inside], text)
    _check_base(fields["base"], runs, text.features)
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
        expect(path == "" or _is_name(path), f"{path!r:.60} is no name of a module")
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
    expect(_is_name(name), f"{name!r:.60} is no name of a tensor")


def _is_name(name: Any) -> bool:
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


def _kind(number: int, row: Any) -> Kind:
    what = f"kind {number}"
    expect(isinstance(row, list) and len(row) in (2, 3), f"{what} is no list of 2 or 3")
    name, run, center = (*row, 0)[:3]
    expect(isinstance(name, str) and name in DTYPES, f"{what} is of the type {name!r:.40}")
    dtype = DTYPES[name]
    if isinstance(run, str):
        fits = len(run) in (0, 2 * dtype.itemsize) and len(row) == 2
        expect(fits and set(run) <= set("0123456789abcdef"), f"{what} has no value")
        expect(dtype is not torch.bool or run in ("", "00", "01"), f"{what} has no value")
        return Kind(dtype, bytes.fromhex(run))
    expect(whole(run), f"{what} lies in no run")
    centered = len(row) == 2 or (type(center) is int and 0 < abs(center) <= MOST_CODE)
    expect(centered, f"{what} has the center {center!r:.40}")
    return Kind(dtype, run, center)


def _run(number: int, row: Any) -> Run:
    what = f"run {number}"
    expect(isinstance(row, list) and len(row) in (2, 3, 4), f"{what} is no list of 2 to 4")
    coder, lengths, unit, changed = (*row, 0, 0)[:4]
    fits = isinstance(lengths, list) and lengths != [] and all(map(whole, lengths))
    expect(isinstance(coder, str), f"{what} is coded by {coder!r:.40}")
    expect(fits, f"{what} has no lengths")
    expect(whole(unit) and bool(unit) == (len(lengths) > 1), f"{what} has chunks of {unit!r:.40}")
    expect(changed in (0, 1) and type(changed) is int, f"{what} has {changed!r:.40} changes")
    usual = [coder, lengths, unit, changed][: 4 if changed else 3 if unit else 2]
    expect(row == usual, f"{what} states what is understood")
    return Run(coder, tuple(lengths), unit or None, bool(changed))


def _contents(
    kinds: Sequence[Kind], runs: Sequence[Run], leaves: Sequence[Leaf]
) -> tuple[tuple[int, ...], ...]:
    """The leaves in each run, in the order in which they are coded."""
    inside: list[list[int]] = [[] for _ in runs]
    used = set()
    for index, leaf in enumerate(leaves):
        expect(leaf.plain.kind < len(kinds), f'"{leaf.name}" is of an unknown kind')
        kind = kinds[leaf.plain.kind]
        used.add(leaf.plain.kind)
        if leaf.zero or leaf.mask:
            wanted = torch.int8 if leaf.zero else torch.uint8
            expect(kind.dtype is wanted, f'"{leaf.name}" is made of {kind.dtype}')
        if isinstance(kind.run, bytes):
            expect(bool(kind.run) or not leaf.plain.count, f'"{leaf.name}" has no value')
            continue
        expect(kind.run < len(runs), f'"{leaf.name}" lies in run {kind.run} of {len(runs)}')
        expect(leaf.matrix.size > 0, f'"{leaf.name}" is empty and lies in a run')
        inside[kind.run].append(index)
    # Else the tables could name chunks that hold anything at all.
    expect(used == set(range(len(kinds))), "a kind belongs to no tensor")
    expect(all(inside), "a run belongs to no tensor")
    for number, run in enumerate(runs):
        _check_run(number, run, [kinds[leaves[i].plain.kind].dtype for i in inside[number]])
    return tuple(tuple(arranged(leaves, indices)) for indices in inside)


def _chunks(runs: Sequence[Run], shapes: Sequence[list[Shape]], text: Text) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    for number, run in enumerate(runs):
        _append(chunks, number, run, shapes[number], text)
    _check_end(chunks, text)
    return tuple(chunks)


def _check_run(number: int, run: Run, dtypes: Sequence[torch.dtype]) -> None:
    what = f"run {number}"
    if run.coder in CODERS:
        expect(all(dtype in INTEGERS for dtype in dtypes), f"{what} holds what are no codes")
        return
    expect(len(set(dtypes)) == 1, f"{what} holds words of several types")
    known = run.coder in word_coders(dtypes[0]) and dtypes[0] is not torch.bool
    expect(known, f"{what} is coded by {run.coder!r:.40}, which does not hold {dtypes[0]}")


def _append(chunks: list[Chunk], number: int, run: Run, shapes: list[Shape], text: Text) -> None:
    """Adds the chunks of a run."""
    what = f"run {number}"
    parts: list[tuple[int, tuple[Shape, ...]]] = [(0, tuple(shapes))]
    if run.unit is not None:
        expect(len(shapes) == 1, f"{what} has several chunks and several tensors")
        along = shapes[0].columns if shapes[0].rows == 1 else shapes[0].rows
        fits = -(-along // run.unit) == len(run.lengths)
        fits = fits and (shapes[0].rows > 1 or shapes[0].states == 1)
        expect(fits, f"{what} has {len(run.lengths)} chunks of {run.unit} of {along} rows")
        parts = [(start, (shape,)) for start, shape in pieces(shapes[0], run.unit)]
    for (start, inside), length in zip(parts, run.lengths, strict=True):
        at = chunks[-1].offset + chunks[-1].length if chunks else 0
        expect(len(chunks) < len(text.digests), "a chunk has no checksum")
        chunk = Chunk(number, start, inside, at, length, text.digests[len(chunks)])
        expect(chunk.count <= LARGEST_CHUNK, f"{what} has {chunk.count} elements in a chunk")
        chunks.append(chunk)


def _check_end(chunks: Sequence[Chunk], text: Text) -> None:
    expect(len(chunks) == len(text.digests), "a checksum belongs to no chunk")
    end = text.chunks_at + (chunks[-1].offset + chunks[-1].length if chunks else 0)
    expect(end == text.file_bytes, f"its chunks end at byte {end} of {text.file_bytes}")


def _check_base(base: str, runs: Sequence[Run], features: int) -> None:
    changed = any(run.changed for run in runs)
    fits = changed == bool(base) == bool(features & 1)
    expect(fits and len(base) in (0, 32), "it does not say what its changes are from")


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


def whole(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0."""
    return type(value) is int and 0 <= value < 2**62


def expect(held: bool, rule: str) -> None:
    """Raises Unreadable with `rule` unless it held."""
    if not held:
        raise Unreadable(rule)
