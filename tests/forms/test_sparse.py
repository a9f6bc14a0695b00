"""Bitmask and N:M: exact, and as small as counting says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import OptionError
from tersor.forms import Affine, Bitmask, NofM
from tersor.forms.bitmask import pack_bits, unpack_bits
from tersor.surgery import hold


def sparse(shape, keep, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return (weight * (torch.rand(shape, generator=generator) < keep)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 5), (4, 2, 3, 3), (9,)])
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_bitmask_is_exact(shape, keep, dtype):
    weight = sparse(shape, keep, dtype=dtype)
    form = Bitmask.encode(weight)
    assert torch.equal(form.dense(), weight)
    assert torch.equal(form.kept(), weight != 0)
    stored = int((weight != 0).sum())
    width = weight.element_size() * 8
    assert form.stored_bits() == -(-weight.numel() // 8) * 8 + stored * width


def test_bitmask_worked_by_hand():
    # Weights 0, 2 and 8 of nine are kept: bits 0 and 2 of the first byte (5), bit 0 of the second.
    weight = torch.tensor([[7.0, 0, 8], [0, 0, 0], [0, 0, 9]])
    form = Bitmask.encode(weight)
    assert form.mask.tolist() == [5, 1]
    assert form.values.tolist() == [7.0, 8.0, 9.0]


@given(st.lists(st.booleans(), max_size=70))
def test_packed_bits_are_where_the_format_says(flags):
    packed = pack_bits(torch.tensor(flags, dtype=torch.bool))
    assert len(packed) == -(-len(flags) // 8)
    for i, flag in enumerate(flags):
        assert (packed[i // 8].item() >> (i % 8)) & 1 == flag
    assert unpack_bits(packed, len(flags)).tolist() == flags


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (3, 3), (1, 256)])
@pytest.mark.parametrize(("shape", "axis"), [((3, 768), 0), ((768, 3), 1), ((2, 96, 8), 0)])
def test_n_of_m_is_exact(n, m, shape, axis):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(m))
    groups = weight.movedim(axis, 0).reshape(shape[axis], -1, m)
    smallest = groups.abs().argsort(-1)[..., : m - n]
    weight = groups.scatter(-1, smallest, 0).reshape(weight.movedim(axis, 0).shape)
    weight = weight.movedim(0, axis).contiguous()
    form = NofM.encode(weight, n=n, m=m, axis=axis)
    assert torch.equal(form.dense(), weight)
    place_bits = max(1, (m - 1).bit_length())
    assert form.stored_bits() == weight.numel() // m * n * (32 + place_bits)


def test_n_of_m_worked_by_hand():
    # Of each four inputs two: 5 and 6 in places 1 and 3, then 7 alone (a zero fills its group).
    form = NofM.encode(torch.tensor([[0.0, 5, 0, 6, 0, 0, 7, 0]]), n=2, m=4)
    assert form.values[0, 0].tolist() == [5.0, 6.0]
    assert form.places[0, 0].tolist() == [1, 3]
    assert form.places[0, 1].tolist()[-1] == 2
    assert sorted(form.values[0, 1].tolist()) == [0.0, 7.0]


@pytest.mark.parametrize(
    ("shape", "n", "m", "named"),
    [
        ((2, 8), 2, 3, "m=3 does not divide the 8"),
        ((2, 8), 5, 4, "n=5, m=4"),
        ((2, 8), 0, 4, "n=0"),
        ((2, 8), 3, 4, "4 non-zeros"),
        ((2, 512), 1, 512, "m=512"),
    ],
)
def test_n_of_m_refuses(shape, n, m, named):
    with pytest.raises(OptionError, match=named) as refused:
        NofM.encode(torch.ones(shape), n=n, m=m)
    assert str(shape) in str(refused.value)


def test_bitmask_of_affine_codes_is_the_affine_weight():
    weight = sparse((8, 40), 0.3)
    plain = Affine.encode(weight, bits=4)
    nested = Affine.encode(weight, bits=4)
    hold(nested, "codes", Bitmask.encode(nested.codes, bits=4))
    assert torch.equal(nested.dense(), plain.dense())
    assert nested.stored_bits() == 320 + 4 * int((plain.codes != 0).sum()) + 8 * 16


def test_bitmask_whose_values_are_affine():
    weight = sparse((8, 40), 0.3, seed=1)
    form = Bitmask.encode(weight)
    hold(form, "values", Affine.encode(form.values, bits=8, axis=None))
    error = (form.dense() - weight).abs()
    assert (error[weight == 0] == 0).all()
    assert error.max() <= weight.abs().max() / 127 / 2 * 1.01
    assert form.stored_bits() == 320 + 8 * int((weight != 0).sum()) + 16


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ({"mask": torch.zeros(2, dtype=torch.uint8), "values": torch.ones(0)}, "1 bytes"),
        ({"mask": torch.ones(1, dtype=torch.uint8), "values": torch.ones(2)}, "as many"),
        ({"mask": torch.ones(1), "values": torch.ones(1)}, "bytes"),
    ],
)
def test_bitmask_parts_that_do_not_fit_are_refused(parts, rule):
    with pytest.raises(ValueError, match=rule):
        Bitmask.build({}, parts, (2, 4), torch.float32)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"places": torch.full((1, 2, 2), 4, dtype=torch.uint8)}, "below m=4"),
        ({"places": torch.zeros(1, 2, 1, dtype=torch.uint8)}, "shape of values"),
        ({"values": torch.zeros(1, 3, 2)}, "values must have"),
    ],
)
def test_n_of_m_parts_that_do_not_fit_are_refused(change, rule):
    form = NofM.encode(torch.tensor([[0.0, 5, 0, 6, 0, 0, 7, 0]]), n=2, m=4)
    parts = {"values": form.values, "places": form.places}
    with pytest.raises(ValueError, match=rule):
        NofM.build(form.config(), parts | change, form.shape, form.dtype)
