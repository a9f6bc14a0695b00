"""SparseGPT: as the paper defines it, one column after the other."""

import pytest
import torch
from torch import nn

from methods.pruned import damped, problem, task_for
from surgery.nets import NETS, make
from tersor.errors import OptionError, TaskError
from tersor.forms import Bitmask, NofM
from tersor.forms.form import rows
from tersor.methods.columns import Problem
from tersor.methods.masks import Pattern
from tersor.methods.moments import Metric
from tersor.methods.prune import sparsegpt as module
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.prune.sparsegpt import fed_forward, sparsegpt
from tersor.methods.prune.wanda import wanda
from tersor.surgery import walk
from tersor.task import regression


def naively(given, goal, order, block):
    """Algorithm 1: the inverse of the moments of the columns left gives scores and updates."""
    weight, moments = given.target.clone(), damped(given)
    zeros = torch.zeros_like(weight, dtype=torch.bool)
    removed = 0
    for first in range(0, len(order), block):
        columns = order[first : first + block]
        pivots = []
        for at in range(first, first + len(columns)):
            left = order[at:]
            pivots.append(torch.linalg.inv(moments[left][:, left])[0, 0])
        scores = weight[:, columns].square() / torch.stack(pivots)
        if isinstance(goal, Pattern):
            gone = scores.argsort(1)[:, : goal.m - goal.n]
            zeros[:, columns] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, gone, True)
        else:
            # Of everything so far this share, to the weight.
            count = round(goal * len(weight) * (first + len(columns))) - removed
            gone = torch.zeros(scores.numel(), dtype=torch.bool)
            gone[scores.flatten().argsort()[:count]] = True
            zeros[:, columns] = gone.view(scores.shape)
            removed += count
        for at in range(first, first + len(columns)):
            left = order[at:]
            inverse = torch.linalg.inv(moments[left][:, left])
            error = torch.where(zeros[:, order[at]], weight[:, order[at]], 0) / inverse[0, 0]
            weight[:, left] -= error[:, None] * inverse[0][None]
            weight[:, order[at]].masked_fill_(zeros[:, order[at]], 0)
    return weight.masked_fill(zeros, 0)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("block", [1, 7, 16, 40])
def test_equals_the_paper_column_by_column(sparsity, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    given = problem(12, 40)
    # The last columns of the order come first, and blocks are cut off from there.
    order = given.metric.order.flip(0).tolist()
    expected = naively(given, sparsity, order, block)
    found = fed_forward(given, sparsity)
    assert torch.equal(found == 0, expected == 0)
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2), (3, 5)])
def test_a_pattern_equals_the_paper_group_by_group(n, m):
    given, goal = problem(12, 40), Pattern(n, m)
    groups = given.metric.energies.view(-1, m).sum(1).argsort(descending=True)
    order = [int(g) * m + i for g in groups for i in reversed(range(m))]
    found = fed_forward(given, goal)
    assert torch.allclose(found, naively(given, goal, order, m), atol=1e-9)
    assert ((found.view(12, -1, m) != 0).sum(2) == n).all()


def test_two_columns_worked_by_hand():
    # Moments [[1, 0.5], [0.5, 1]], weight [1, 2]: the column dealt with first is kept or goes for
    # w^2 * (1 - 0.25) = 0.75 or 3, the other for w^2 * 1. One of two goes: the first, and the
    # other takes 0.5 * 1 over.
    given = Problem(torch.tensor([[1.0, 2.0]]), Metric(torch.tensor([[1.0, 0.5], [0.5, 1.0]])))
    order = given.metric.order.tolist()
    assert order == [0, 1]
    # Column 1 comes first here, and costs 2^2 * 0.75 = 3 against 1^2 * 1 = 1 of column 0.
    assert torch.allclose(fed_forward(given, 0.5), torch.tensor([[0.0, 2.0]]))
    other = Problem(torch.tensor([[2.0, 1.0]]), given.metric)
    # Now column 1 goes, and column 0 makes up for it: 2 + 0.5 * 1.
    assert torch.allclose(fed_forward(other, 0.5), torch.tensor([[2.5, 0.0]]))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83])
def test_each_layer_loses_the_fraction_asked_for(name, sparsity):
    net, _ = make(name)
    sparsegpt(net, task_for(name), sparsity=sparsity)
    for site in walk(net):
        assert isinstance(site.form, Bitmask)
        zeros = int((site.weight == 0).sum())
        # Each group of a grouped convolution is rounded for itself.
        assert abs(zeros - sparsity * site.weight.numel()) <= 1


@pytest.mark.parametrize("name", NETS)
def test_patterns_hold_wherever_they_fit(name):
    net, _ = make(name)
    sparsegpt(net, task_for(name), sparsity="1:2")
    for site in walk(net):
        assert isinstance(site.form, NofM)
        assert ((rows(site.weight, site.axis).reshape(-1, 2) != 0).sum(1) == 1).all()


def test_it_loses_less_than_what_moves_no_weight():
    given = problem(32, 64)
    pruned = fed_forward(given, 0.5)
    kept = given.target.masked_fill(pruned == 0, 0)
    assert given.error(pruned).sum() < 0.8 * given.error(kept).sum()


@pytest.mark.parametrize("first", [magnitude, wanda, sparsegpt])
def test_zeros_that_are_there_stay(first):
    net, task = make("linear")[0], task_for("linear")
    first(net, task, sparsity=0.3)
    gone = net[0].weight == 0
    sparsegpt(net, task, sparsity=0.6)
    assert (net[0].weight[gone] == 0).all()
    assert int((net[0].weight == 0).sum()) == round(0.6 * 48)
    once = net[0].weight.clone()
    # As many as asked for, or more.
    sparsegpt(net, task, sparsity=0.4)
    assert torch.equal(net[0].weight, once)


def test_zeros_that_happen_to_fit_a_pattern_are_stored_as_one():
    net, task = make("linear")[0], task_for("linear")
    magnitude(net, sparsity="1:2")
    for site in walk(net):
        site.hold(Bitmask.encode(site.weight))
    before = [site.weight.clone() for site in walk(net)]
    sparsegpt(net, task, sparsity="1:2")
    for site, weight in zip(walk(net), before, strict=True):
        assert isinstance(site.form, NofM)
        assert torch.equal(site.weight, weight)


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(TaskError, match=r"prune\.sparsegpt needs inputs .*; pass a task"):
        sparsegpt(nn.Linear(8, 8))
    task = regression(calibration=torch.randn(64, 2))
    with pytest.raises(OptionError, match=r"would remove every weight of 'weight' .*\(1, 2\)"):
        sparsegpt(nn.Linear(2, 1), task, sparsity=0.9)
