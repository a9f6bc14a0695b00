"""Reads a file one tensor after another, for files whose weights do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tersor.codec.chunks import THREADS, read_leaves
from tersor.codec.container import read_text
from tersor.codec.contents import rebuilt
from tersor.codec.errors import about
from tersor.codec.header import Entry, Header, leaves
from tersor.codec.header_reader import parse
from tersor.codec.pack import Array, as_tensor
from tersor.codec.source import Place, Source, name_of, opened
from tersor.forms import Form

BATCH = 2**22
"""Elements that are decoded at once, about."""


def stream(
    path: Place, *, base: Place | None = None, threads: int = THREADS
) -> Iterator[tuple[Entry, Tensor | Form]]:
    """Yields every entry of a file with its tensor or form, in the order of the header.

    In memory are a few millions of elements, or the largest tensor, and whatever shares a chunk
    with a tensor that was read and is yet to come. Checks what it reads as `load` does.

    path, base, threads: as in `load`
    """
    with about(name_of(path)), opened(path) as source:
        header = parse(read_text(source))
        first = 0
        ahead: dict[int, Array] = {}
        for batch in _batches(header):
            count = sum(len(list(leaves(entry.tensor))) for entry in batch)
            due = range(first, first + count)
            _fill(ahead, due, source, header, threads, base)
            supply = iter([_tensor(header, index, ahead.pop(index)) for index in due])
            for entry in batch:
                yield entry, rebuilt(entry.tensor, entry.names[0], supply)
            first += count


def read_parts(path: Place, part: str) -> dict[str, Tensor]:
    """One part of each form that has it, "step" of each trellis for example, by name."""
    with about(name_of(path)), opened(path) as source:
        header = parse(read_text(source))
        wanted: dict[int, tuple[int, int] | None] = {
            index: None for index, leaf in enumerate(header.leaves) if leaf.part == part
        }
        arrays = read_leaves(source, header, wanted, 1)
    return {
        header.leaves[index].name: _tensor(header, index, array) for index, array in arrays.items()
    }


def _batches(header: Header) -> Iterator[list[Entry]]:
    """Neighbours of about `BATCH` elements together."""
    batch: list[Entry] = []
    size = 0
    for entry in header.entries:
        count = sum(plain.count for plain in leaves(entry.tensor))
        if batch and size + count > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += count
    if batch:
        yield batch


def _fill(
    ahead: dict[int, Array],
    due: range,
    source: Source,
    header: Header,
    threads: int,
    base: Place | None,
) -> None:
    """Reads the leaves that are due into `ahead`, and those that share chunks with them."""
    wanted: dict[int, tuple[int, int] | None] = {}
    for index in due:
        if index not in ahead:
            _want(index, wanted, header)
    ahead.update(read_leaves(source, header, wanted, threads, base))


def _want(index: int, wanted: dict[int, tuple[int, int] | None], header: Header) -> None:
    waiting = [index]
    while waiting:
        index = waiting.pop()
        if index in wanted:
            continue
        wanted[index] = None
        leaf = header.leaves[index]
        run = header.kinds[leaf.plain.kind].run
        waiting += [index + leaf.zero]
        waiting += header.inside[run] if isinstance(run, int) else ()


def _tensor(header: Header, index: int, array: Array) -> Tensor:
    plain = header.leaves[index].plain
    return as_tensor(array, header.dtype(plain), plain.shape)
