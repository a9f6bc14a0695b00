"""Passes side by side: each halts once at a weight, all see what was changed, errors end them."""

import threading

import pytest
import torch
from torch import nn

from tersor.measure.lockstep import lockstep
from tersor.surgery.walk import walk


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def batches(n=3):
    return list(torch.randn(n, 5, 4, generator=torch.Generator().manual_seed(1)))


def run(model, inputs, arrived, passes=None):
    sites = list(walk(model))
    passes = passes or [lambda x=x: model(x) for x in inputs]
    with torch.no_grad():
        lockstep(passes, [sites] * len(passes), arrived, None)


def test_each_weight_is_met_once_with_what_all_passes_bring():
    model, inputs, met = net(), batches(), []

    def arrived(site, brought):
        met.append((site.name, {n: bring()[0] for n, bring in brought.items()}))

    run(model, inputs, arrived)
    assert [name for name, _ in met] == ["0.weight", "2.weight"]
    for n, x in enumerate(inputs):
        assert torch.equal(met[0][1][n], x)
        assert torch.equal(met[1][1][n], model[:2](x))


def test_what_was_changed_is_seen_by_what_comes_after():
    model, inputs, met = net(), batches(), {}

    def arrived(site, brought):
        met[site.name] = [bring()[0] for bring in brought.values()]
        site.weight.mul_(0 if site.name == "0.weight" else 1)

    run(model, inputs, arrived)
    # Nothing but the bias is left of the first layer.
    for found in met["2.weight"]:
        assert torch.equal(found, model[0].bias.relu().expand(5, 4))


def test_a_pass_that_takes_another_way_is_not_waited_for():
    model, inputs, met = net(), batches(2), []
    passes = [lambda: model(inputs[0]), lambda: model[2](inputs[1])]
    run(model, inputs, lambda site, brought: met.append((site.name, sorted(brought))), passes)
    assert met == [("0.weight", [0]), ("2.weight", [0, 1])]


@pytest.mark.parametrize("where", ["a pass", "arrived"])
def test_what_is_raised_ends_all_passes_and_arrives(where):
    model, inputs = net(), batches()
    before = threading.active_count()

    def arrived(site, brought):
        if where == "arrived":
            raise KeyError(site.name)

    def fails():
        model[0](inputs[0])
        raise KeyError("here")

    passes = [lambda: model(inputs[0]), fails if where == "a pass" else lambda: model(inputs[1])]
    with pytest.raises(KeyError, match=r"here|0\.weight"):
        run(model, inputs, arrived, passes)
    assert threading.active_count() == before
