"""Labels: which unit each place of a tensor belongs to, along some of its dimensions.

They follow a network's operators. Where a dimension is split in two, as channels into heads, labels
stay those of both together until something treats the two differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tersor.surgery.coupling.units import Ids, Units


@dataclass(frozen=True)
class Block:
    """Labels along some dimensions. ids: with the sizes of these, in their order"""

    dims: tuple[int, ...]
    ids: Ids


@dataclass(frozen=True)
class Labelled:
    """A tensor's shape, and the labels of some of its dimensions; no dimension has two."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()

    def at(self, dim: int) -> Block | None:
        """The block that a dimension is in."""
        return next((b for b in self.blocks if dim in b.dims), None)

    def without(self, *dims: int) -> Labelled:
        """No labels there."""
        return replace(self, blocks=tuple(b for b in self.blocks if not {*dims} & {*b.dims}))

    def moved(self, shape: Sequence[int], places: dict[int, int]) -> Labelled:
        """Under other numbers of dimensions; a block with one that is gone must be gone before."""
        blocks = tuple(Block(tuple(places[d] for d in b.dims), b.ids) for b in self.blocks)
        return Labelled(tuple(shape), blocks)


def along(units: Units, tensor: Labelled, dim: int) -> tuple[Labelled, Ids | None]:
    """The tensor with labels of single dimensions where `dim` is concerned, and those of `dim`.

    Where places of several dimensions had labels together, the outermost keeps them: a head is kept
    or removed whole.
    """
    block = tensor.at(dim)
    if block is None or len(block.dims) == 1:
        return tensor, None if block is None else block.ids
    order = sorted(range(len(block.dims)), key=lambda axis: block.dims[axis])
    ids = np.transpose(block.ids, order).reshape(block.ids.shape[order[0]], -1)
    units.together(ids, 1)
    single = Block((block.dims[order[0]],), ids[:, 0])
    kept = tuple(single if b is block else b for b in tensor.blocks)
    tensor = replace(tensor, blocks=kept)
    found = tensor.at(dim)
    return tensor, None if found is None else found.ids


def reshaped(units: Units, tensor: Labelled, shape: Sequence[int]) -> Labelled:
    """The labels of a tensor whose elements, in their order, get another shape."""
    blocks: list[Block] = []
    runs = _runs(tensor.shape, shape)
    run_of = {dim: n for n, (inside, _) in enumerate(runs) for dim in inside}
    for block in tensor.blocks:
        if len({run_of[dim] for dim in block.dims}) > 1:
            tensor, _ = along(units, tensor, block.dims[0])
    for inside, outside in runs:
        found = [b for b in tensor.blocks if b.dims[0] in inside]
        if not found:
            continue
        if len(found) > 1:
            for block in found:
                units.keep(block.ids, "a reshape mixes two of its dimensions")
            continue
        if len(found[0].dims) > 1:
            # Code that split it counts on as many in every part: what stands at the same place in
            # all parts goes together.
            units.together(found[0].ids, 0)
        sizes = tuple(shape[d] for d in outside)
        grid = _spread(found[0], inside, tensor.shape).reshape(sizes)
        blocks += _thinned(outside, grid)
    return Labelled(tuple(shape), tuple(blocks))


def _runs(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Dimensions of both shapes that hold the same elements, as few together as can be."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = o = 0
    while i < len(before) or o < len(after):
        inside: list[int] = []
        outside: list[int] = []
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
            inside.append(i - 1)
        if o < len(after):
            right, o = after[o], o + 1
            outside.append(o - 1)
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
                inside.append(i - 1)
            else:
                right, o = right * after[o], o + 1
                outside.append(o - 1)
        found.append((tuple(inside), tuple(outside)))
    return found


def _spread(block: Block, dims: Sequence[int], shape: Sequence[int]) -> Ids:
    """Labels of one block for all places along `dims`."""
    order = sorted(range(len(block.dims)), key=lambda axis: block.dims[axis])
    ids = np.transpose(block.ids, order)
    view = [shape[d] if d in block.dims else 1 for d in dims]
    return np.broadcast_to(ids.reshape(view), [shape[d] for d in dims])


def _thinned(dims: Sequence[int], grid: Ids) -> list[Block]:
    """A block without the dimensions along which nothing changes."""
    kept = list(dims)
    for dim in dims:
        axis = kept.index(dim)
        if (grid == np.take(grid, [0], axis)).all():
            if len(kept) == 1:
                return [Block(tuple(kept), grid)] if grid.size > 1 else []
            grid = np.take(grid, 0, axis)
            kept.remove(dim)
    return [Block(tuple(kept), np.ascontiguousarray(grid))] if math.prod(grid.shape) > 1 else []
