"""How tensors lie before the coders: as matrices, one row for each output channel."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tersor.codec.coders import Shape

LARGEST_KERNEL = 64
STATES = (4, 8, 16, 32, 64)


def matrix_of(shape: tuple[int, ...], weight: tuple[int, ...], states: int = 1) -> Shape:
    """The matrix that a tensor is coded as.

    shape: of the tensor, part of a form or not
    weight: shape of the weight that it belongs to, its own where it is no part
    states: of the trellis along its rows
    """
    count = math.prod(shape)
    if not count:
        return Shape(0, 0)
    rows = shape[0] if len(shape) > 1 else 1
    kernel = math.prod(weight[2:])
    whole = count == math.prod(weight)
    if whole and rows == 1 and states == 1 and weight:
        # One row of all weights, in their own order: as good as a row for each channel.
        rows = weight[0] if len(weight) > 1 else 1
    columns = count // rows
    if not whole or kernel > LARGEST_KERNEL or columns % kernel:
        kernel = 1
    return Shape(rows, columns, kernel, states)


def pieces(shape: Shape, unit: int | None) -> Iterator[tuple[int, Shape]]:
    """(first element, part) of a matrix cut every `unit` rows, or columns where it has one row."""
    if unit is None:
        yield 0, shape
        return
    along = shape.columns if shape.rows == 1 else shape.rows
    for start in range(0, along, unit):
        size = min(unit, along - start)
        cut = {"columns": size, "kernel": 1} if shape.rows == 1 else {"rows": size}
        yield start * (1 if shape.rows == 1 else shape.columns), shape._replace(**cut)


def as_coded(shape: Shape, *, changed: bool) -> Shape:
    """The matrix of a tensor, or of changes in it: no trellis runs along those."""
    return shape._replace(states=1) if changed else shape
