"""Which table codes which position: classes of rows, channels and places within a kernel.

The expected magnitude of a code is taken to be a product of a factor of its row, of its input
channel and of its place in the kernel. Their logarithms, rounded to half octaves (or octaves) and
added up, number the table. Everything here is the encoder's choice; a decoder only adds classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from tersor.codec.coders import static
from tersor.codec.coders.adaptive import Array, Side
from tersor.codec.coders.neighbours import Shape
from tersor.codec.coders.static import checked

_CLASS = 64
_SAMPLE = 2**17
_IMPOSSIBLE = "holds an impossible class"
# The least x with 2 * log2(x) >= k - 1/2, which is x**4 >= 2**(2k - 1).
_HALF_OCTAVES = np.array(
    [next(x for x in range(int(2 ** ((2 * k - 1) / 4)), 2**33) if x**4 >= 2 ** (2 * k - 1))
     for k in range(1, 64)]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layout:
    """The table at (row, channel, place) is base + the three classes; None for none.

    channel and place are given together.
    """

    shape: Shape
    base: int = 0
    row: Array | None = None
    channel: Array | None = None
    place: Array | None = None

    def rows(self) -> list[Array]:
        """What a stream holds of it."""
        mode = (self.row is not None) + 2 * (self.channel is not None)
        found = [np.array([mode, self.base])]
        if self.row is not None:
            found.append(self.row)
        if self.channel is not None and self.place is not None:
            found.append(self.channel)
            if self.shape.kernel > 1:
                found.append(self.place)
        return found

    @classmethod
    def read(cls, side: Side, shape: Shape) -> Self:
        """The inverse of `rows`."""

        def classes(count: int) -> Array:
            return np.array([checked(c, -_CLASS, _CLASS, _IMPOSSIBLE) for c in side.row(count)])

        header = side.row(2)
        mode = checked(header[0], 0, 3, "holds an unknown mode")
        base = checked(header[1], -_CLASS, _CLASS, _IMPOSSIBLE)
        row = classes(shape.rows) if mode & 1 else None
        channel = classes(shape.columns // shape.kernel) if mode & 2 else None
        place = classes(shape.kernel) if mode & 2 and shape.kernel > 1 else np.zeros(1, np.int64)
        return cls(shape, base, row, channel, place)

    def table(self, tables: int) -> Array:
        """(rows * columns,) uint8."""
        rows, columns = np.zeros((self.shape.rows, 1)), np.zeros(self.shape.columns)
        if self.row is not None:
            rows = self.row[:, None]
        if self.channel is not None and self.place is not None:
            columns = (self.channel[:, None] + self.place).reshape(-1)
        found = (rows + self.base).astype(np.int16) + columns.astype(np.int16)
        return found.clip(0, tables - 1, out=found).astype(np.uint8).reshape(-1)

    def thinned(self, step: int) -> Self:
        """Every `step`-th row of it."""
        row = None if self.row is None else self.row[::step]
        shape = self.shape._replace(rows=-(-self.shape.rows // step))
        return replace(self, shape=shape, row=row)


@dataclass(frozen=True, slots=True)
class Plan:
    """counts: how often each symbol occurs in each table; tables: of each code."""

    layouts: list[Layout]
    counts: static.Counts
    tables: Array


def positions(layouts: Sequence[Layout], tables: int) -> Array:
    """The table of each code of a group."""
    return np.concatenate([np.empty(0, np.uint8), *(layout.table(tables) for layout in layouts)])


def plan(codes: Array, symbols: Array, size: int, shapes: Sequence[Shape]) -> Plan:
    """The cheapest of one table, tables an octave apart, and half an octave apart."""
    single = [Layout(shape) for shape in shapes]
    best = _planned(single, symbols, size, 1)
    if symbols.size < 512:
        return best
    cheapest = _bits(best.counts).sum()
    for coarse in (2, 1):
        found = _cheapest_modes(_layouts(codes, shapes, coarse), symbols, size)
        cost = _bits(found.counts).sum() + sum(map(_side_bits, found.layouts))
        if cost < cheapest:
            best, cheapest = found, cost
    return best


def _planned(layouts: list[Layout], symbols: Array, size: int, tables: int) -> Plan:
    table = positions(layouts, tables)
    flat = np.bincount(_cells(table, symbols, size), minlength=tables * size)
    return Plan(layouts, flat.reshape(tables, size), table)


def _cells(table: Array, symbols: Array, size: int) -> Array:
    found = table.astype(np.intp)
    found *= size
    found += symbols
    return found


def _bits(counts: static.Counts) -> Array:
    """Bits that each table's symbols take, and the table; whole, so that all machines agree."""
    total = counts.sum(1, keepdims=True)
    each = counts * (np.log2(np.maximum(total, 1)) - np.log2(np.maximum(counts, 1)))
    found: Array = np.rint(each.sum(1) + 3 * (counts > 0).sum(1)).astype(np.int64)
    return found


def _side_bits(layout: Layout) -> int:
    """About what the classes take: their entropy, a few bits for each class in use, and a start."""
    found = 8
    for row in layout.rows()[1:]:
        counts = np.bincount(row - row.min())[None]
        found += int(_bits(counts)[0])
    return found


def _layouts(codes: Array, shapes: Sequence[Shape], coarse: int) -> list[Layout]:
    """Classes from mean magnitudes, in steps of `coarse` half octaves, the least table being 0."""
    found, start = [], 0
    for shape in shapes:
        matrix = np.abs(codes[start : start + shape.size].astype(np.int64)).clip(max=2**20)
        start += shape.size
        found.append(_classes(matrix.reshape(shape.rows, shape.columns), shape, coarse))
    used = [layout.base for layout in found if layout.shape.size]
    least = min(used, default=0)
    # Room below for rows and channels that are smaller than their tensor as a whole.
    return [replace(layout, base=min(layout.base - least + 3, 15)) for layout in found]


def _classes(matrix: Array, shape: Shape, coarse: int) -> Layout:
    if not shape.size:
        return Layout(shape)
    base = _half_octaves(matrix.sum(keepdims=True).reshape(-1), shape.size)
    split = matrix.sum(0).reshape(-1, shape.kernel)
    row = _half_octaves(matrix.sum(1), shape.columns) - base
    channel = _half_octaves(split.sum(1), shape.rows * shape.kernel) - base
    place = _half_octaves(split.sum(0), shape.size // shape.kernel) - base
    # Beyond four octaves there is nothing left to tell apart.
    classes = [(part.clip(-8, 8) + coarse // 2) // coarse for part in (row, channel, place)]
    return Layout(shape, int(base[0]) // coarse, *classes)


def _half_octaves(total: Array, count: int) -> Array:
    """Logarithm of the mean, of which 1/16 is the least that counts."""
    mean = np.minimum(total * 16 // count, 2**32).clip(1)
    found: Array = np.searchsorted(_HALF_OCTAVES, mean, side="right")
    return found


def _cheapest_modes(layouts: list[Layout], symbols: Array, size: int) -> Plan:
    """Drops the classes of rows or of channels from each matrix where they do not pay.

    Some of a large matrix's rows speak for all.
    """
    steps, parts, start = [], [], 0
    for layout in layouts:
        rows = symbols[start : start + layout.shape.size].reshape(layout.shape[:2])
        start += layout.shape.size
        steps.append(max(1, min(layout.shape.size // _SAMPLE, layout.shape.rows)))
        parts.append(rows[:: steps[-1]].reshape(-1))
    thin = [layout.thinned(step) for layout, step in zip(layouts, steps, strict=True)]
    counts = _planned(thin, np.concatenate(parts), size, static.MOST_TABLES).counts
    # A table that nothing is in yet would get codes of all sorts.
    counts = np.where(counts.any(1, keepdims=True), counts, counts.sum(0))
    total = counts.sum(1, keepdims=True)
    cost = np.rint(256 * np.log2(total / np.maximum(counts, 0.5))).astype(np.int64)
    chosen = [_cheapest(*given, cost) for given in zip(layouts, steps, parts, strict=True)]
    return _without_empty(_planned(chosen, symbols, size, static.MOST_TABLES))


def _cheapest(layout: Layout, step: int, symbols: Array, cost: Array) -> Layout:
    return min(_modes(layout), key=lambda mode: _price(mode, step, symbols, cost))


def _modes(layout: Layout) -> list[Layout]:
    by_row = replace(layout, channel=None, place=None)
    by_channel = replace(layout, row=None)
    return (
        [replace(by_row, row=None), by_row, by_channel, layout] if layout.shape.size else [layout]
    )


def _price(layout: Layout, step: int, symbols: Array, cost: Array) -> int:
    """symbols: of every `step`-th row"""
    if not layout.shape.size:
        return 0
    table = layout.thinned(step).table(len(cost))
    bits = int(cost.reshape(-1)[_cells(table, symbols, cost.shape[1])].sum()) // 256
    return bits * layout.shape.size // symbols.size + _side_bits(layout)


def _without_empty(used: Plan) -> Plan:
    """Cuts the tables below the first and above the last that is in use."""
    some = np.flatnonzero(used.counts.sum(1))
    first, end = int(some[0]), int(some[-1]) + 1
    layouts = [
        replace(layout, base=layout.base - first) if layout.shape.size else layout
        for layout in used.layouts
    ]
    if end - first == 1:
        layouts = [Layout(layout.shape) for layout in layouts]
    return Plan(layouts, used.counts[first:end], used.tables - np.uint8(first))
