"""AWQ against its equations computed naively, on layers whose factors a norm can take."""

import pytest
import torch
from torch import Tensor, nn

import zoo
from tersor.errors import TaskError
from tersor.methods.quantize.awq import awq
from tersor.methods.ranges import levels_of
from tersor.surgery import walk
from tersor.task import classification, language_model


class Block(nn.Module):
    """Two layers behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.left(x) + self.right(x).relu()


def block() -> Block:
    torch.manual_seed(0)
    net = Block().eval()
    # Two channels carry nearly everything.
    net.norm.weight.data[[3, 12]] = 10.0
    return net


def inputs() -> Tensor:
    return torch.randn(200, 16, generator=torch.Generator().manual_seed(1))


def nearest(weight: Tensor, importance: Tensor) -> Tensor:
    levels = levels_of(weight, bits=3, group_size=8, symmetric=True, weights=importance)
    scale, zero = levels.spread(weight.shape[1])
    return levels.dense((weight / scale + zero).round().clamp(levels.low, levels.high))


def test_the_factors_are_those_of_least_error_over_all_that_are_tried():
    net, given = block(), inputs()
    with torch.no_grad():
        seen = net.norm(given)
    size = seen.square().mean(0).sqrt()
    tried = {}
    for alpha in [step / 20 for step in range(20)]:
        factor = size**alpha
        factor = factor / (factor.max() * factor.min()).sqrt()
        error = 0.0
        for layer in (net.left, net.right):
            weight = layer.weight.detach()
            rounded = nearest(weight * factor, (size / factor) ** 2) / factor
            error += (seen @ (rounded - weight).T).square().sum()
        tried[alpha] = error, factor
    best = min(tried.values(), key=lambda pair: pair[0])[1]
    before = net.norm.weight.detach().clone()
    done = awq(
        net, classification(calibration=given, holdout=given[:8]), bits=3, group_size=8, samples=200
    )
    assert done.recipe.steps[0].outcome["folded"] == 1
    assert torch.allclose(done.norm.weight, before / best, rtol=1e-4)
    assert not torch.allclose(best, torch.ones(16))


def test_outputs_come_nearer_than_by_ranges_alone():
    net, given = block(), inputs()
    with torch.no_grad():
        wanted, seen = net(given), net.norm(given)
        plain = block()
        for layer in (plain.left, plain.right):
            layer.weight.data = nearest(layer.weight.data, seen.square().mean(0))
        done = awq(net, classification(calibration=given, holdout=given[:8]), bits=3, group_size=8)
        errors = [(m(given) - wanted).square().mean() for m in (done, plain)]
    # Ranges that are weighed by the inputs' energy win most of it already; measured: 0.81.
    assert errors[0] < 0.9 * errors[1]


def test_a_language_model_of_today_takes_most_factors(shared_data):
    net, ids = zoo.stories260k(), zoo.story_ids(12)
    task = language_model(test=ids[:4], calibration=ids[4:])
    done = awq(net, task, bits=4, group_size=32)
    outcome = done.recipe.steps[0].outcome
    # In each of five blocks those of query, key and value, of gate and up, of down.
    assert outcome["folded"] >= 10
    assert outcome["error"] < 1e-4
    assert all(site.form is not None for site in walk(done))


def test_without_data_it_is_refused():
    with pytest.raises(TaskError, match=r"quantize\.awq needs inputs"):
        awq(block())
