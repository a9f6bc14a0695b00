"""Sorts the tensors of a model into runs of chunks, and encodes them.

Tensors of one value need no chunk. Small matrices of codes share a chunk, so that what the coder
learns from one serves the next; large ones are cut into chunks of whole rows, so that a reader can
decode them side by side, or some rows alone. Vectors of codes, and floats of a type, share a chunk
likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tersor.codec.coders import Shape
from tersor.codec.geometry import pieces
from tersor.codec.header import Kind, Run
from tersor.codec.pack import (
    INTEGERS,
    MOST_CODE,
    Array,
    checked_dtype,
    elements,
    encode_codes,
    encode_words,
    smallest,
    word_coders,
)

PROFILES = ("fast", "small", "max")
TOGETHER = 2**20
"""Codes that share one chunk if a model has no more."""
CHUNK = {"fast": 2**20, "small": 2**18, "max": 2**18, "words": 2**19}
"""Elements of a chunk otherwise, about."""
_QUICK = 2**14
"""Codes that any coder decodes in no time, so that the smallest may be chosen."""


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor to store, flat, and the matrix that it is."""

    array: Array
    dtype: torch.dtype
    matrix: Shape


@dataclass(slots=True)
class Planned:
    """A run before it is encoded. codes: whether its elements are codes or words"""

    codes: bool
    items: list[Item] = field(default_factory=list)
    unit: int | None = None

    @property
    def size(self) -> int:
        """Elements in it."""
        return sum(item.array.size for item in self.items)


class Shelf:
    """Takes tensors in the order of the header, and gives each its kind."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.kinds: list[Kind] = []
        self._items: list[Item] = []
        self._runs: list[Planned] = []
        self._numbers: dict[Kind, int] = {}

    def put(self, tensor: Tensor, matrix: Shape) -> None:
        """Adds the next tensor."""
        self._items.append(Item(elements(tensor), checked_dtype(tensor), matrix))

    def __len__(self) -> int:
        return len(self._items)

    def sort(self) -> list[int]:
        """The kind of each tensor put."""
        found: list[Kind | None] = [None] * len(self._items)
        open_runs: dict[object, int] = {}
        constants = _constants(self._items)
        sorts = [_sort_of(item) for item in self._items]
        together = (
            sum(
                item.array.size
                for item, sort, value in zip(self._items, sorts, constants, strict=True)
                if sort == "matrix" and value is None
            )
            <= TOGETHER
        )
        for n, item in enumerate(self._items):
            value = constants[n]
            place = self._place(item, sorts[n], open_runs, together) if value is None else value
            found[n] = Kind(item.dtype, place)
        return [self._number(kind) for kind in found if kind is not None]

    def _place(self, item: Item, sort: str, open_runs: dict[object, int], together: bool) -> int:
        """The run that takes `item`."""
        size = item.array.size
        codes = sort in ("matrix", "vector")
        chunk = CHUNK[self.profile if codes else "words"]
        key = sort if codes else item.dtype
        if sort == "matrix" and together:
            chunk = TOGETHER
        if size > chunk:
            self._runs.append(Planned(codes, [item], _unit(item.matrix, chunk)))
            return len(self._runs) - 1
        at = open_runs.get(key, -1)
        if at < 0 or self._runs[at].size + size > chunk * 5 // 4:
            at = open_runs[key] = len(self._runs)
            self._runs.append(Planned(codes))
        self._runs[at].items.append(item)
        return at

    def _number(self, kind: Kind) -> int:
        if kind not in self._numbers:
            self._numbers[kind] = len(self.kinds)
            self.kinds.append(kind)
        return self._numbers[kind]

    def runs(self) -> Iterator[tuple[Run, list[bytes]]]:
        """Each run and its chunks, encoded when asked for."""
        for run in self._runs:
            yield _codes_run(run, self.profile) if run.codes else _words_run(run)


def _sort_of(item: Item) -> str:
    if item.dtype in INTEGERS and _narrow(item.array):
        return "vector" if item.matrix.rows == 1 and item.matrix.states == 1 else "matrix"
    return "words"


def _narrow(codes: Array) -> bool:
    """Whether the coders take all of them."""
    if codes.itemsize < 4 or not codes.size:
        return True
    return int(codes.min()) >= -MOST_CODE and int(codes.max()) <= MOST_CODE


def _constants(items: Sequence[Item]) -> list[bytes | None]:
    """The bytes of the only value of each tensor, where storing that alone pays."""
    found: list[bytes | None] = []
    for item in items:
        flat = item.array
        same = not flat.size or (flat[0] == flat[-1] and bool((flat == flat[0]).all()))
        found.append(flat[:1].tobytes() if same else None)
    seen = Counter((item.dtype, value) for item, value in zip(items, found, strict=True))
    lone = [
        item.array.size == 1 and seen[item.dtype, value] == 1
        for item, value in zip(items, found, strict=True)
    ]
    # Single values that all differ are cheaper side by side in a chunk.
    many = Counter(item.dtype for item, alone in zip(items, lone, strict=True) if alone)
    return [
        None if alone and many[item.dtype] > 2 else value
        for item, value, alone in zip(items, found, lone, strict=True)
    ]


def _unit(shape: Shape, chunk: int) -> int | None:
    """Rows, or columns of a single row, that make chunks of about equal size; None for one."""
    count = round(shape.size / chunk)
    along = shape.columns if shape.rows == 1 else shape.rows
    if count < 2 or along < 2 or (shape.rows == 1 and shape.states > 1):
        return None
    return -(-along // count)


def joined(arrays: Sequence[Array]) -> Array:
    """One after another."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _codes_run(run: Planned, profile: str) -> tuple[Run, list[bytes]]:
    shapes = as_one_row([item.matrix for item in run.items])
    if run.unit is not None:
        (item,) = run.items
        chunks = [
            encode_codes([part], [shape], profile)
            for part, shape in _cut(item.array, item.matrix, run.unit)
        ]
        return Run(profile, tuple(map(len, chunks)), run.unit), chunks
    arrays = [item.array for item in run.items]
    if len(shapes) < len(arrays):
        arrays = [joined([array.astype(np.int64) for array in arrays])]
    choices = [profile, "small"] if run.size <= _QUICK and profile == "fast" else [profile]
    coder, chunk = smallest(choices, lambda choice: encode_codes(arrays, shapes, choice))
    return Run(coder, (len(chunk),)), [chunk]


def as_one_row(shapes: Sequence[Shape]) -> list[Shape]:
    """Vectors are coded as one long one, so that each starts where the one before has led."""
    if all(shape.rows == 1 and shape.states == 1 for shape in shapes) and len(shapes) > 1:
        return [Shape(1, sum(shape.columns for shape in shapes))]
    return list(shapes)


def _words_run(run: Planned) -> tuple[Run, list[bytes]]:
    dtype = run.items[0].dtype
    if run.unit is None:
        shape = run.items[0].matrix if len(run.items) == 1 else Shape(1, run.size)
        parts = [(joined([item.array for item in run.items]), shape)]
    else:
        parts = list(_cut(run.items[0].array, run.items[0].matrix, run.unit))
    # Of large tensors the first chunk decides.
    first, at = parts[0]
    choices = word_coders(dtype)
    coder, chunk = smallest(choices, lambda choice: encode_words(first, at, choice, dtype))
    chunks = [chunk, *(encode_words(part, shape, coder, dtype) for part, shape in parts[1:])]
    return Run(coder, tuple(map(len, chunks)), run.unit), chunks


def _cut(array: Array, matrix: Shape, unit: int) -> Iterator[tuple[Array, Shape]]:
    each = 1 if matrix.rows == 1 else matrix.columns
    for start, shape in pieces(matrix, unit):
        yield array[start * each : start * each + shape.size], shape
