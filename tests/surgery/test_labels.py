"""Labels against what becomes of the elements themselves."""

import itertools

import numpy as np
import pytest
import torch

from tersor.surgery.coupling.elements import RULES as ELEMENTS
from tersor.surgery.coupling.labels import Block, Labelled, along, reshaped
from tersor.surgery.coupling.places import RULES as PLACES
from tersor.surgery.coupling.products import RULES as PRODUCTS
from tersor.surgery.coupling.units import Units


def spread(tensor: Labelled) -> np.ndarray:
    """For every element the unit it belongs to; -1 for none, one block at most."""
    if not tensor.blocks:
        return np.full(tensor.shape, -1)
    (block,) = tensor.blocks
    order = sorted(range(len(block.dims)), key=lambda axis: block.dims[axis])
    view = [s if d in block.dims else 1 for d, s in enumerate(tensor.shape)]
    return np.broadcast_to(block.ids.transpose(order).reshape(view), tensor.shape)


def first(units: Units, shape: tuple[int, ...], dim: int) -> Labelled:
    return Labelled(shape, (Block((dim,), units.new(shape[dim])),))


SHAPES = [(2, 12, 3), (2, 3, 4, 3), (24, 3), (2, 36), (2, 2, 6, 3), (72,), (2, 12, 1, 3), (6, 4, 3)]


@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(SHAPES, 2)])
def test_reshaping_labels_is_reshaping_elements(before, after):
    for dim in range(len(before)):
        units = Units()
        tensor = first(units, before, dim)
        found = reshaped(units, tensor, after)
        assert np.array_equal(spread(found), spread(tensor).reshape(after))


MOVES = {
    "permute": ([2, 0, 1],),
    "transpose": (0, -1),
    "slice": (1, 2, 9, 3),
    "narrow": (1, 3, 5),
    "repeat": ([2, 1, 3],),
    "repeat_interleave": (3, 1),
    "unsqueeze": (1,),
    "flatten": (1,),
    "relu": (),
}


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", MOVES)
def test_moving_labels_is_moving_elements(name, dim):
    units = Units()
    tensor = first(units, (2, 12, 3), dim)
    elements = torch.from_numpy(spread(tensor).copy())
    given = MOVES[name]
    wanted = torch.ops.aten.slice(elements, *given) if name == "slice" else None
    if wanted is None:
        wanted = elements if name == "relu" else getattr(elements, name)(*given)
    rules = {**ELEMENTS, **PLACES}
    found = rules[name](units, (tensor, *given), {}, tuple(wanted.shape))
    assert np.array_equal(spread(found), wanted.numpy())


def test_united_places_are_those_that_meet():
    units = Units()
    one, other = first(units, (4, 6), 1), first(units, (6,), 0)
    found = ELEMENTS["add"](units, (one, other), {}, (4, 6))
    assert units.roots(found.blocks[0].ids).tolist() == list(range(6))
    assert units.roots(other.blocks[0].ids).tolist() == list(range(6))
    assert all(units.stays(unit) is None for unit in range(12))


def test_what_meets_a_fixed_size_stays():
    units = Units()
    ELEMENTS["mul"](units, (first(units, (4, 6), 1), Labelled((6,))), {}, (4, 6))
    assert units.stays(3) == "it meets something of fixed size"
    free = first(units, (4, 6), 1)
    ELEMENTS["mul"](units, (free, Labelled((4, 1))), {}, (4, 6))
    assert units.stays(int(free.blocks[0].ids[0])) is None


def test_heads_are_whole_once_they_are_told_apart():
    units = Units()
    split = reshaped(units, first(units, (5, 12), 1), (5, 3, 4))
    assert split.blocks[0].dims == (1, 2)
    whole, ids = along(units, split, 1)
    assert units.roots(ids).tolist() == [0, 4, 8]
    assert whole.at(2) is None


def test_a_reason_is_kept_when_units_are_united():
    units = Units()
    ids = units.new(4)
    units.keep(ids[3:], "it is an output")
    units.unite(ids[:2], ids[2:])
    assert units.stays(1) == "it is an output"
    assert units.stays(0) is None


def test_a_convolution_over_labelled_places_keeps_them():
    units = Units()
    x, weight = first(units, (2, 3, 8), 2), first(units, (4, 3, 3), 0)
    found = PRODUCTS["conv1d"](units, (x, weight), {}, (2, 4, 6))
    assert units.stays(0) == "a convolution goes over it"
    assert [block.dims for block in found.blocks] == [(1,)]
