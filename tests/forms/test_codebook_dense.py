"""Codebook and dense forms against naive readings of their equations."""

import pytest
import torch

from tersor.errors import OptionError
from tersor.forms import Codebook, Dense


@pytest.mark.parametrize("k", [1, 2, 3, 16, 17, 256])
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (2, 3, 3, 3)])
def test_each_weight_takes_the_nearest_value(k, shape):
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(shape, generator=generator)
    values = torch.randn(k, generator=generator)
    form = Codebook.encode(weight, values)
    nearest = (weight.flatten()[:, None] - values).abs().amin(1)
    assert torch.allclose((form.dense() - weight).abs().flatten(), nearest, atol=1e-6)
    bits = max(1, (k - 1).bit_length())
    assert form.stored_bits() == weight.numel() * bits + k * 32


def test_codes_worked_by_hand():
    # Values need not be sorted; 1.5 lies between 1 and 2, and a tie goes to the lower value.
    form = Codebook.encode(torch.tensor([[1.5, -3.0, 1.6]]), torch.tensor([2.0, -1.0, 1.0]))
    assert form.codes.tolist() == [[2, 1, 0]]
    assert form.dense().tolist() == [[1.0, -1.0, 2.0]]


def test_of_equal_values_the_first_is_taken():
    # Sparse codes rely on it: code 0 must stand for every zero, also beside a second zero.
    weight = torch.tensor([[0.0, 1.0, 0.0, -1.0]])
    for twice in (torch.tensor([0.0, -1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, -1.0, 1.0])):
        assert Codebook.encode(weight, twice).codes[0, ::2].tolist() == [0, 0]


def test_half_weights_take_the_nearest_of_close_values():
    # 1 + 2**-11 and 1 + 3 * 2**-11 are halfway between halves; in half the middles would round.
    values = 1 + torch.arange(256).half() * 2**-10
    weight = values.repeat(4)[None]
    assert torch.equal(Codebook.encode(weight, values).dense(), weight)


@pytest.mark.parametrize("shape", [(0,), (257,), (2, 2)])
def test_a_codebook_of_another_size_is_refused(shape):
    with pytest.raises(OptionError, match="1 to 256"):
        Codebook.encode(torch.ones(3, 3), torch.ones(shape))


@pytest.mark.parametrize(("shape", "axis"), [((3, 5), 0), ((3, 5), 1), ((4, 2, 3, 3), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_channel_has_its_scale(shape, axis, dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(7, shape, generator=generator, dtype=torch.uint8)
    values = torch.randn(7, generator=generator).half()
    scale = (torch.rand(shape[axis], 1, generator=generator) + 0.1).bfloat16()
    form = Codebook(codes, values, scale, bits=3, dtype=dtype, axis=axis)
    dense = form.dense()
    assert dense.dtype == dtype
    for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        exact = values[codes[tuple(place)].long()].float() * scale[place[axis], 0].float()
        assert dense[tuple(place)] == exact.to(dtype)
    assert form.stored_bits() == codes.numel() * 3 + 7 * 16 + shape[axis] * 16
    assert form.tunable() == ("values", "scale")
    parts = {name: getattr(form, name) for name, _ in form.parts()}
    again = Codebook.build(form.config(), parts, shape, dtype)
    assert again.config() == form.config() == {"bits": 3, "axis": axis}
    assert torch.equal(again.dense(), dense)


@pytest.mark.parametrize(
    ("config", "scale", "rule"),
    [
        ({"axis": 0}, torch.ones(2, 1), "bfloat16 of shape"),
        ({"axis": 0}, torch.ones(2, dtype=torch.bfloat16), "bfloat16 of shape"),
        ({"axis": 1}, torch.ones(2, 1, dtype=torch.bfloat16), r"bfloat16 of shape \(3, 1\)"),
        ({"axis": 2}, torch.ones(2, 1, dtype=torch.bfloat16), "axis=2 is no dimension"),
        ({"axis": None}, torch.ones(1, 1, dtype=torch.bfloat16), "axis=None is no dimension"),
    ],
)
def test_scales_that_do_not_fit_are_refused(config, scale, rule):
    codes = torch.zeros(2, 3, dtype=torch.uint8)
    parts = {"codes": codes, "values": torch.ones(2), "scale": scale}
    with pytest.raises((ValueError, OptionError), match=rule):
        Codebook.build({"bits": 1, **config}, parts, (2, 3), torch.float32)


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ({"codes": torch.full((2, 2), 2, dtype=torch.uint8), "values": torch.ones(2)}, "past"),
        ({"codes": torch.zeros(2, 2), "values": torch.ones(2)}, "uint8"),
        (
            {"codes": torch.zeros(2, 2, dtype=torch.uint8), "values": torch.ones(2).int()},
            "values must be floats",
        ),
        ({"codes": torch.zeros(2, 3, dtype=torch.uint8), "values": torch.ones(2)}, "shape"),
    ],
)
def test_codebook_parts_that_do_not_fit_are_refused(parts, rule):
    with pytest.raises(ValueError, match=rule):
        Codebook.build({"bits": 1}, parts, (2, 2), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "relative", "bits"),
    [
        (torch.float64, 0.0, 64),
        (torch.float32, 0.0, 32),
        (torch.float16, 2**-11, 16),
        (torch.bfloat16, 2**-8, 16),
        (torch.float8_e4m3fn, 2**-4, 8),
        (torch.float8_e5m2, 2**-3, 8),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 3, 3), (7,)])
def test_a_narrower_float_is_within_its_rounding(dtype, relative, bits, shape):
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    form = Dense.encode(weight, dtype=dtype)
    assert ((form.dense() - weight).abs() <= relative * weight).all()
    assert form.dense().dtype == torch.float32
    assert form.stored_bits() == weight.numel() * bits


def test_rounding_to_float8_worked_by_hand():
    # e4m3 keeps 3 bits after the first: between 1 and 2 the steps are 1/8, so 1.2 becomes 1.25.
    form = Dense.encode(torch.tensor([[1.2, 300.0]]), dtype=torch.float8_e4m3fn)
    assert form.dense().tolist() == [[1.25, 288.0]]


def test_a_weight_that_would_overflow_is_refused():
    with pytest.raises(OptionError, match=r"holds at most 448, but a weight .* reaches 500"):
        Dense.encode(torch.tensor([[1.0, 500.0]]), dtype=torch.float8_e4m3fn)
    with pytest.raises(OptionError, match=r"torch\.int8 is no float type"):
        Dense.encode(torch.ones(2, 2), dtype=torch.int8)
