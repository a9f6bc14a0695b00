"""Learned grids: gradients are those of LSQ, and freezing changes nothing."""

import copy
import math
import pickle

import pytest
import torch

from tersor.errors import OptionError
from tersor.forms.grid import Grid
from tersor.forms.learned_grid import LearnedGrid


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lsq_gradients(values, scale, upstream, low, high, count):
    """Esser et al. 2020, eqs. 3 and 5 and the gradient scale of section 2.2, value by value."""
    of_values, of_scale = [], 0.0
    for value, above in zip(values, upstream, strict=True):
        level = value / scale
        inside = low < level < high
        of_values.append(above if inside else 0.0)
        of_scale += above * (round(level) - level if inside else (low if level <= low else high))
    return of_values, of_scale / math.sqrt(count * high)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_gradients_are_those_of_the_paper(bits, signed):
    grid = LearnedGrid(0.4, bits=bits, signed=signed)
    x = 2 * drawn((3, 20), seed=bits)
    x = (x if signed else x.abs()).requires_grad_()
    upstream = torch.randn(3, 20, generator=torch.Generator().manual_seed(9))
    (grid(x) * upstream).sum().backward()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    of_x, of_scale = lsq_gradients(
        x.flatten().tolist(), grid.scale.item(), upstream.flatten().tolist(), low, high, 20
    )
    assert x.grad.flatten().tolist() == pytest.approx(of_x, abs=1e-6)
    assert grid.scale.grad.item() == pytest.approx(of_scale, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_freezing_changes_nothing(bits, signed):
    for seed in range(20):
        x = 3 * drawn((64, 33), seed=seed)
        grid = LearnedGrid(0.01 + drawn((), seed=seed).abs(), bits=bits, signed=signed)
        frozen = grid.freeze()
        assert type(frozen) is Grid
        assert torch.equal(frozen(x), grid(x))


def test_first_scale_and_levels_worked_by_hand():
    # 2 bits unsigned: high 3, so 2 * 3 / sqrt(3) = 3.4641. Signed: high 1, so 2 * 3 = 6.
    assert LearnedGrid.starting(3.0, bits=2, signed=False).scale.item() == pytest.approx(3.4641016)
    grid = LearnedGrid.starting(3.0, bits=2, signed=True)
    assert grid(torch.tensor([-99.0, -4.0, 2.0, 3.5, 99.0])).tolist() == [-12, -6, 0, 6, 6]


def test_a_scale_that_training_drove_below_zero_counts_as_the_smallest():
    grid = LearnedGrid(0.5, bits=4, signed=False)
    grid.scale.data -= 1
    x = drawn((4, 4))
    assert torch.isfinite(grid(x)).all()
    assert torch.equal(grid.freeze()(x), grid(x))


def test_it_copies_pickles_and_keeps_its_type_in_half_precision():
    grid = LearnedGrid(0.5, bits=3, signed=True)
    x = drawn((5, 5))
    for twin in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
        assert torch.equal(twin(x), grid(x))
    assert grid.half().scale.dtype == torch.float32
    assert grid(x.half()).dtype == torch.float16


def test_what_is_no_grid_is_refused():
    with pytest.raises(OptionError, match="bits=1 for activations"):
        LearnedGrid(1.0, bits=1, signed=True)
