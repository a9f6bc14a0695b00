"""Product codebook form: sub-vectors looked up, stored in files, refused where they misfit."""

import copy

import pytest
import torch
from torch import nn

from tersor.codec import load, save
from tersor.errors import OptionError
from tersor.forms import KINDS, ProductCodebook
from tersor.surgery import hold

LAYOUTS = [
    ((6, 12), 0, 4),
    ((6, 10), 0, 4),
    ((6, 10), 1, 3),
    ((5, 3, 3, 3), 0, 9),
    ((4, 8, 3), 1, 5),
]


def form_of(shape, axis, length, count=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.Size(shape).numel() // shape[axis]
    codes = torch.randint(count, (shape[axis], -(-inputs // length)), generator=generator)
    codes[0, 0] = count - 1
    values = torch.randn(count, length, generator=generator).half()
    kind = torch.uint8 if count <= 256 else torch.int16
    return ProductCodebook(codes.to(kind), values, axis=axis, shape=shape, dtype=dtype)


def test_a_weight_worked_by_hand():
    # Codes 1 0 and 0 1 of (1, 2) and (3, 4); each row has three inputs, so the last is cut short.
    codes, values = torch.tensor([[1, 0], [0, 1]]).byte(), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    form = ProductCodebook(codes, values, axis=0, shape=(2, 3), dtype=torch.float32)
    assert form.dense().tolist() == [[3, 4, 1], [1, 2, 3]]
    turned = ProductCodebook(codes, values, axis=1, shape=(3, 2), dtype=torch.float32)
    assert turned.dense().tolist() == [[3, 1], [4, 2], [1, 3]]


@pytest.mark.parametrize(("shape", "axis", "length"), LAYOUTS)
@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_one_of_its_sub_vector(shape, axis, length, count, dtype):
    form = form_of(shape, axis, length, count, dtype)
    dense = form.dense()
    assert dense.shape == shape
    assert dense.dtype == dtype
    flat = dense.movedim(axis, 0).reshape(shape[axis], -1)
    for o in range(flat.shape[0]):
        for i in range(flat.shape[1]):
            value = form.values[int(form.codes[o, i // length]), i % length]
            assert flat[o, i] == value.to(dtype)
    bits = max(1, (count - 1).bit_length())
    assert form.stored_bits() == form.codes.numel() * bits + count * length * 16
    assert form.tunable() == ("values",)


@pytest.mark.parametrize(("shape", "axis", "length"), LAYOUTS)
@pytest.mark.parametrize("count", [7, 300])
def test_a_file_gives_it_back(shape, axis, length, count, tmp_path):
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(shape))
    form = form_of(shape, axis, length, count)
    held = hold(copy.deepcopy(layer), "weight", form)
    again = load(save(held, tmp_path / "one.tersor"), into=layer)
    assert isinstance(again.weight_form, ProductCodebook)
    assert torch.equal(again.weight, held.weight)
    assert torch.equal(again.weight_form.values, form.values)


def test_half_changes_what_is_read_and_nothing_that_is_stored():
    form = form_of((6, 12), 0, 4).half()
    assert form.dense().dtype == torch.float16
    assert form.to(torch.float64).values.dtype == torch.float16


GOOD = {"axis": 0}
CODES, VALUES = torch.zeros(4, 3, dtype=torch.uint8), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("config", "codes", "values", "shape", "rule"),
    [
        ({"axis": 2}, CODES, VALUES, (4, 8), "axis=2 is no dimension"),
        ({"axis": None}, CODES, VALUES, (4, 8), "axis=None is no dimension"),
        (GOOD, CODES, VALUES, (0, 8), "empty"),
        (GOOD, CODES, VALUES.flatten(), (4, 8), "matrix of floats"),
        (GOOD, CODES, VALUES.int(), (4, 8), "matrix of floats"),
        (GOOD, CODES, torch.ones(0, 3), (4, 8), "1 to 4096 rows"),
        (GOOD, CODES, torch.ones(4097, 3), (4, 8), "1 to 4096 rows"),
        (GOOD, CODES, torch.ones(2, 0), (4, 8), "1 to 4096 rows of 1 to 8"),
        (GOOD, CODES[:, :1], torch.ones(2, 9), (4, 8), "1 to 4096 rows of 1 to 8"),
        (GOOD, CODES, VALUES, (4, 9, 2), "of shape"),
        (GOOD, CODES.to(torch.int16), VALUES, (4, 8), r"torch\.uint8 of shape"),
        (GOOD, CODES, torch.ones(257, 3), (4, 8), r"torch\.int16 of shape"),
        (GOOD, CODES.float(), VALUES, (4, 8), r"torch\.uint8 of shape"),
        (GOOD, CODES + 2, VALUES, (4, 8), "past the 2 values"),
        (GOOD, CODES.short() - 1, torch.ones(257, 3), (4, 8), "past the 257 values"),
    ],
)
def test_parts_that_do_not_fit_are_refused(config, codes, values, shape, rule):
    build = KINDS["product_codebook"].build
    assert build(GOOD, {"codes": CODES, "values": VALUES}, (4, 8), torch.float32).codes is not None
    with pytest.raises((ValueError, OptionError), match=rule):
        build(config, {"codes": codes, "values": values}, shape, torch.float32)
