"""Reads the tensors of a file: chunk by chunk, on several threads, each chunk checked first."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.codec.container import digest_of
from tersor.codec.errors import Unreadable
from tersor.codec.header import Chunk, Header, Kind
from tersor.codec.leaves import settled, target_type
from tersor.codec.pack import (
    CODERS,
    Array,
    as_one_row,
    as_tensor,
    decode_codes,
    decode_words,
    numpy_type,
)
from tersor.codec.source import Data, Source
from tersor.errors import OptionError

THREADS = min(4, os.cpu_count() or 1)
_BATCH = 2**23
"""Bytes that are read at once."""
_IN_FLIGHT = 2**24
"""Elements being decoded at a time, all threads together."""
_ALONE = 2**16
"""Elements that are decoded before a thread would have started."""

Window = tuple[int, int]


def read_tensors(source: Source, header: Header, threads: int) -> list[Tensor]:
    """Every plain tensor, in the order of the leaves. All bytes of the file have been checked."""
    found = read_leaves(source, header, dict.fromkeys(range(len(header.leaves))), threads)
    return [
        as_tensor(array, header.dtype(leaf.plain), leaf.plain.shape)
        for leaf, array in zip(header.leaves, found.values(), strict=True)
    ]


def read_leaves(
    source: Source, header: Header, wanted: Mapping[int, Window | None], threads: int
) -> dict[int, Array]:
    """Elements of some leaves, flat; only the chunks that hold some of them are read.

    wanted: leaf -> its first element and the one after its last, None for all. The zero points of
        a leaf come with it
    """
    if type(threads) is not int or threads < 1:
        raise OptionError(f"threads={threads!r:.40}; give a whole number >= 1")
    targets = {index: _target(header, index, window) for index, window in wanted.items()}
    numbers = [n for n, chunk in enumerate(header.chunks) if _holds(header, chunk, targets)]
    total = sum(header.chunks[number].count for number in numbers)
    with _pool(threads, total) as start:
        for number, data in _read(source, header, numbers):
            start(header.chunks[number].count, partial(_decode, header, number, data, targets))
    return {
        index: settled(header.leaves[index], target.array, _zero(header, index, targets))
        for index, target in targets.items()
    }


@dataclass(frozen=True, slots=True)
class _Target:
    """Room for what is coded of a leaf, from its element `start` on."""

    array: Array
    start: int

    @property
    def end(self) -> int:
        return self.start + self.array.size


def _target(header: Header, index: int, window: Window | None) -> _Target:
    """Room, filled where the leaf is all one value."""
    leaf = header.leaves[index]
    kind = header.kinds[leaf.plain.kind]
    start, end = window or (0, leaf.matrix.size)
    width = target_type(leaf, numpy_type(kind.dtype))
    if isinstance(kind.run, bytes) and kind.run:
        value = np.frombuffer(kind.run, numpy_type(kind.dtype))
        return _Target(np.full(end - start, value, width), start)
    return _Target(np.empty(end - start, width), start)


def _holds(header: Header, chunk: Chunk, targets: Mapping[int, _Target]) -> bool:
    """Whether a chunk holds elements that are wanted."""
    inside = [index for index in header.inside[chunk.run] if index in targets]
    if header.runs[chunk.run].unit is None or not inside:
        return bool(inside)
    target = targets[inside[0]]
    return chunk.start < target.end and target.start < chunk.start + chunk.count


def _zero(header: Header, index: int, targets: Mapping[int, _Target]) -> Array | None:
    leaf = header.leaves[index]
    return targets[index + leaf.zero].array if leaf.zero else None


@contextmanager
def _pool(threads: int, total: int) -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """A function that runs (elements, work), on several threads where that pays.

    All work is done when the block ends, and what it raised is raised.
    """
    if threads == 1 or total <= _ALONE:
        yield lambda size, work: work()
        return
    waiting: deque[tuple[int, Future[None]]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def start(size: int, work: Callable[[], None]) -> None:
            while waiting and sum(n for n, _ in waiting) + size > _IN_FLIGHT:
                waiting.popleft()[1].result()
            waiting.append((size, pool.submit(work)))

        try:
            yield start
            for _, future in waiting:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(source: Source, header: Header, wanted: Sequence[int]) -> Iterator[tuple[int, Data]]:
    """The bytes of each chunk that is wanted; neighbours are read at once."""
    chunks = header.chunks
    for batch in _batches(chunks, wanted):
        first, last = chunks[batch[0]], chunks[batch[-1]]
        length = last.offset + last.length - first.offset
        view = memoryview(source.read(header.chunks_at + first.offset, length))
        for number in batch:
            chunk = chunks[number]
            start = chunk.offset - first.offset
            yield number, view[start : start + chunk.length]


def _batches(chunks: Sequence[Chunk], wanted: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for number in wanted:
        if batch and (number != batch[-1] + 1 or size + chunks[number].length > _BATCH):
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += chunks[number].length
    if batch:
        yield batch


def _decode(header: Header, number: int, data: Data, targets: Mapping[int, _Target]) -> None:
    """Fills `targets` with the elements of a chunk. Raises Unreadable naming the chunk."""
    chunk = header.chunks[number]
    if len(data) != chunk.length or digest_of(data) != chunk.digest:
        raise Unreadable(f"the checksum of chunk {number} is wrong")
    inside = header.inside[chunk.run]
    kinds = [header.kinds[header.leaves[index].plain.kind] for index in inside]
    room = [targets.get(index) for index in inside]
    try:
        found = _elements(chunk, header.runs[chunk.run].coder, data, kinds, room)
        for target, elements, kind in zip(room, found, kinds, strict=True):
            if target is not None:
                _fill(target, chunk.start, elements, kind)
    except Unreadable as error:
        raise Unreadable(f"chunk {number} {error}") from None


def _elements(
    chunk: Chunk,
    coder: str,
    data: Data,
    kinds: Sequence[Kind],
    room: Sequence[_Target | None],
) -> list[Array]:
    """What a chunk holds of each of its leaves."""
    words = coder not in CODERS
    shapes = as_one_row(chunk.shapes, words=words)
    if words:
        found = [decode_words(data, shapes[0], coder, kinds[0].dtype)]
    else:
        found = decode_codes(data, shapes, coder, _width(room, kinds))
    if len(shapes) == len(chunk.shapes):
        return found
    return np.split(found[0], np.cumsum([shape.size for shape in chunk.shapes])[:-1])


def _width(room: Sequence[_Target | None], kinds: Sequence[Kind]) -> type[np.signedinteger[Any]]:
    """The narrowest type that the coders give and all targets can take as it is."""
    if not any(kind.center for kind in kinds):
        for width in (np.int8, np.int16):
            if all(target is not None and target.array.dtype == width for target in room):
                return width
    return np.int32


def _fill(target: _Target, start: int, elements: Array, kind: Kind) -> None:
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
