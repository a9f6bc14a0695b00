"""Rotated weights: orthogonal, the same from the same seed, spread out, and held by other forms."""

import pytest
import torch
from torch import nn

from tersor.forms import Affine, Rotated
from tersor.forms.rotated import hadamard, signs, turn, turn_back, turn_both
from tersor.surgery import hold

SIZES = [1, 2, 3, 5, 12, 64, 172, 384]


@pytest.mark.parametrize("n", SIZES)
def test_a_turn_is_a_rotation_and_can_be_undone(n):
    matrix = turn(torch.eye(n, dtype=torch.float64), 7)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    x = torch.randn(3, n)
    assert torch.allclose(turn(turn(x, 7), 7, back=True), x, atol=1e-5)


@pytest.mark.parametrize("n", SIZES[2:])
def test_one_outlier_is_spread_over_many(n):
    x = torch.eye(n) * 100
    # Each entry of an orthogonal matrix is at least n**-0.5 in the mean square.
    assert turn(x, 1).abs().max() <= 100 * 4 / n**0.5


def test_the_transform_is_that_of_hadamard():
    # Sylvester: H(2n) = [[H, H], [H, -H]], entries (-1)**popcount(i & j).
    size = 16
    parity = torch.tensor([[(i & j).bit_count() % 2 for j in range(size)] for i in range(size)])
    assert torch.allclose(hadamard(torch.eye(size)), (1 - 2.0 * parity) / 4)


def test_signs_are_those_of_splitmix():
    # Steele, Lea, Flood 2014: the first two outputs for seed 0.
    expected = f"{0xE220A8397B1DCDAF:064b}"[::-1] + f"{0x6E789E6AA1B965F4:064b}"[::-1]
    assert signs(128, 0).tolist() == [1 - 2 * int(bit) for bit in expected]
    assert signs(100, 3).tolist() == signs(128, 3)[:100].tolist()
    assert signs(128, 3).tolist() != signs(128, 4).tolist()


@pytest.mark.parametrize(
    ("shape", "axis"), [((7, 12), 0), ((6, 5), 1), ((4, 3, 2, 2), 0), ((5,), None)]
)
def test_what_was_turned_comes_back(shape, axis):
    weight = torch.randn(shape)
    matrix = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    form = Rotated(turn_both(matrix, 9), seed=9, axis=axis, shape=shape, dtype=torch.float32)
    assert torch.allclose(form.dense(), weight, atol=1e-5)
    parts = {"turned": form.turned}
    again = Rotated.build(form.config(), parts, form.shape, form.dtype)
    assert torch.equal(again.dense(), form.dense())


def test_outputs_and_inputs_are_turned_by_their_own_seeds():
    matrix = torch.randn(6, 5)
    outputs, inputs = turn(torch.eye(6), 2 * 4).T, turn(torch.eye(5), 2 * 4 + 1).T
    assert torch.allclose(turn_both(matrix, 4), outputs @ matrix @ inputs.T, atol=1e-6)


def test_errors_keep_their_size():
    matrix, error = torch.randn(20, 12), torch.randn(20, 12)
    moved = turn_back(turn_both(matrix, 2) + error, 2) - matrix
    assert moved.norm() == pytest.approx(error.norm().item(), rel=1e-5)


def test_another_form_holds_what_was_turned():
    layer = nn.Linear(24, 10)
    turned = turn_both(layer.weight.detach(), 1)
    inner = Affine.encode(turned, bits=8)
    form = Rotated(turned, seed=1, axis=0, shape=(10, 24), dtype=torch.float32)
    hold(layer, "weight", hold(form, "turned", inner))
    assert layer.weight_form.stored_bits() == inner.stored_bits()
    assert torch.allclose(layer.weight, turn_back(inner.dense(), 1), atol=1e-6)
    assert layer.half().weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("config", "turned", "said"),
    [
        ({"seed": -1}, torch.zeros(4, 6), "seed=-1; choose a whole number"),
        ({"seed": 2**32}, torch.zeros(4, 6), "seed="),
        ({"seed": True}, torch.zeros(4, 6), "seed=True"),
        ({"axis": 2}, torch.zeros(4, 6), "axis=2 is no dimension"),
        ({}, torch.zeros(6, 4), r"turned must be float32 of shape \(4, 6\)"),
        ({}, torch.zeros(4, 6).half(), "turned must be float32"),
    ],
)
def test_what_does_not_fit_is_refused(config, turned, said):
    with pytest.raises(ValueError, match=said):
        Rotated.build({"seed": 1, "axis": 0, **config}, {"turned": turned}, (4, 6), torch.float32)


def test_empty_weights_are_refused():
    with pytest.raises(ValueError, match="empty"):
        Rotated.build({"seed": 1, "axis": 0}, {"turned": torch.zeros(0, 6)}, (0, 6), torch.float32)
