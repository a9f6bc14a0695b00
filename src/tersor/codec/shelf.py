"""Sorts the tensors of a model into runs of chunks.

Tensors of one value need no chunk. Small matrices of codes share a chunk, so that what the coder
learns from one serves the next; large ones are cut into chunks of whole rows, so that a reader can
decode them side by side, or some rows alone. Vectors of codes, and floats of a type, share a chunk
likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tersor.codec.coders import Shape
from tersor.codec.header import Kind
from tersor.codec.leaves import Leaf, arranged, coded
from tersor.codec.pack import INTEGERS, MOST_CODE, Array, checked_dtype, elements

TOGETHER = 2**20
"""Codes that share one chunk if a model has no more."""
CHUNK = {"fast": 2**18, "small": 2**19, "max": 2**22, "vector": 2**18, "words": 2**19}
"""Elements of a chunk otherwise, about; of matrices by profile, for max learns longest."""


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor to store: what is coded in its place, flat, and what the base has there."""

    leaf: Leaf
    array: Array
    dtype: torch.dtype
    sort: str
    center: int
    base: Array | None = None


class Compared(Protocol):
    """A base: says what to make of a tensor, given the kind it has if it is all one value."""

    def compared(self, item: Item, kind: Kind | None) -> tuple[Item, Kind | None]:
        """The item, with the base's elements where changes from them are smaller, and its kind."""
        ...


@dataclass(slots=True)
class Planned:
    """A run before it is encoded. unit: see `Run`"""

    sort: str
    items: list[Item] = field(default_factory=list)
    unit: int | None = None

    @property
    def size(self) -> int:
        """Elements in it."""
        return sum(item.array.size for item in self.items)

    @property
    def changed(self) -> bool:
        """Whether changes from a base are stored."""
        return self.items[0].base is not None

    def arrange(self) -> None:
        """Puts its tensors in the order in which they are coded."""
        order = arranged([item.leaf for item in self.items], range(len(self.items)))
        self.items = [self.items[i] for i in order]


class Shelf:
    """All tensors of a file, each of a kind, and the runs that hold them."""

    def __init__(
        self,
        leaves: Sequence[Leaf],
        tensors: Sequence[Tensor],
        profile: str = "small",
        base: Compared | None = None,
    ) -> None:
        self._profile = profile
        self.kinds: list[Kind] = []
        self.runs: list[Planned] = []
        self._numbers: dict[Kind, int] = {}
        arrays = [elements(tensor) for tensor in tensors]
        items = [
            _item(leaf, arrays[n], tensors[n], arrays[n + leaf.zero] if leaf.zero else None)
            for n, leaf in enumerate(leaves)
        ]
        found = _constants(items)
        if base is not None:
            for n, item in enumerate(items):
                items[n], found[n] = base.compared(item, found[n])
        together = (
            sum(
                item.array.size
                for item, kind in zip(items, found, strict=True)
                if item.sort == "matrix" and kind is None
            )
            <= TOGETHER
        )
        open_runs: dict[object, int] = {}
        self.kind_of = [
            self._number(
                kind or Kind(item.dtype, self._place(item, open_runs, together), item.center)
            )
            for item, kind in zip(items, found, strict=True)
        ]
        for run in self.runs:
            run.arrange()

    @property
    def changed(self) -> bool:
        """Whether anything is stored as changes from a base."""
        return any(run.changed for run in self.runs) or any(k.run is None for k in self.kinds)

    def _place(self, item: Item, open_runs: dict[object, int], together: bool) -> int:
        """The run that takes `item`."""
        size, matrix = item.array.size, item.leaf.matrix
        chunk = CHUNK[self._profile if item.sort == "matrix" else item.sort]
        if together and item.sort == "matrix":
            chunk = max(chunk, TOGETHER)
        if size > chunk:
            self.runs.append(Planned(item.sort, [item], _unit(matrix, chunk)))
            return len(self.runs) - 1
        key = (item.dtype if item.sort == "words" else item.sort, item.base is None)
        at = open_runs.get(key, -1)
        if at < 0 or self.runs[at].size + size > chunk * 5 // 4:
            at = open_runs[key] = len(self.runs)
            self.runs.append(Planned(item.sort))
        self.runs[at].items.append(item)
        return at

    def _number(self, kind: Kind) -> int:
        if kind not in self._numbers:
            self._numbers[kind] = len(self.kinds)
            self.kinds.append(kind)
        return self._numbers[kind]


def _item(leaf: Leaf, array: Array, tensor: Tensor, zero: Array | None) -> Item:
    dtype = checked_dtype(tensor)
    found = coded(leaf, array, zero)
    sort = "words"
    if dtype in INTEGERS and _narrow(found):
        sort = "vector" if leaf.matrix.rows == 1 and leaf.matrix.states == 1 else "matrix"
    center = 0
    if leaf.index and found.size:
        # Where most indices are: weights near zero are the most frequent.
        center = int(np.bincount(found, minlength=1).cumsum().searchsorted(found.size / 2))
    return Item(leaf, found, dtype, sort, center)


def _narrow(codes: Array) -> bool:
    """Whether the coders take all of them."""
    if codes.itemsize < 4 or not codes.size:
        return True
    return int(codes.min()) >= -MOST_CODE and int(codes.max()) <= MOST_CODE


def _constants(items: Sequence[Item]) -> list[Kind | None]:
    """The kind of each tensor of one value, where storing that alone pays."""
    values = [_only_value(item.array, item.dtype) for item in items]
    seen = Counter((item.dtype, value) for item, value in zip(items, values, strict=True))
    lone = [
        item.array.size == 1 and seen[item.dtype, value] == 1
        for item, value in zip(items, values, strict=True)
    ]
    # Single values that all differ are cheaper side by side in a chunk.
    many = Counter(item.dtype for item, alone in zip(items, lone, strict=True) if alone)
    return [
        None if value is None or (alone and many[item.dtype] > 2) else Kind(item.dtype, value)
        for item, value, alone in zip(items, values, lone, strict=True)
    ]


def _only_value(flat: Array, dtype: torch.dtype) -> bytes | None:
    if not flat.size:
        return b""
    if flat[0] != flat[-1] or not (flat == flat[0]).all():
        return None
    narrow = flat[:1].astype(np.int8) if flat.itemsize > dtype.itemsize else flat[:1]
    return narrow.tobytes() if narrow[0] == flat[0] else None


def _unit(shape: Shape, chunk: int) -> int | None:
    """Rows, or columns of a single row, that make chunks of about equal size; None for one."""
    count = round(shape.size / chunk)
    along = shape.columns if shape.rows == 1 else shape.rows
    if count < 2 or along < 2 or (shape.rows == 1 and shape.states > 1):
        return None
    return -(-along // count)
