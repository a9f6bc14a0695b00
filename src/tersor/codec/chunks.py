"""Reads the tensors of a file: chunk by chunk, on several threads, each chunk checked first."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from tersor.codec.coders import Shape
from tersor.codec.container import digest_of
from tersor.codec.errors import Unreadable
from tersor.codec.header import Chunk, Header, Kind, Leaf, all_leaves
from tersor.codec.pack import (
    CODERS,
    Array,
    as_tensor,
    decode_codes,
    decode_words,
    numpy_type,
)
from tersor.codec.shelf import as_one_row
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
    found = list(all_leaves(header.entries, header.constants))
    targets = [_target(leaf, header.kinds[leaf.plain.kind]) for leaf in found]
    inside: list[list[int]] = [[] for _ in header.runs]
    for index, leaf in enumerate(found):
        run = header.kinds[leaf.plain.kind].run
        if isinstance(run, int):
            inside[run].append(index)

    def decode(number: int, data: Data) -> None:
        chunk = header.chunks[number]
        indices = inside[chunk.run]
        kinds = [header.kinds[found[index].plain.kind] for index in indices]
        arrays = [targets[index] for index in indices]
        if header.runs[chunk.run].unit is not None:
            each = 1 if found[indices[0]].matrix.rows == 1 else found[indices[0]].matrix.columns
            start = chunk.start * each
            arrays = [arrays[0][start : start + chunk.count]]
        decode_chunk(number, chunk, header.runs[chunk.run].coder, data, kinds, arrays)

    total = sum(chunk.count for chunk in header.chunks)
    pool = None if threads == 1 or total <= _ALONE else ThreadPoolExecutor(threads)
    waiting: deque[tuple[int, Future[None]]] = deque()
    try:
        for number, data in _read(source, header):
            if pool is None:
                decode(number, data)
                continue
            size = header.chunks[number].count
            while waiting and sum(n for n, _ in waiting) + size > _IN_FLIGHT:
                waiting.popleft()[1].result()
            waiting.append((size, pool.submit(decode, number, data)))
        for _, future in waiting:
            future.result()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return [
        as_tensor(array, header.kinds[leaf.plain.kind].dtype, leaf.plain.shape)
        for leaf, array in zip(found, targets, strict=True)
    ]


def _target(leaf: Leaf, kind: Kind) -> Array:
    """An array for the elements of a tensor, filled where they are all one value."""
    width = numpy_type(kind.dtype)
    if isinstance(kind.run, bytes) and kind.run:
        return np.full(leaf.plain.count, np.frombuffer(kind.run, width))
    return np.empty(leaf.plain.count, width)


def _read(source: Source, header: Header) -> Iterator[tuple[int, Data]]:
    """Each chunk's bytes, checked; several are read at once."""
    chunks = header.chunks
    for batch in _batches(chunks):
        first, last = chunks[batch[0]], chunks[batch[-1]]
        length = last.offset + last.length - first.offset
        view = memoryview(source.read(header.chunks_at + first.offset, length))
        for number in batch:
            chunk = chunks[number]
            start = chunk.offset - first.offset
            yield number, view[start : start + chunk.length]


def _batches(chunks: Sequence[Chunk]) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for number, chunk in enumerate(chunks):
        if batch and size + chunk.length > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += chunk.length
    if batch:
        yield batch


def decode_chunk(
    number: int, chunk: Chunk, coder: str, data: Data, kinds: Sequence[Kind], targets: list[Array]
) -> None:
    """Fills `targets` with the elements of a chunk. Raises Unreadable naming the chunk."""
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
    narrow = all(target.dtype == np.int8 for target in targets) and not any(k.center for k in kinds)
    found = decode_codes(data, shapes, coder, np.int8 if narrow else np.int32)
    if len(shapes) < len(targets):
        found = np.split(found[0], np.cumsum([target.size for target in targets])[:-1])
    for target, codes, kind in zip(targets, found, kinds, strict=True):
        _fill(target, codes, kind)


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
    shape = chunk.shapes[0] if len(chunk.shapes) == 1 else Shape(1, chunk.count)
    found = decode_words(data, shape, coder, kinds[0].dtype)
    start = 0
    for target in targets:
        target[:] = found[start : start + target.size]
        start += target.size
