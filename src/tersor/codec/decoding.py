"""Decodes one chunk of a file into the room that there is for its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tersor.codec.container import digest_of
from tersor.codec.errors import Unreadable
from tersor.codec.header import Chunk, Header, Kind
from tersor.codec.leaves import target_type
from tersor.codec.pack import CODERS, Array, as_one_row, decode_codes, decode_words, numpy_type
from tersor.codec.source import Data

Window = tuple[int, int]
"""The first element of a leaf, and the one after the last."""


@dataclass(frozen=True, slots=True)
class Target:
    """Room for elements of a leaf from `start` on, and those that its base has there."""

    array: Array
    start: int
    base: Array | None = None

    @property
    def end(self) -> int:
        return self.start + self.array.size


def target_of(header: Header, index: int, window: Window | None, base: Array | None) -> Target:
    """Room, filled where the leaf is all one value, or the base's."""
    leaf = header.leaves[index]
    kind = header.kinds[leaf.plain.kind]
    start, end = window or (0, leaf.matrix.size)
    width = target_type(leaf, numpy_type(kind.dtype))
    if isinstance(kind.run, bytes) and kind.run:
        value = np.frombuffer(kind.run, numpy_type(kind.dtype))
        return Target(np.full(end - start, value, width), start)
    if kind.run is None and base is not None:
        return Target(base, start)
    return Target(np.empty(end - start, width), start, base)


def decode(header: Header, number: int, data: Data, targets: Mapping[int, Target]) -> None:
    """Fills `targets` with the elements of a chunk. Raises Unreadable naming the chunk."""
    chunk = header.chunks[number]
    if len(data) != chunk.length or digest_of(data) != chunk.digest:
        raise Unreadable(f"the checksum of chunk {number} is wrong")
    inside = header.inside[chunk.run]
    kinds = [header.kinds[header.leaves[index].plain.kind] for index in inside]
    room = [targets.get(index) for index in inside]
    try:
        found = _elements(header, chunk, data, kinds, room)
        for target, elements, kind in zip(room, found, kinds, strict=True):
            if target is not None:
                _fill(target, chunk.start, elements, kind)
    except Unreadable as error:
        raise Unreadable(f"chunk {number} {error}") from None


def _elements(
    header: Header,
    chunk: Chunk,
    data: Data,
    kinds: Sequence[Kind],
    room: Sequence[Target | None],
) -> list[Array]:
    """What a chunk holds of each of its leaves."""
    run = header.runs[chunk.run]
    words = run.coder not in CODERS
    shapes = as_one_row(chunk.shapes, words=words)
    bases: list[Array] = []
    if run.changed:
        own = numpy_type(kinds[0].dtype) if words else np.dtype(np.int64)
        bases = [
            _base(target, chunk.start, shape.size, own)
            for target, shape in zip(room, chunk.shapes, strict=True)
        ]
    if words:
        base = np.concatenate(bases) if bases else None
        found = [decode_words(data, shapes[0], run.coder, kinds[0].dtype, base)]
    else:
        found = decode_codes(data, shapes, run.coder, np.int32 if bases else _width(room, kinds))
    if len(shapes) < len(chunk.shapes):
        found = np.split(found[0], np.cumsum([shape.size for shape in chunk.shapes])[:-1])
    if words or not bases:
        return found
    return [base + change for base, change in zip(bases, found, strict=True)]


def _base(target: Target | None, start: int, size: int, width: np.dtype[Any]) -> Array:
    """What the base has from element `start` on; zeros where nobody wants to know."""
    found = np.zeros(size, width)
    if target is not None and target.base is not None:
        first, last = max(start, target.start), min(start + size, target.end)
        found[first - start : last - start] = target.base[
            first - target.start : last - target.start
        ]
    return found


def _width(room: Sequence[Target | None], kinds: Sequence[Kind]) -> type[np.signedinteger[Any]]:
    """The narrowest type that the coders give and all targets can take as it is."""
    if not any(kind.center for kind in kinds):
        for width in (np.int8, np.int16):
            if all(target is not None and target.array.dtype == width for target in room):
                return width
    return np.int32


def _fill(target: Target, start: int, elements: Array, kind: Kind) -> None:
    """Copies those elements, the first of them number `start`, for which there is room."""
    first, last = max(start, target.start), min(start + elements.size, target.end)
    elements = elements[first - start : last - start]
    room = target.array[first - target.start : last - target.start]
    if room.dtype != elements.dtype:
        elements = elements.astype(np.int64) + kind.center if kind.center else elements
        limits = np.iinfo(room.dtype)
        most = 1 if kind.dtype is torch.bool else limits.max
        if elements.size and (elements.min() < limits.min or elements.max() > most):
            raise Unreadable("holds a code too large for its type")
    room[:] = elements
