"""Reads the header of a file that nobody vouches for: each field checked, each size bounded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tersor.codec.container import Stored, Text, canonical
from tersor.codec.header import Chunk, Entry, Formed, Header, Plain, leaves
from tersor.codec.pack import Coding, Unreadable
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


def parse(text: Text) -> Header:
    """Reads and checks the header. Raises Unreadable with the first rule that it breaks."""
    fields = _fields(
        _json(text.header),
        {"writer": str, "tensors": list, "constants": list, "chunks": list}
        | {"recipe": list, "metrics": dict, "provenance": dict},
        "the header",
    )
    entries = tuple(_entry(value) for value in fields["tensors"])
    constants = tuple(_constant(value) for value in fields["constants"])
    for names in ([n for e in entries for n in e.names], [name for name, _ in constants]):
        _expect(len(names) == len(set(names)), "a name of a tensor occurs twice")
    found = [leaf for e in entries for leaf in leaves(e.tensor)]
    found += [plain for _, plain in constants]
    chunks = _chunks(fields["chunks"], found)
    _check_limits(entries, chunks, text.file_bytes)
    return Header(
        writer=fields["writer"],
        entries=entries,
        constants=constants,
        chunks=chunks,
        recipe=fields["recipe"],
        metrics=fields["metrics"],
        provenance=fields["provenance"],
        program_bytes=len(text.program),
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
    _expect(same, "its header is not written as tersor writes it")
    return value


def _entry(value: Any) -> Entry:
    names, layer, tensor = _items(value, 3, "a tensor")
    _expect(isinstance(names, list) and names != [], "a tensor has no list of names")
    for name in names:
        _check_name(name)
    _expect(isinstance(layer, str) and len(layer) <= LONGEST_NAME, "a layer's type is no name")
    with_name = _Where(names[0])
    return Entry(tuple(names), layer, with_name.tensor(tensor, 0))


def _constant(value: Any) -> tuple[str, Plain]:
    name, tensor = _items(value, 2, "a constant")
    _check_name(name)
    plain = _Where(name).tensor(tensor, 0)
    if not isinstance(plain, Plain):
        raise Unreadable(f'the constant "{name}" is stored as a form')
    return name, plain


def _check_name(name: Any) -> None:
    fits = isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable()
    _expect(fits and all(name.split(".")), f"{name!r:.60} is no name of a tensor")


@dataclass(frozen=True)
class _Where:
    """Reads a tensor's description, naming it in what is raised."""

    name: str

    def tensor(self, value: Any, depth: int) -> Plain | Formed:
        if isinstance(value, list):
            shape, chunk = _items(value, 2, f'"{self.name}"')
            _expect(_whole(chunk), f'the chunk of "{self.name}" is no number')
            return Plain(self.shape(shape), chunk)
        _expect(depth < DEEPEST, f'"{self.name}" has more than {DEEPEST} forms inside one another')
        kinds = {"form": str, "shape": list, "dtype": str, "config": dict, "parts": list}
        fields = _fields(value, kinds, f'"{self.name}"')
        _expect(
            fields["form"] in KINDS,
            f'"{self.name}" is stored as {fields["form"]!r:.40}, an unknown form',
        )
        _expect(
            fields["dtype"] in DTYPES,
            f'"{self.name}" is of the unknown type {fields["dtype"]!r:.40}',
        )
        pairs = [_items(pair, 2, f'a part of "{self.name}"') for pair in fields["parts"]]
        names = [name for name, _ in pairs]
        _expect(all(isinstance(n, str) for n in names), f'a part of "{self.name}" has no name')
        _expect(len(set(names)) == len(names), f'a part of "{self.name}" occurs twice')
        return Formed(
            form=fields["form"],
            shape=self.shape(fields["shape"]),
            dtype=DTYPES[fields["dtype"]],
            config=fields["config"],
            parts=tuple((name, self.tensor(part, depth + 1)) for name, part in pairs),
        )

    def shape(self, sizes: Any) -> tuple[int, ...]:
        fits = isinstance(sizes, list) and len(sizes) <= 16 and all(map(_whole, sizes))
        _expect(fits, f'the shape of "{self.name}" is {sizes!r:.60}')
        total = math.prod(max(1, size) for size in sizes)
        _expect(total <= LARGEST_SIZE, f'"{self.name}" has {total} elements, above {LARGEST_SIZE}')
        return tuple(sizes)


def _chunks(table: list[Any], found: list[Plain]) -> tuple[Chunk, ...]:
    counts = [0] * len(table)
    for leaf in found:
        _expect(leaf.chunk < len(table), f"a tensor lies in chunk {leaf.chunk} of {len(table)}")
        counts[leaf.chunk] += math.prod(leaf.shape)
    # Else the table could name chunks that hold anything at all.
    _expect(
        {leaf.chunk for leaf in found} == set(range(len(table))), "a chunk belongs to no tensor"
    )
    return tuple(
        _chunk(n, row, count) for n, (row, count) in enumerate(zip(table, counts, strict=True))
    )


def _chunk(number: int, row: Any, count: int) -> Chunk:
    what = f"chunk {number}"
    name, bits, offset, streams, digest = _items(row, 5, what)
    _expect(isinstance(name, str) and name in DTYPES, f"{what} is of the unknown type {name!r:.40}")
    dtype = DTYPES[name]
    narrow = dtype in (torch.int8, torch.uint8)
    allowed = range(1, 9) if narrow else (1 if dtype is torch.bool else dtype.itemsize * 8,)
    _expect(_whole(bits) and bits in allowed, f"{what} has {bits!r:.40} bits per {name}")
    fits = isinstance(streams, list) and len(streams) in (1, dtype.itemsize)
    _expect(fits and all(map(_whole, streams)) and _whole(offset), f"{what} has no place")
    coding = Coding(dtype, bits)
    each = coding.packed_bytes(count) // len(streams)
    _expect(all(s <= each for s in streams), f"{what} is longer than its {count} elements need")
    _expect(isinstance(digest, str), f"{what} has no checksum")
    return Chunk(coding, Stored(offset, tuple(streams), digest), count)


def _check_limits(entries: tuple[Entry, ...], chunks: tuple[Chunk, ...], file_bytes: int) -> None:
    stored = sum(max(c.count * c.coding.dtype.itemsize, 1) for c in chunks)
    most = max(SMALLEST_LIMIT, STORED_RATIO * file_bytes)
    _expect(stored <= most, f"its tensors unfold to {stored} bytes, above the limit of {most}")
    dense = sum(_dense_bytes(entry.tensor) for entry in entries)
    most = max(SMALLEST_LIMIT, DENSE_RATIO * file_bytes)
    _expect(dense <= most, f"its weights unfold to {dense} bytes, above the limit of {most}")


def _dense_bytes(tensor: Plain | Formed) -> int:
    """Bytes of the weights that the forms give back, nested ones included."""
    if isinstance(tensor, Plain):
        return 0
    inner = sum(_dense_bytes(part) for _, part in tensor.parts)
    return math.prod(tensor.shape) * tensor.dtype.itemsize + inner


def _fields(value: Any, kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    _expect(isinstance(value, dict), f"{what} is no JSON object")
    _expect(value.keys() == kinds.keys(), f"the fields of {what} are not exactly {sorted(kinds)}")
    for name, kind in kinds.items():
        _expect(type(value[name]) is kind, f'"{name}" of {what} is no {kind.__name__}')
    return dict(value)


def _items(value: Any, count: int, what: str) -> list[Any]:
    _expect(isinstance(value, list) and len(value) == count, f"{what} is no list of {count}")
    return list(value)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _expect(held: bool, rule: str) -> None:
    if not held:
        raise Unreadable(rule)
