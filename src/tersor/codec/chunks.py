"""Reads the tensors of a file: chunk by chunk, on several threads, each chunk checked first."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.codec.container import digest_of
from tersor.codec.errors import Unreadable
from tersor.codec.header import Chunk, Header, Kind
from tersor.codec.leaves import Leaf, settled, target_type
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

THREADS = min(4, os.cpu_count() or 1)
_BATCH = 2**23
"""Bytes that are read at once."""
_IN_FLIGHT = 2**24
"""Elements being decoded at a time, all threads together."""
_ALONE = 2**16
"""Elements that are decoded before a thread would have started."""


def read_tensors(source: Source, header: Header, threads: int) -> list[Tensor]:
    """Every plain tensor, in the order of `all_leaves`. All bytes of the file have been checked."""
    targets = [_target(leaf, header.kinds[leaf.plain.kind]) for leaf in header.leaves]
    wanted = list(range(len(header.chunks)))
    with _pool(threads, sum(chunk.count for chunk in header.chunks)) as start:
        for number, data in _read(source, header, wanted):
            chunk = header.chunks[number]
            arrays = [targets[index] for index in header.inside[chunk.run]]
            if header.runs[chunk.run].unit is not None:
                arrays = [arrays[0][chunk.start : chunk.start + chunk.count]]
            start(chunk.count, partial(_decode, header, number, data, arrays))
    return [_tensor(header, targets, index) for index in range(len(targets))]


def _tensor(header: Header, targets: Sequence[Array], index: int) -> Tensor:
    leaf = header.leaves[index]
    zero = targets[index + leaf.zero] if leaf.zero else None
    dtype = header.kinds[leaf.plain.kind].dtype
    return as_tensor(settled(leaf, targets[index], zero), dtype, leaf.plain.shape)


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


def _target(leaf: Leaf, kind: Kind) -> Array:
    """An array for what is coded of a tensor, filled where it is all one value."""
    own = numpy_type(kind.dtype)
    count = leaf.matrix.size if leaf.mask else leaf.plain.count
    if isinstance(kind.run, bytes) and kind.run:
        return np.full(count, np.frombuffer(kind.run, own), target_type(leaf, own))
    return np.empty(count, target_type(leaf, own))


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


def _decode(header: Header, number: int, data: Data, targets: list[Array]) -> None:
    """Fills `targets` with the elements of a chunk. Raises Unreadable naming the chunk."""
    chunk = header.chunks[number]
    coder = header.runs[chunk.run].coder
    kinds = [header.kinds[header.leaves[i].plain.kind] for i in header.inside[chunk.run]]
    if len(data) != chunk.length or digest_of(data) != chunk.digest:
        raise Unreadable(f"the checksum of chunk {number} is wrong")
    try:
        if coder in CODERS:
            _fill_codes(chunk, coder, data, kinds, targets)
        else:
            _fill_words(chunk, coder, data, kinds, targets)
    except Unreadable as error:
        raise Unreadable(f"chunk {number} {error}") from None


def _fill_codes(
    chunk: Chunk, coder: str, data: Data, kinds: Sequence[Kind], targets: list[Array]
) -> None:
    shapes = as_one_row(chunk.shapes)
    found = decode_codes(data, shapes, coder, _width(targets, kinds))
    if len(shapes) < len(targets):
        found = np.split(found[0], np.cumsum([target.size for target in targets])[:-1])
    for target, codes, kind in zip(targets, found, kinds, strict=True):
        _fill(target, codes, kind)


def _width(targets: Sequence[Array], kinds: Sequence[Kind]) -> type[np.signedinteger[Any]]:
    """The narrowest type that the coders give and all targets can take as it is."""
    if not any(kind.center for kind in kinds):
        for width in (np.int8, np.int16):
            if all(target.dtype == width for target in targets):
                return width
    return np.int32


def _fill(target: Array, codes: Array, kind: Kind) -> None:
    if target.dtype == codes.dtype:
        target[:] = codes
        return
    wide = codes.astype(np.int64) + kind.center if kind.center else codes
    limits = np.iinfo(target.dtype)
    most = 1 if kind.dtype is torch.bool else limits.max
    if wide.min() < limits.min or wide.max() > most:
        raise Unreadable("holds a code too large for its type")
    target[:] = wide


def _fill_words(
    chunk: Chunk, coder: str, data: Data, kinds: Sequence[Kind], targets: list[Array]
) -> None:
    (shape,) = as_one_row(chunk.shapes, words=True)
    found = decode_words(data, shape, coder, kinds[0].dtype)
    start = 0
    for target in targets:
        target[:] = found[start : start + target.size]
        start += target.size
