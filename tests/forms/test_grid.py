"""Grids: the integers of ONNX, the same after copies and in any precision of the network."""

import math

import numpy as np
import pytest
import torch

from tersor.errors import OptionError
from tersor.forms.grid import DynamicGrid, Grid, grid_from


def onnx_codes(x, scale, zero, low, high):
    """QuantizeLinear as the ONNX specification has it, one number at a time."""
    found = []
    for value in x.flatten().tolist():
        ratio = float(np.float32(value) / np.float32(scale))
        below = math.floor(ratio)
        half = ratio - below
        whole = below if half < 0.5 or (half == 0.5 and below % 2 == 0) else below + 1
        found.append(min(max(whole + zero, low), high))
    return torch.tensor(found).reshape(x.shape)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_integers_are_those_of_onnx(bits, signed):
    x = torch.randn(40, 5) * 3
    x[0] = torch.tensor([0.0, 0.25, 0.75, -0.25, 1.25])  # ends of halves at a scale of 1/2
    grid = Grid(0.5, (-1 if signed else 1), bits=bits, signed=signed)
    expected = onnx_codes(x, 0.5, int(grid.zero), grid.low, grid.high)
    assert torch.equal(grid.codes(x), expected.to(torch.int32))
    assert torch.equal(grid(x), (expected - grid.zero) * grid.scale)


def test_a_grid_worked_by_hand():
    # Levels (0..3 - 1) * 0.5: halves go to the even integer, the rest is clamped.
    grid = Grid(0.5, 1, bits=2, signed=False)
    x = torch.tensor([-9.0, -0.25, 0.0, 0.25, 0.75, 1.25, 9.0])
    assert grid(x).tolist() == [-0.5, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert grid.codes(x).tolist() == [0, 1, 1, 1, 3, 3, 3]
    assert grid.range == (-0.5, 1.0)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.5), (-4.0, -1.0), (1.0, 2.0)])
@pytest.mark.parametrize("signed", [False, True])
def test_a_spanning_grid_keeps_zero_and_moves_nothing_by_more_than_a_step(low, high, signed):
    grid = Grid.spanning(low, high, signed=signed)
    x = torch.linspace(low, high, 999)
    assert float(grid(torch.zeros(1))) == 0
    # The zero point is whole, so that the range shifts by half a step at most.
    assert float((grid(x) - x).abs().max()) <= 1.001 * float(grid.scale)


def test_rounding_twice_is_rounding_once():
    grid = Grid.spanning(-3.3, 5.1)
    once = grid(torch.randn(10000) * 4)
    assert torch.equal(grid(once), once)


def test_an_empty_range_keeps_its_zeros():
    assert torch.equal(Grid.spanning(0.0, 0.0)(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(DynamicGrid()(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(DynamicGrid(per_row=True)(torch.zeros(2, 3)), torch.zeros(2, 3))


def onnx_dynamic(x):
    """DynamicQuantizeLinear as the ONNX specification has it, then DequantizeLinear."""
    x = x.numpy().astype(np.float32)
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = (high - low) / np.float32(255)
    zero = np.clip(np.rint(np.float32(0) - low / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255)
    return torch.from_numpy((codes - zero).astype(np.float32) * scale)


@pytest.mark.parametrize("shift", [-9.0, -0.5, 0.0, 4.0])
def test_a_dynamic_grid_is_that_of_onnx(shift):
    x = torch.randn(6, 7, 8) + shift
    assert torch.equal(DynamicGrid()(x), onnx_dynamic(x))


def test_a_dynamic_grid_per_row_serves_each_row_alone():
    x = torch.randn(4, 3, 16) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    grid = DynamicGrid(per_row=True)
    for row, found in zip(x.flatten(0, 1), grid(x).flatten(0, 1), strict=True):
        scale = row.abs().max() / 127
        assert torch.equal(found, (row / scale).round() * scale)
    assert torch.equal(grid(x[:1]), grid(x)[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_scale_stays_float32_in_a_network_of_any_precision(dtype):
    grid = Grid.spanning(-1.0, 3.0).to(dtype)
    assert grid.scale.dtype == torch.float32
    x = torch.randn(50).to(dtype)
    assert grid(x).dtype == dtype
    assert torch.equal(grid(x), Grid.spanning(-1.0, 3.0)(x.float()).to(dtype))


@pytest.mark.parametrize("make", [lambda: Grid.spanning(-1, 1), DynamicGrid])
def test_gradients_pass_within_the_range_and_change_no_value(make):
    grid, x = make(), torch.linspace(-2, 2, 41)
    trained = x.clone().requires_grad_()
    out = grid(trained)
    assert torch.equal(out, grid(x))
    out.sum().backward()
    if isinstance(grid, Grid):
        inside = (x >= grid.range[0]) & (x <= grid.range[1])
        assert torch.equal(trained.grad, inside.float())


def test_what_is_no_grid_is_refused():
    for scale, zero, bits, said in [
        (0.0, 0, 8, "scale=0.0"),
        (math.nan, 0, 8, "one finite number above 0"),
        (torch.ones(2), 0, 8, "one finite number"),
        (1.0, 256, 8, "integers 0..255"),
        (1.0, 0, 9, "bits=9"),
    ]:
        with pytest.raises(OptionError, match=said):
            Grid(scale, zero, bits=bits, signed=False)


def test_a_grid_is_made_again_of_its_name_and_buffers():
    for grid in (Grid(0.5, -3, bits=4, signed=True), DynamicGrid(), DynamicGrid(per_row=True)):
        again = grid_from(grid.kind, dict(grid.named_buffers()))
        assert again.kind == grid.kind
        x = torch.randn(5, 6)
        assert torch.equal(again(x), grid(x))
    whole = {"scale": torch.tensor(1.0), "zero": torch.tensor(0, dtype=torch.int32)}
    for kind, tensors in [
        ("grid u9", whole),
        ("grid u8", whole | {"scale": torch.tensor(-1.0)}),
        ("grid u8", whole | {"zero": torch.tensor(0)}),
        ("grid u8", whole | {"scale": torch.ones(2)}),
        ("grid u8", {"scale": torch.tensor(1.0)}),
        ("dynamic grid", {"levels": torch.tensor(7.0)}),
    ]:
        with pytest.raises(ValueError, match=r"."):
            grid_from(kind, tensors)
