"""Training with quantization: gradients are those of LSQ, and freezing changes nothing."""

import copy
import math

import pytest
import torch

from tersor.errors import OptionError
from tersor.forms import Affine, FakeAffine


def trained(shape, bits, group_size=None, axis=0, seed=0):
    """A form in the middle of training: its scales are not where they began."""
    generator = torch.Generator().manual_seed(seed)
    form = FakeAffine.encode(
        torch.randn(shape, generator=generator), bits=bits, group_size=group_size, axis=axis
    )
    with torch.no_grad():
        form.scale.mul_(1 + 0.3 * torch.rand(form.scale.shape, generator=generator))
    return form


def lsq_gradients(latent, scale, upstream, bits):
    """Esser et al. 2020, eqs. 3 and 5 and the gradient scale of section 2.2, weight by weight.

    One row with one scale. The weight passes the gradient inside the range only. The scale gets
    -v/s + round(v/s) inside and the limit outside, times 1 / sqrt(weights * top).
    """
    top = 2 ** (bits - 1) - 1
    of_latent, of_scale = [], 0.0
    for value, above in zip(latent, upstream, strict=True):
        level = value / scale
        if abs(level) < top:
            of_latent.append(above)
            of_scale += above * (round(level) - level)
        else:
            of_latent.append(0.0)
            of_scale += above * math.copysign(top, level)
    return of_latent, of_scale / math.sqrt(len(latent) * top)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_paper(bits):
    form = trained((3, 20), bits, seed=bits).double()
    form.latent.data, form.scale.data = form.latent.double(), form.scale.double()
    form.scale.data = form.scale.to(torch.bfloat16).double()
    upstream = torch.randn(3, 20, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (form.dense() * upstream).sum().backward()
    for row in range(3):
        of_latent, of_scale = lsq_gradients(
            form.latent[row].tolist(), form.scale[row].item(), upstream[row].tolist(), bits
        )
        assert form.latent.grad[row].tolist() == pytest.approx(of_latent, abs=1e-12)
        assert form.scale.grad[row].item() == pytest.approx(of_scale, rel=1e-6, abs=1e-9)


def test_weights_that_are_not_chosen_pass_as_they_are():
    # Fan et al. 2021, eq. 6: a weight of the chosen ones is rounded, any other is itself.
    form = trained((3, 20), 3)
    whole, latent = form.freeze().dense(), form.latent.detach().clone()
    form.chosen = torch.rand(3, 20, generator=torch.Generator().manual_seed(4)) < 0.3
    found, upstream = form.dense(), torch.arange(60.0).view(3, 20)
    for row in range(3):
        for at in range(20):
            wanted = whole if form.chosen[row, at] else latent
            assert found[row, at] == wanted[row, at]
    (found * upstream).sum().backward()
    assert torch.equal(form.latent.grad[~form.chosen], upstream[~form.chosen])
    with torch.no_grad():
        assert torch.equal(form.dense(), whole)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "group_size", "axis"),
    [((4, 33), None, 0), ((4, 33), 8, 0), ((6, 5), None, 1), ((3, 2, 3, 3), None, None)],
)
def test_freezing_changes_nothing(bits, shape, group_size, axis):
    form = trained(shape, bits, group_size, axis)
    frozen = form.freeze()
    assert isinstance(frozen, Affine)
    assert (frozen.dense() - form.dense()).abs().max() == 0.0
    assert frozen.stored_bits() == form.stored_bits()


def test_freezing_changes_nothing_in_a_hundred_thousand_groups():
    generator = torch.Generator().manual_seed(0)
    form = FakeAffine.encode(torch.randn(6144, 64, generator=generator), bits=4, group_size=4)
    assert torch.equal(form.freeze().dense(), form.dense())


def test_starting_scale_worked_by_hand():
    # 2 bits: top 1, so 2 * mean|w| / sqrt(1) = 2 * 2 = 4 for weights 1, -2, 3.
    form = FakeAffine.encode(torch.tensor([[1.0, -2.0, 3.0]]), bits=2)
    assert form.scale.item() == 4.0
    assert form.dense().tolist() == [[0.0, 0.0, 4.0]]


def test_training_lowers_the_error_it_is_trained_on():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 64, generator=generator)
    # Correlated inputs: then rounding one weight up can make good for rounding another down.
    inputs = torch.randn(256, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    form = FakeAffine.encode(target, bits=3)

    def loss():
        return (inputs @ (form.dense() - target).T).square().mean()

    before = copy.deepcopy(form), loss().item()
    optimizer = torch.optim.Adam(form.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        step = loss()
        step.backward()
        optimizer.step()
    assert loss().item() < 0.5 * before[1]
    assert not torch.equal(form.scale, before[0].scale)


def test_one_bit_is_refused():
    with pytest.raises(OptionError, match=r"bits=1 .* training needs 2 to 8"):
        FakeAffine.encode(torch.ones(2, 3), bits=1)


def test_a_scale_that_a_step_took_below_zero_counts_by_its_size():
    form, other = trained((3, 20), 3), trained((3, 20), 3)
    with torch.no_grad():
        other.scale[1] *= -1
    assert torch.equal(other.dense(), form.dense())
    assert torch.equal(other.freeze().dense(), form.freeze().dense())
    assert (other.freeze().scale > 0).all()
    (form.dense()[1].square().sum() + other.dense()[1].square().sum()).backward()
    assert torch.equal(other.scale.grad[1], -form.scale.grad[1])
