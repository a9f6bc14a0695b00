"""The affine form against its bound, a naive reading of its equation, and cases worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import OptionError
from tersor.forms import Affine, BitPlanes, BlockFloat

SHAPES = [(1, 1), (1, 32), (7, 65), (5, 3, 3, 3), (4, 8, 2), (2, 3, 2, 2, 2), (6,)]
LAYOUTS = [("channel", None, 0), ("group", 5, 0), ("tensor", None, None), ("groups", 7, None)]


def normal(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def up_to_bfloat16(value: float) -> float:
    """The smallest bfloat16 number that is not below `value`: 8 significant bits."""
    if value <= 0:
        return float(torch.finfo(torch.bfloat16).tiny)
    _, exponent = math.frexp(value)
    step = 2.0 ** (exponent - 8)
    return max(math.ceil(value / step) * step, float(torch.finfo(torch.bfloat16).tiny))


def naive(weight, bits, group_size, symmetric, axis):
    """Eq. 1 of Jacob et al. 2018, one weight after the other."""
    moved = weight if axis is None else weight.movedim(axis, 0)
    matrix = moved.reshape(1, -1) if axis is None else moved.reshape(moved.shape[0], -1)
    out = torch.empty_like(matrix)
    bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for o, row in enumerate(matrix.tolist()):
        size = group_size or len(row)
        for start in range(0, len(row), size):
            group = row[start : start + size]
            if symmetric:
                scale, zero = up_to_bfloat16(max(map(abs, group)) / top), 0
                low = -top
            else:
                lowest, highest = min([0, *group]), max([0, *group])
                scale = up_to_bfloat16((highest - lowest) / (top - bottom))
                zero = min(max(round(bottom - lowest / scale), bottom), top)
                low = bottom
            for i, value in enumerate(group):
                code = min(max(round(value / scale + zero), low), top)
                out[o, start + i] = (code - zero) * scale
    if axis is None:
        return out.reshape(weight.shape)
    return out.reshape(moved.shape).movedim(0, axis)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "group_size", "axis"), LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_weight_moves_more_than_half_a_level(bits, shape, name, group_size, axis, symmetric):
    weight = normal(shape, bits)
    form = Affine.encode(weight, bits=bits, group_size=group_size, axis=axis, symmetric=symmetric)
    moved = (form.dense() - weight).abs()
    matrix = moved.reshape(1, -1) if axis is None else moved.reshape(moved.shape[0], -1)
    for i in range(matrix.shape[1]):
        half = form.scale[:, i // (group_size or matrix.shape[1])].float() / 2
        assert (matrix[:, i] <= half * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "group_size", "axis"),
    [((3, 7), None, 0), ((3, 7), 3, 0), ((4, 6), None, 1), ((2, 3, 2), 4, 0), ((5, 3), None, None)],
)
def test_equals_the_equation_taken_literally(bits, symmetric, shape, group_size, axis):
    weight = normal(shape, 10 + bits, torch.float64)
    form = Affine.encode(weight, bits=bits, group_size=group_size, symmetric=symmetric, axis=axis)
    expected = naive(weight, bits, group_size, symmetric, axis)
    assert (form.dense() - expected).abs().max() == 0.0


def test_asymmetric_codes_worked_by_hand():
    # Range -1..2 in 2 bits: scale 1; -1 is code -2, so zero is code -1, 0.4 too, and 2 is code 1.
    form = Affine.encode(torch.tensor([[-1.0, 0.0, 0.4, 2.0]]), bits=2, symmetric=False)
    assert form.codes.tolist() == [[-2, -1, -1, 1]]
    assert (form.scale.item(), form.zero.item()) == (1.0, -1)
    assert form.dense().tolist() == [[-1.0, 0.0, 0.0, 2.0]]


def test_symmetric_codes_worked_by_hand():
    # 3 bits: top 3, so scale = 6 / 3 = 2; 3.1 is nearest to level 2 (4), -0.9 to level 0.
    form = Affine.encode(torch.tensor([[6.0, -5.0, 3.1, -0.9]]), bits=3)
    assert form.codes.tolist() == [[3, -2, 2, 0]]
    assert form.dense().tolist() == [[6.0, -4.0, 4.0, 0.0]]


def test_one_bit_keeps_signs_times_the_mean_size():
    # mean|w| of 1, 2, 3 is 2 (Rastegari et al. 2016, eq. 6); zero counts as positive.
    form = Affine.encode(torch.tensor([[1.0, -2.0, 3.0]]), bits=1)
    assert form.dense().tolist() == [[2.0, -2.0, 2.0]]
    assert Affine.encode(torch.tensor([[4.0, 0.0]]), bits=1).dense().tolist() == [[2.0, 2.0]]


def test_one_bit_asymmetric_keeps_zero_and_the_largest():
    # Range 0..4 in one bit: two levels, 0 and 4.
    form = Affine.encode(torch.tensor([[4.0, 0.0, 1.0, 3.0]]), bits=1, symmetric=False)
    assert form.dense().tolist() == [[4.0, 0.0, 0.0, 4.0]]


def test_the_last_group_may_be_shorter():
    # Groups 3, -6, 9 | 1: scales 9 / 1 and 1 / 1 at 2 bits, so -6 rounds to -9 and 3 to 0.
    form = Affine.encode(torch.tensor([[3.0, -6.0, 9.0, 1.0]]), bits=2, group_size=3)
    assert form.scale.tolist() == [[9.0, 1.0]]
    assert form.dense().tolist() == [[0.0, -9.0, 9.0, 1.0]]
    assert form.stored_bits() == 4 * 2 + 2 * 16


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_zeros_stay_exact(bits, symmetric, dtype):
    weight = normal((6, 32), bits, dtype) + 3
    weight[:, ::2] = 0
    form = Affine.encode(weight, bits=bits, group_size=8, symmetric=symmetric)
    assert (form.dense()[:, ::2] == 0).all()
    assert form.dense().dtype == dtype


def test_each_channel_of_a_transposed_layer_has_its_own_scale():
    # Two outputs in columns, of size 1 and 100: one scale each keeps the small one.
    weight = torch.tensor([[1.0, 100.0], [0.5, 40.0]])
    by_column = Affine.encode(weight, bits=8, axis=1)
    assert by_column.scale.shape == (2, 1)
    assert (by_column.dense() - weight).abs().amax(0)[0] <= 1 / 127 / 2 * 1.01


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 20), st.integers(1, 21), st.booleans())
def test_bits_add_up_for_every_layout(bits, outputs, inputs, group_size, symmetric):
    form = Affine.encode(
        normal((outputs, inputs)), bits=bits, group_size=group_size, symmetric=symmetric
    )
    groups = outputs * math.ceil(inputs / group_size)
    zeros = 0 if symmetric else groups * bits
    assert form.stored_bits() == outputs * inputs * bits + 16 * groups + zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30, 1e38])
def test_extreme_ranges_stay_finite(symmetric, size):
    weight = normal((4, 16)) * size
    weight = weight.clamp(-3e38, 3e38)
    out = Affine.encode(weight, bits=8, symmetric=symmetric).dense()
    assert torch.isfinite(out).all()
    tiny = torch.finfo(torch.bfloat16).tiny
    assert (out - weight).abs().max() <= max(4 * size / 127, tiny)


def test_one_bit_takes_the_mean_of_the_weights_that_are_there():
    # The last group has one weight, and what pads it has no share in its mean.
    form = Affine.encode(torch.tensor([[1.0, -3.0, 4.0]]), bits=1, group_size=2)
    assert form.dense().tolist() == [[2, -2, 4]]


def fractions(codes, zero, dtype=torch.float32):
    return Affine(
        torch.tensor(codes, dtype=torch.int8),
        torch.tensor([[0.5, 2.0]]).bfloat16(),
        torch.tensor(zero, dtype=torch.float16),
        bits=4,
        group_size=2,
        axis=0,
        zero_bits=16,
        shape=(1, 3),
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_points_may_be_fractions(dtype):
    # (1 - 0.25) / 2, (-8 - 0.25) / 2, and 2 (7 + 1.5).
    form = fractions([[1, -8, 7]], [[0.25, -1.5]], dtype)
    assert form.dense().tolist() == [[0.375, -4.125, 17]]
    assert form.stored_bits() == 3 * 4 + 2 * 16 + 2 * 16
    # 0.125 (8 + 1 / 1024) rounded once: in half precision the difference would be 8 already.
    fine = fractions([[7, 7, 7]], [[-1 - 2**-10, 0]], dtype)
    assert fine.dense()[0, 0] == torch.tensor((8 + 2**-10) / 2).to(dtype)
    again = Affine.build(
        form.config(),
        {name: getattr(form, name) for name, _ in form.parts()},
        form.shape,
        form.dtype,
    )
    assert again.config() == form.config()
    assert torch.equal(again.dense(), form.dense())


@pytest.mark.parametrize(
    ("zero_bits", "zero", "rule"),
    [
        (16, torch.zeros(1, 2, dtype=torch.int8), "zero float16"),
        (None, torch.zeros(1, 2).half(), "zero int8"),
        (16, torch.zeros(1, 2).bfloat16(), "zero float16"),
        (8, torch.zeros(1, 2, dtype=torch.int8), "zero None"),
        (16, None, "zero_bits without zero points"),
    ],
)
def test_zero_points_of_another_type_are_refused(zero_bits, zero, rule):
    form = fractions([[1, 2, 3]], [[0, 0]])
    parts = {name: getattr(form, name) for name, _ in form.parts()} | {"zero": zero}
    parts = {name: part for name, part in parts.items() if part is not None}
    config = {**form.config(), "zero_bits": zero_bits}
    with pytest.raises(ValueError, match=rule):
        Affine.build(config, parts, form.shape, form.dtype)


def test_half_precision_is_encoded_as_well_as_float():
    weight = normal((8, 64), 3, torch.float16) / 1000
    form = Affine.encode(weight, bits=8)
    assert torch.equal(form.codes, Affine.encode(weight.float(), bits=8).codes)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 2.5}, "bits=2.5"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"bits": 4, "group_size": 1.5}, "group_size=1.5"),
        ({"bits": 4, "axis": 2}, "axis=2"),
        ({"bits": 4, "axis": -1}, "axis=-1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, named):
    with pytest.raises(OptionError, match=named) as refused:
        Affine.encode(torch.ones(3, 5), **options)
    assert "(3, 5)" in str(refused.value)
    assert "choose" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"codes": torch.zeros(3, 4, dtype=torch.int8)}, "codes"),
        ({"codes": torch.zeros(3, 5)}, "codes"),
        ({"scale": torch.ones(3, 2)}, "scale"),
        ({"scale": torch.ones(3, 1, dtype=torch.int8)}, "scale must be of a float type"),
        ({"zero": torch.zeros(3, 1)}, "zero int8"),
        ({"zero": torch.zeros(2, 1, dtype=torch.int8)}, "zero"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, rule):
    form = Affine.encode(torch.ones(3, 5), bits=4, symmetric=False)
    parts = {name: getattr(form, name) for name, _ in form.parts()}
    with pytest.raises(ValueError, match=rule):
        Affine.build(form.config(), parts | change, form.shape, form.dtype)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize(
    "encode",
    [
        lambda w: Affine.encode(w, bits=4, symmetric=False),
        lambda w: Affine.encode(w, bits=1, group_size=4),
        BlockFloat.encode,
        BitPlanes.encode,
    ],
)
def test_weights_without_values_come_back(encode, shape):
    form = encode(torch.zeros(shape))
    assert form.dense().shape == shape
    parts = {name: getattr(form, name) for name, _ in form.parts()}
    assert form.build(form.config(), parts, form.shape, form.dtype).dense().shape == shape
