"""Sums of scaled signs, against the best that any scales and signs could do."""

import itertools

import pytest
import torch

from tersor.errors import OptionError
from tersor.forms import Affine, BitPlanes


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(weight, form):
    return (form.dense() - weight).double().square().sum().item()


def naive(form):
    """The docstring's equation, one weight after the other."""
    inputs = form.codes.shape[1]
    out = torch.zeros(form.codes.shape)
    for o, i in itertools.product(*map(range, form.codes.shape)):
        raised = int(form.codes[o, i]) + 2 ** (form.planes - 1)
        for p in range(form.planes):
            sign = 1 if raised >> (form.planes - 1 - p) & 1 else -1
            out[o, i] += sign * float(form.scale[o, i // (form.group_size or inputs), p])
    return out


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize(("shape", "axis"), [((4, 13), 0), ((3, 2, 3, 3), 0), ((6, 4), 1)])
def test_equals_the_equation_taken_literally(shape, axis, group_size, planes):
    weight = normal(shape)
    form = BitPlanes.encode(weight, planes=planes, group_size=group_size, axis=axis)
    rows = form.dense().movedim(axis, 0).reshape(shape[axis], -1)
    assert torch.allclose(rows, naive(form), atol=1e-6)
    groups = 1 if group_size is None else -(-rows.shape[1] // group_size)
    bits = planes * weight.numel() + 16 * planes * groups * shape[axis]
    assert form.stored_bits() == bits
    assert (form.scale >= 0).all()
    assert (form.scale.float().diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_two_planes_come_near_the_best_signs_there_are(seed):
    # Of 6 weights every choice of signs, each with its best scales.
    weight = normal((1, 6), seed)
    choices = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12))).reshape(-1, 6, 2)
    scales = torch.linalg.pinv(choices.double()) @ weight.T.double()
    best = (choices.double() @ scales - weight.T).square().sum((1, 2)).min().item()
    # Fitting in turn may stop at a place that is best only nearby.
    slack = 2**-14 * float(weight.square().sum())
    assert best <= error(weight, BitPlanes.encode(weight)) + 1e-6
    assert error(weight, BitPlanes.encode(weight)) <= 2 * best + slack


def test_two_planes_worked_by_hand():
    # Levels 3 and 1 on both sides are 2 and 1 added and subtracted, and hold these exactly.
    form = BitPlanes.encode(torch.tensor([[3.0, 1.0, -1.0, -3.0]]))
    assert form.scale.tolist() == [[[2, 1]]]
    assert form.codes.tolist() == [[1, 0, -1, -2]]
    assert form.dense().tolist() == [[3, 1, -1, -3]]


def test_one_plane_is_that_of_xnor_net():
    weight = normal((8, 50))
    expected = weight.sign() * weight.abs().mean(1, keepdim=True).bfloat16()
    assert torch.allclose(BitPlanes.encode(weight, planes=1).dense(), expected, rtol=2**-7)


@pytest.mark.parametrize(("planes", "bound"), [(1, 0.366), (2, 0.1185), (3, 0.0375)])
def test_error_on_normal_weights(planes, bound):
    # Lloyd-Max: .3634 at one bit and .1175 at two; three planes are not any eight levels (.0345).
    weight = normal((64, 4096))
    relative = error(weight, BitPlanes.encode(weight, planes=planes)) / weight.square().sum()
    assert 0.95 * bound < relative <= bound


@pytest.mark.parametrize("group_size", [None, 32])
def test_two_planes_beat_two_even_bits(group_size):
    weight = normal((16, 256))
    even = min(
        error(weight, Affine.encode(weight, bits=2, group_size=group_size, symmetric=symmetric))
        for symmetric in (True, False)
    )
    assert error(weight, BitPlanes.encode(weight, group_size=group_size)) < 0.7 * even


@pytest.mark.parametrize("weight", [torch.zeros(2, 5), torch.full((2, 5), -2.5), torch.ones(1, 1)])
def test_weights_that_are_all_alike_come_back(weight):
    for planes in (1, 2, 4):
        assert torch.allclose(BitPlanes.encode(weight, planes=planes).dense(), weight, rtol=0.02)


def test_options_that_do_not_fit_are_refused():
    for planes in (0, 5, True, 2.0):
        with pytest.raises(OptionError, match=r"planes=.* for a weight of shape \(2, 2\)"):
            BitPlanes.encode(torch.ones(2, 2), planes=planes)
    with pytest.raises(OptionError, match="group_size=0"):
        BitPlanes.encode(torch.ones(2, 2), group_size=0)
    with pytest.raises(OptionError, match="axis=None"):
        BitPlanes.encode(torch.ones(2, 2), axis=None)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"codes": torch.zeros(2, 6, dtype=torch.int8)}, r"int8 of shape \(2, 5\)"),
        ({"codes": torch.zeros(2, 5, dtype=torch.uint8)}, "codes must be int8"),
        ({"codes": torch.full((2, 5), 2, dtype=torch.int8)}, "from -2 to 1"),
        ({"codes": torch.full((2, 5), -128, dtype=torch.int8)}, "from -2 to 1"),
        ({"scale": torch.ones(2, 2, 2)}, "scale must be bfloat16"),
        ({"scale": torch.ones(2, 2, 1).bfloat16()}, r"of shape \(2, 2, 2\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, rule):
    form = BitPlanes.encode(normal((2, 5)), group_size=4)
    parts = {name: getattr(form, name) for name, _ in form.parts()}
    BitPlanes.build(form.config(), parts, form.shape, form.dtype)
    with pytest.raises(ValueError, match=rule):
        BitPlanes.build(form.config(), parts | change, form.shape, form.dtype)
