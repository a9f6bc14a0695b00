"""The rounded form: what it gives, what its gradients are, and what it freezes to."""

import math

import pytest
import torch

from tersor.errors import OptionError
from tersor.forms import Rounded, Trellis


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 4), 0), ((4, 6), 1), ((5,), None), ((3, 2, 2), 0)]
)
def test_it_gives_whole_steps_and_freezes_to_the_same(shape, axis):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    form = Rounded.encode(weight, step=0.25, axis=axis)
    assert torch.allclose(form.dense(), (weight / 0.25).round() * 0.25)
    with torch.no_grad():
        form.drift.fill_(0.05)
    assert float(form.step.detach()) == pytest.approx(0.25 * math.exp(0.5))
    frozen = form.freeze()
    assert isinstance(frozen, Trellis)
    assert torch.equal(frozen.dense(), form.dense())


def test_gradients_go_straight_through_and_to_the_step_as_in_lsq():
    weight = torch.tensor([[0.3, -0.8, 1.1]])
    form = Rounded.encode(weight, step=0.5)
    pull = torch.tensor([[1.0, 2.0, -3.0]])
    (form.dense() * pull).sum().backward()
    assert torch.allclose(form.latent.grad, pull)
    levels = weight / 0.5
    by_step = (pull * (levels.round() - levels)).sum()
    # d step / d drift = 10 step
    assert float(form.drift.grad) == pytest.approx(float(by_step) * 10 * 0.5, rel=1e-5)


def test_an_axis_that_is_none_is_refused():
    with pytest.raises(OptionError, match="axis"):
        Rounded.encode(torch.zeros(2, 2), step=1.0, axis=2)
