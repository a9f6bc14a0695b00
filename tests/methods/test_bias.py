"""Bias correction: means go back to what they were, layer after layer, if that helps."""

import copy

import pytest
import torch
from torch import nn

from tersor.errors import OptionError, TaskError
from tersor.methods import run
from tersor.methods.quantize.rtn import rtn
from tersor.methods.recover.bias import bias
from tersor.task import classification

STEPS = [{"method": "quantize.rtn", "options": {"bits": 2}}, {"method": "recover.bias"}]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 6, bias=False), nn.Linear(6, 6),
    ).eval()  # fmt: skip


def images(n, seed):
    # Far from zero on average: quantized weights then shift every mean.
    return torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def task(batch_size=512, **given):
    given = {"calibration": images(128, 1), "holdout": images(64, 2)} | given
    return classification(batch_size=batch_size, **given)


def slow(model, original, x):
    """Nagel et al. 2019, appendix D: layer by layer, each with the network run anew."""
    model = copy.deepcopy(model)

    def mean(net, number):
        seen = []
        hook = net[number].register_forward_hook(lambda m, a, out: seen.append(out))
        net(x)
        hook.remove()
        return seen[0].mean([n for n in range(seen[0].dim()) if n != 1])

    for number in (0, 2, 6):
        with torch.no_grad():
            model[number].bias += mean(original, number) - mean(model, number)
    return model


def test_it_equals_correcting_layer_by_layer():
    model = rtn(net(), bits=2)
    expected = slow(model, net(), images(128, 1))
    done = bias(copy.deepcopy(model), task(), original=net())
    assert done.recipe.steps[-1].outcome["kept"]
    assert done.recipe.steps[-1].outcome["layers"] == 3
    for number in (0, 2, 6):
        assert torch.allclose(done[number].bias, expected[number].bias, atol=1e-5)


def test_several_batches_come_close_to_one():
    whole = run(net(), STEPS, task())
    parts = run(net(), STEPS, task(batch_size=32))
    for number in (0, 2, 6):
        gap = (whole[number].bias - parts[number].bias).abs().max()
        assert gap < 0.1 * (whole[number].bias - net()[number].bias).abs().max()


def test_what_does_not_help_is_taken_back():
    # Held-out inputs of another kind: means that were right for the others are wrong here.
    strange = task(holdout=-5 * images(64, 2))
    before = run(net(), STEPS[:1], strange)
    done = run(net(), STEPS, strange)
    outcome = done.recipe.steps[-1].outcome
    assert not outcome["kept"]
    assert outcome["divergence_after"] >= outcome["divergence_before"]
    for one, other in zip(before.parameters(), done.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_knows_what_equalizing_and_folding_did():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(32, 6),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[:4] *= 20
        for seed in range(20):
            model.train()(images(64, 50 + seed))
        recipe = [{"method": "transform.equalize"}, STEPS[0]]
        done = run(model.eval(), [*recipe, STEPS[1]], task())
        before = run(model, recipe, task())
    outcome = done.recipe.steps[-1].outcome
    assert outcome["layers"] == 3
    assert outcome["divergence_after"] < outcome["divergence_before"]
    assert outcome["kept"]
    # The first layer's mean is what it is in the equalized network, its norm folded.
    with torch.no_grad():
        equalized = run(model, recipe[:1], task())
        wanted, found, without = (
            m[0](images(128, 1)).mean((0, 2, 3)) for m in (equalized, done, before)
        )
    assert (found - wanted).norm() < 1e-3 * (without - wanted).norm()


def test_what_it_cannot_work_on_is_refused():
    model = rtn(net(), bits=2)
    with pytest.raises(TaskError, match="pass a task"):
        bias(model)
    with pytest.raises(OptionError, match="use run"):
        bias(model, task())
    bare = nn.Sequential(nn.Flatten(), nn.Linear(108, 2, bias=False)).eval()
    with pytest.raises(OptionError, match="no linear layer or convolution with a plain bias"):
        run(bare, STEPS, task())
