"""Batch norms that follow: outputs get their moments back, whatever the parameters stand for."""

import copy

import pytest
import torch
from torch import nn

from tersor.measure import reference_outputs
from tersor.measure.channels import Channels, channels, norms_of
from tersor.methods.norms import Original, correct, matched
from tersor.methods.quantize.entropy import entropy
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import held
from tersor.surgery.fold import absorb_statistics
from tersor.task import classification


def images(n, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.3


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)]
    made = nn.Sequential(*layers)
    for norm in (made[1], made[4]):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        for seed in range(30):
            made.train()(images(64, 100 + seed) * 1.5)
    return made.eval()


def task(batch_size=256):
    return classification(calibration=images(256, 1), holdout=images(128, 2), batch_size=batch_size)


def moments(model, place, x):
    """Mean and variance of each channel after the module at `place`."""
    with torch.no_grad():
        y = model[: place + 1](x).double().transpose(0, 1).flatten(1)
    return y.mean(1), y.var(1, correction=0)


def test_sums_of_batches_are_those_of_the_whole():
    x = images(10) * 2 - 1
    both = Channels.of(x[:3]) + Channels.of(x[3:])
    flat = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(both.mean, flat.mean(1))
    assert torch.allclose(both.variance, flat.var(1, correction=0))


def test_one_channel_worked_by_hand():
    # The original sees 0 and 4 and makes (0 - 3) / 4 and (4 - 3) / 4 of them: mean -1/4, variance
    # 1/4. Of 1 and 3, with mean 2 and variance 1, the same come with variance 4 and mean 2.5.
    seen, wanted = (
        Channels.of(torch.tensor([[v] for v in pair])) for pair in ((1.0, 3.0), (0.0, 4.0))
    )
    one = torch.ones(1, dtype=torch.float64)
    mean, variance = matched((3 * one, 16 * one), seen, wanted, 0.0)
    assert (mean.item(), variance.item()) == pytest.approx((2.5, 4.0))


@pytest.mark.parametrize("absorbed", [False, True])
def test_outputs_get_mean_and_variance_back(absorbed):
    original, data = net(), task()
    if absorbed:
        absorb_statistics(original)
    batches, held_out = data.calibration(256), data.holdout(256)
    known = Original(channels(original, data, batches), reference_outputs(original, data, held_out))
    small = rtn(copy.deepcopy(original), bits=2)
    done = correct(small, data, batches, held_out, known, matched, norms_of(small))
    assert done.kept
    for place in (1, 4):
        for got, wanted in zip(
            moments(small, place, batches[0]), moments(original, place, batches[0]), strict=True
        ):
            assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_a_dead_channel_stays_finite_and_keeps_its_variance():
    original, data = net(), task()
    batches, held_out = data.calibration(256), data.holdout(256)
    known = Original(channels(original, data, batches), reference_outputs(original, data, held_out))
    small = copy.deepcopy(original)
    small[3].weight.data[2] = 0
    before = small[4].running_var[2].item()
    correct(small, data, batches, held_out, known, matched, norms_of(small))
    assert small[4].running_var[2].item() == before
    assert torch.isfinite(small(images(4))).all()


@pytest.mark.parametrize("batch_size", [64, 256])
def test_quantizing_for_the_coder_corrects_and_leaves_no_statistics(batch_size):
    original, data = net(), task(batch_size)
    small, outcome = entropy.__wrapped__(copy.deepcopy(original), data, bits=1.5)
    assert outcome["corrected"] is True
    x = images(256, 1)
    for place in (1, 4):
        norm = small[place]
        assert not norm.running_mean.any()
        assert torch.equal(norm.running_var, torch.full((8,), 1 - norm.eps))
    # Scale and shift are on grids, and what rounding to those does is all that is left.
    forms = dict(held(small))
    scale, shift = (float(forms[f"1.{name}"].step) for name in ("weight", "bias"))
    off = (moments(small, 1, x)[0] - moments(original, 1, x)[0]).abs()
    assert (off <= 0.5 * (scale * moments(small, 0, x)[0].abs() + shift) + 1e-3).all()


def test_a_correction_that_does_not_help_leaves_scale_and_shift():
    original = net()
    # Calibration sees inputs that have nothing in common with the held-out ones.
    data = classification(calibration=images(16, 1) - 6, holdout=images(128, 2))
    _, outcome = entropy.__wrapped__(copy.deepcopy(original), data, bits=4.0)
    assert outcome["corrected"] is False


def test_without_batch_norms_nothing_is_said():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    _, outcome = entropy.__wrapped__(plain, task(), bits=3.0)
    assert "corrected" not in outcome
