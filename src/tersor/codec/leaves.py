"""The plain tensors of a file: how each lies before the coders, and what is coded in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tersor.codec.coders import Shape
from tersor.codec.errors import Unreadable
from tersor.codec.geometry import STATES, matrix_of
from tersor.codec.header import Entry, Formed, Plain
from tersor.codec.pack import Array


@dataclass(frozen=True, slots=True)
class Leaf:
    """A plain tensor of an entry.

    name: of the entry; part: of its form, "values/codes" where forms hold each other
    matrix: what its elements, or the bits of a mask, are coded as
    mask: whether it is a bitmask's, of which each bit is coded
    index: whether it holds indices into a codebook, which lie around their median
    zero: how many leaves on its zero points are, from which its codes are counted; 0 for none
    group: columns that share a zero point
    """

    name: str
    plain: Plain
    matrix: Shape
    part: str = ""
    mask: bool = False
    index: bool = False
    zero: int = 0
    group: int = 1


def all_leaves(entries: Sequence[Entry], constants: Sequence[tuple[str, Plain]]) -> Iterator[Leaf]:
    """Every plain tensor of a file: those of the entries, then the constants."""
    for entry in entries:
        yield from leaves_of(entry.tensor, entry.names[0])
    for name, plain in constants:
        yield from leaves_of(plain, name)


def leaves_of(
    tensor: Plain | Formed, name: str, weight: tuple[int, ...] | None = None, above: str = ""
) -> Iterator[Leaf]:
    """The plain tensors of an entry. weight: shape of the outermost form; above: its part"""
    if isinstance(tensor, Plain):
        yield Leaf(name, tensor, matrix_of(tensor.shape, tensor.shape))
        return
    weight = weight or tensor.shape
    for part, inner in tensor.parts:
        if isinstance(inner, Formed):
            yield from leaves_of(inner, name, weight, f"{above}{part}/")
        else:
            leaf = Leaf(name, inner, matrix_of(inner.shape, weight), above + part)
            yield _special(leaf, tensor, part, weight)


def _special(leaf: Leaf, form: Formed, part: str, weight: tuple[int, ...]) -> Leaf:
    """The leaf with what is peculiar to it as a part of `form`."""
    shape = leaf.plain.shape
    match form.form, part:
        case "trellis", "codes" if form.config.get("states") in STATES:
            return replace(leaf, matrix=matrix_of(shape, weight, form.config["states"]))
        case "bitmask", "mask" if shape == (-(-math.prod(form.shape) // 8),):
            return replace(leaf, matrix=matrix_of(form.shape, weight), mask=True)
        case "codebook", "codes":
            return replace(leaf, index=True)
        case "affine", "codes" if group := _zero_group(form):
            return replace(leaf, zero=2, group=group)
    return leaf


def _zero_group(form: Formed) -> int:
    """Columns that share one of the zero points of an affine form; 0 where it has none."""
    parts = dict(form.parts)
    codes, zero, size = parts.get("codes"), parts.get("zero"), form.config.get("group_size")
    # Only whole numbers are taken off.
    if "zero_bits" in form.config or list(parts) != ["codes", "scale", "zero"]:
        return 0
    if not isinstance(parts["scale"], Plain):
        return 0
    if not isinstance(codes, Plain) or not isinstance(zero, Plain) or len(codes.shape) != 2:
        return 0
    rows, columns = codes.shape
    size = max(1, columns) if size is None else size
    fits = type(size) is int and size > 0 and zero.shape == (rows, -(-columns // size))
    return size if fits and rows * columns else 0


def arranged(found: Sequence[Leaf], indices: Sequence[int]) -> list[int]:
    """The tensors of a run in the order in which they are coded.

    Single rows lie in the order of the last parts of their names, for all biases are alike.
    """
    if any(found[i].matrix.rows > 1 or found[i].matrix.states > 1 for i in indices):
        return list(indices)
    return sorted(indices, key=lambda i: found[i].name.rpartition(".")[2])


def coded(leaf: Leaf, array: Array, zero: Array | None) -> Array:
    """What is coded in place of the elements of a tensor, flat. zero: those of its zero points"""
    if leaf.mask:
        return np.unpackbits(array, count=leaf.matrix.size, bitorder="little")
    if zero is not None:
        return (_matrix(leaf, array) - _spread(leaf, zero)).reshape(-1)
    return array


def settled(leaf: Leaf, array: Array, zero: Array | None) -> Array:
    """The inverse, also of some rows. Raises Unreadable for codes that do not fit their type."""
    if leaf.mask:
        if array.size and array.max() > 1:
            raise Unreadable(f'"{leaf.name}" holds bits that are neither 0 nor 1')
        return np.packbits(array, bitorder="little")
    if zero is not None and array.size:
        wide = _matrix(leaf, array) + _spread(leaf, zero)
        limits = np.iinfo(zero.dtype)
        if wide.min() < limits.min or wide.max() > limits.max:
            raise Unreadable(f'"{leaf.name}" holds codes too far from their zero points')
        return wide.astype(zero.dtype).reshape(-1)
    return array


def target_type(leaf: Leaf, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What `coded` gives for elements of this type."""
    return np.dtype(np.int16) if leaf.zero else dtype


def _matrix(leaf: Leaf, array: Array) -> Array:
    rows, columns = leaf.plain.shape
    return array.reshape((1, -1) if rows == 1 else (-1, columns)).astype(np.int16, copy=False)


def _spread(leaf: Leaf, zero: Array) -> Array:
    """A zero point for each code, or one for each row."""
    columns = leaf.plain.shape[1]
    wide = zero.reshape(-1, -(-columns // leaf.group)).astype(np.int16)
    return wide if wide.shape[1] == 1 else wide.repeat(leaf.group, axis=1)[:, :columns]
