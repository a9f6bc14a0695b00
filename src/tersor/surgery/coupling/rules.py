"""What rules for operators share.

A rule is given the units, the arguments of an operator with its tensors as labels, its keyword
arguments, and the shape of the result, or a list of shapes; it returns the labels of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tersor.surgery.coupling.labels import Block, Labelled, along
from tersor.surgery.coupling.units import Ids, Units

Rule = Callable[[Units, Sequence[Any], dict[str, Any], Any], Any]


def keep_all(units: Units, values: Any, reason: str) -> None:
    """Nothing that these are labelled with can be cut."""
    if isinstance(values, Labelled):
        for block in values.blocks:
            units.keep(block.ids, reason)
    elif isinstance(values, list | tuple):
        for value in values:
            keep_all(units, value, reason)


def matched(units: Units, first: Ids | None, second: Ids | None, reason: str) -> None:
    """Unites two dimensions that are multiplied with each other, place by place."""
    if first is not None and second is not None:
        units.unite(first, second)
        return
    for ids in (first, second):
        if ids is not None:
            units.keep(ids, reason)


def single(units: Units, tensor: Labelled, dim: int) -> Ids | None:
    """The units along one dimension."""
    return along(units, tensor, dim % len(tensor.shape))[1]


def labelled(tensor: Labelled, shape: Sequence[int], dim: int, ids: Ids | None) -> Labelled:
    """Another shape, and units along one more dimension."""
    blocks = tensor.blocks if ids is None else (*tensor.blocks, Block((dim,), ids))
    return Labelled(tuple(shape), blocks)
