"""Reads tensors out of a file: the chunks that hold them, decoded on several threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch

from tersor.codec.container import read_text
from tersor.codec.decoding import Target, Window, decode, target_of
from tersor.codec.errors import Unreadable, about
from tersor.codec.header import Chunk, Header
from tersor.codec.header_reader import parse
from tersor.codec.leaves import Leaf, settled
from tersor.codec.pack import Array
from tersor.codec.source import Data, Place, Source, name_of, opened
from tersor.errors import FileError, OptionError

THREADS = min(4, os.cpu_count() or 1)
_BATCH = 2**23
"""Bytes that are read at once."""
_IN_FLIGHT = 2**24
"""Elements being decoded at a time, all threads together."""
_ALONE = 2**16
"""Elements that are decoded before a thread would have started."""


def read_leaves(
    source: Source,
    header: Header,
    wanted: Mapping[int, Window | None],
    threads: int,
    base: Place | None = None,
) -> dict[int, Array]:
    """Elements of some leaves, flat; only the chunks that hold some of them are read.

    wanted: leaf -> its first element and the one after its last, None for all. The zero points of
        a leaf come with it
    base: the file that changes are counted from
    """
    if type(threads) is not int or threads < 1:
        raise OptionError(f"threads={threads!r:.40}; give a whole number >= 1")
    targets = _coded(source, header, wanted, threads, _bases(header, wanted, threads, base))
    return {
        index: settled(header.leaves[index], target.array, _zero(header, index, targets))
        for index, target in targets.items()
    }


def read_coded(place: Place) -> tuple[Header, list[Array]]:
    """What is coded of each leaf of a file that others count changes from."""
    with about(name_of(place)), opened(place) as source:
        header = parse(read_text(source))
        _check_own(header)
        wanted = dict.fromkeys(range(len(header.leaves)))
        targets = _coded(source, header, wanted, THREADS, {})
    return header, [target.array for target in targets.values()]


def places_of(header: Header) -> dict[tuple[str, str], int]:
    """Where each leaf is, by the name of its entry and its part."""
    return {(leaf.name, leaf.part): index for index, leaf in enumerate(header.leaves)}


def counterpart(
    leaf: Leaf, dtype: torch.dtype, base: Header, places: Mapping[tuple[str, str], int]
) -> int | None:
    """The leaf of a base that changes of `leaf` may be counted from; None where none is alike."""
    found = places.get((leaf.name, leaf.part))
    if found is None:
        return None
    own = base.leaves[found]
    alike = (own.matrix, own.mask, own.zero) == (leaf.matrix, leaf.mask, leaf.zero)
    return found if alike and base.dtype(own.plain) == dtype else None


def _check_own(header: Header) -> None:
    if header.base:
        raise FileError(
            "it is stored as changes from another file itself; give one that holds all its weights"
        )


def _bases(
    header: Header, wanted: Mapping[int, Window | None], threads: int, base: Place | None
) -> dict[int, Array]:
    """What the base has in place of those leaves that are stored as changes."""
    changed = {index: window for index, window in wanted.items() if header.changed(index)}
    if not changed:
        return {}
    if base is None:
        raise FileError(
            f"its weights are stored as changes from the file with the identity {header.base}; "
            "give that with base="
        )
    with about(name_of(base)), opened(base) as source:
        other = parse(read_text(source))
        _check_own(other)
        if other.identity != header.base:
            raise FileError(
                f"it has the identity {other.identity}, and changes are counted from "
                f"{header.base}; give the file that was the base when they were saved"
            )
        places = places_of(other)
        found = {index: _counterpart(header, index, other, places) for index in changed}
        targets = _coded(
            source, other, {found[index]: window for index, window in changed.items()}, threads, {}
        )
    return {index: targets[found[index]].array for index in changed}


def _counterpart(
    header: Header, index: int, other: Header, places: Mapping[tuple[str, str], int]
) -> int:
    leaf = header.leaves[index]
    found = counterpart(leaf, header.dtype(leaf.plain), other, places)
    if found is None:
        raise Unreadable(f'"{leaf.name}" is a change from what its base does not have')
    return found


def _coded(
    source: Source,
    header: Header,
    wanted: Mapping[int, Window | None],
    threads: int,
    bases: Mapping[int, Array],
) -> dict[int, Target]:
    """What is coded of some leaves."""
    targets = {
        index: target_of(header, index, window, bases.get(index))
        for index, window in wanted.items()
    }
    numbers = [n for n, chunk in enumerate(header.chunks) if _holds(header, chunk, targets)]
    total = sum(header.chunks[number].count for number in numbers)
    with _pool(threads, total) as start:
        for number, data in _read(source, header, numbers):
            start(header.chunks[number].count, partial(decode, header, number, data, targets))
    return targets


def _holds(header: Header, chunk: Chunk, targets: Mapping[int, Target]) -> bool:
    """Whether a chunk holds elements that are wanted."""
    inside = [index for index in header.inside[chunk.run] if index in targets]
    if header.runs[chunk.run].unit is None or not inside:
        return bool(inside)
    target = targets[inside[0]]
    return chunk.start < target.end and target.start < chunk.start + chunk.count


def _zero(header: Header, index: int, targets: Mapping[int, Target]) -> Array | None:
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
