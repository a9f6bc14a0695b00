"""Permuting channels: outputs stay, more is kept, and nothing more can be gained by an exchange."""

import copy
import itertools

import pytest
import torch
from torch import nn

import stories
import zoo
from surgery.nets import Conv1D
from surgery.structures import NETS
from tersor.errors import OptionError, TaskError
from tersor.methods import run
from tersor.methods.masks import Pattern
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.transform import permute as module
from tersor.methods.transform.permute import Reader, exchanged, permute
from tersor.surgery import walk
from tersor.surgery.coupling import couple
from tersor.task import regression


def sizes(seed, outputs, count):
    """|weights| whose inputs differ in size."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, generator=generator).square()
    return torch.randn(outputs, count, generator=generator).abs() * scale


def reader(values, starts, span):
    return Reader(None, values.clone(), list(starts), span)


def kept(values, pattern):
    groups = values.double().reshape(len(values), -1, pattern.m)
    return float(groups.topk(pattern.n, dim=-1).values.sum())


@pytest.mark.parametrize(
    ("span", "n", "m"),
    [(1, 2, 4), (1, 4, 8), (1, 1, 4), (9, 2, 4), (3, 2, 4), (2, 3, 6), (6, 2, 4)],
)
def test_no_exchange_of_two_would_keep_more(span, n, m):
    count, pattern = 8 * m // m * 3, Pattern(n, m)
    before = sizes(0, 5, count * span)
    found = reader(before, range(0, count * span, span), span)
    order = exchanged([found], pattern)
    assert sorted(order) == list(range(count))
    columns = torch.tensor([unit * span + i for unit in order for i in range(span)])
    after = before[:, columns]
    assert torch.equal(found.sizes, after)
    best = kept(after, pattern)
    assert best >= kept(before, pattern)
    for one, other in itertools.combinations(range(count), 2):
        # Neighbours that share a group are left as they are.
        if (one + 1) * span > other * span // m * m:
            continue
        units = list(range(count))
        units[one], units[other] = other, one
        swapped = torch.tensor([unit * span + i for unit in units for i in range(span)])
        assert kept(after[:, swapped], pattern) <= best * (1 + 1e-5)


def test_four_channels_worked_by_hand():
    # 9 8 7 6 | 1 1 1 1 keeps 9 + 8 + 1 + 1 = 19. Two exchanges, of 7 and 6 with 1s, keep 30.
    found = reader(torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 1.0]]), range(8), 1)
    exchanged([found], Pattern(2, 4))
    assert kept(found.sizes, Pattern(2, 4)) == 30


@pytest.mark.parametrize("seed", range(3))
def test_small_layers_come_near_the_best_of_all_orders(seed):
    pattern, before = Pattern(1, 2), sizes(seed, 3, 6)
    best = max(kept(before[:, list(p)], pattern) for p in itertools.permutations(range(6)))
    found = reader(before, range(6), 1)
    exchanged([found], pattern)
    assert kept(found.sizes, pattern) >= 0.98 * best


@pytest.mark.parametrize("name", sorted(NETS.keys() - {"siamese", "recurrent"}))
@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_outputs_stay_whatever_the_network_is_built_of(name, pattern):
    torch.manual_seed(0)
    make, given = NETS[name]
    model = make().eval().requires_grad_(False)
    for site in walk(model):
        site.weight.mul_(torch.rand_like(site.weight).square())
    task = regression(calibration=given[0])
    done = permute(copy.deepcopy(model), task, pattern=pattern)
    outcome = done.recipe.steps[-1].outcome
    assert outcome["error"] < 1e-5
    assert outcome["kept_after"] >= outcome["kept_before"]


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_real_networks_answer_the_same_and_keep_more(pattern):
    for model, x in (
        (zoo.resnet20(), torch.randn(2, 3, 32, 32)),
        (zoo.stories260k(), stories.task().example(2)),
    ):
        task = regression(calibration=x) if x.is_floating_point() else stories.task()
        done = run(model, [{"method": "transform.permute", "options": {"pattern": pattern}}], task)
        outcome = done.recipe.steps[-1].outcome
        assert outcome["permuted"] > 0
        assert outcome["kept_after"] > outcome["kept_before"]
        with torch.no_grad():
            before, after = task.predict(model, x), task.predict(done, x)
        assert (before - after).abs().max() < 1e-5 * before.abs().max()
        for site, other in zip(walk(model), walk(done), strict=True):
            assert torch.equal(site.weight.flatten().sort()[0], other.weight.flatten().sort()[0])


def test_pruning_by_magnitude_keeps_what_the_outcome_says():
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(16, 8), nn.GELU(), Conv1D(4, 16)).eval().requires_grad_(False)
    net[2].weight *= torch.rand(16)[:, None].square()
    total = net[2].weight.abs().sum()
    permute(net, regression(calibration=torch.randn(8, 8)))
    outcome = net.recipe.steps[-1].outcome
    magnitude(net, sparsity="2:4", include="2")
    assert float(net[2].weight.abs().sum() / total) == pytest.approx(outcome["kept_after"])


def test_layers_that_are_excluded_hold_their_channels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    task = regression(calibration=torch.randn(8, 8))
    done = permute(copy.deepcopy(net).eval(), task, exclude="0")
    assert torch.equal(done[0].weight, net[0].weight)
    assert torch.equal(done[2].weight.sort(0)[0], net[2].weight.sort(0)[0])
    with pytest.raises(OptionError, match="nothing to permute"):
        permute(copy.deepcopy(net).eval(), task, exclude="2")


def test_what_would_change_an_output_is_taken_back(monkeypatch):
    # A coupling that has missed the bias of the first layer.
    def short(model, inputs):
        found = couple(model, inputs)
        for group in found.groups:
            for unit in group.units:
                del unit.slices["0.bias", 0]
        return found

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    before = copy.deepcopy(net.state_dict())
    monkeypatch.setattr(module, "couple", short)
    permute(net, regression(calibration=torch.randn(8, 8)))
    outcome = net.recipe.steps[-1].outcome
    assert (outcome["permuted"], outcome["error"]) == (0, 0)
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before)


def test_what_cannot_be_permuted_is_refused():
    with pytest.raises(TaskError, match=r"transform\.permute traces the network .*; pass a task"):
        permute(nn.Linear(8, 8))
    task = regression(calibration=torch.randn(8, 8))
    with pytest.raises(OptionError, match="nothing to permute"):
        permute(nn.Linear(8, 8).eval(), task)
    make, (steps,) = NETS["recurrent"]
    with pytest.raises(OptionError, match="nothing to permute"):
        permute(make().eval(), regression(calibration=steps))
    with pytest.raises(OptionError, match="pattern='4:4' keeps 4 of every 4"):
        permute(nn.Linear(8, 8).eval(), task, pattern="4:4")
    net = magnitude(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval())
    with pytest.raises(OptionError, match=r'"0\.weight" is held by a form already'):
        permute(net, task)
