"""Made-up inputs for a stored program: right in types and sizes, meaningless in values.

Enough to trace, export, count and time a network. What it answers to them says nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tersor.program.program import Fixed, Model, Named, Program, Size, Slot, slots

LARGEST = 2**28
"""Most elements of made-up inputs together: a file from a stranger may ask for anything."""


def example_of(program: Program, generator: torch.Generator) -> dict[str, Any] | None:
    """Inputs by name that `program` accepts, in the sizes it was traced with.

    Floats are drawn from N(0, 1). Integers are 1, which is an index of most tables and lets a mask
    see everything, and booleans are true. A free first dimension is at least 2, for exporters take
    a single row as fixed. None where a dimension follows from others in a way that the program
    does not say, or where the inputs would have more than 2**28 elements.
    """
    wanted = [slot for tree in program.inputs.values() for slot in slots(tree)]
    numbers = _numbers(program, wanted)
    shapes = [_shape(slot, numbers) for slot in wanted]
    if any(shape is None for shape in shapes):
        return None
    found = [shape for shape in shapes if shape is not None]
    if sum(math.prod(max(1, size) for size in shape) for shape in found) > LARGEST:
        return None
    dtypes = [program.dtype if isinstance(s.dtype, Model) else s.dtype for s in wanted]
    pairs = zip(found, dtypes, strict=True)
    tensors = iter([_tensor(shape, dtype, generator) for shape, dtype in pairs])
    return {name: _filled(tree, tensors) for name, tree in program.inputs.items()}


def _numbers(program: Program, wanted: list[Slot]) -> list[int]:
    """The value of each free size."""
    numbers = [span.traced for span in program.sizes]
    for slot in wanted:
        rows = slot.shape[0] if slot.shape else None
        if isinstance(rows, Size):
            high = program.sizes[rows.symbol].high
            several = 2 if high is None else min(2, high)
            numbers[rows.symbol] = max(numbers[rows.symbol], several)
    return numbers


def _shape(slot: Slot, numbers: list[int]) -> tuple[int, ...] | None:
    sizes = [
        size.factor * numbers[size.symbol] + size.offset if isinstance(size, Size) else size
        for size in slot.shape
    ]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.ones(shape, dtype=dtype)
    # Not all types can be drawn themselves.
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, dtype=wide, generator=generator).to(dtype)


def _filled(tree: Any, tensors: Iterator[Tensor]) -> Any:
    match tree:
        case Slot():
            return next(tensors)
        case Fixed():
            return tree.value
        case Named():
            return {name: _filled(part, tensors) for name, part in tree.fields.items()}
    return type(tree)([_filled(part, tensors) for part in tree])
