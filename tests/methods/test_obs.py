"""Optimal Brain Surgeon: each removal is exact, and the cheapest there is."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.pruned import damped, inputs, problem, task_for
from surgery.nets import NETS, make
from tersor.errors import OptionError, TaskError
from tersor.forms import Bitmask, NofM
from tersor.forms.form import rows
from tersor.measure import divergence_of, reference_outputs
from tersor.methods.columns import Problem
from tersor.methods.masks import Pattern
from tersor.methods.moments import Metric
from tersor.methods.prune import obs as module
from tersor.methods.prune.obs import least_removed, obs, removals
from tersor.methods.prune.sparsegpt import fed_forward, sparsegpt
from tersor.methods.support import least_squares
from tersor.surgery import walk
from tersor.task import regression


def solved(target, moments, keep):
    """The best values of the weights kept of one output, from the normal equations."""
    found = torch.zeros_like(target)
    found[keep] = torch.linalg.solve(moments[keep][:, keep], (moments @ target)[keep])
    return found


def naively(target, moments, steps, allowed=lambda gone: [True] * len(gone)):
    """One output: tries every removal, solving anew for all others, and takes the cheapest."""
    gone = [False] * len(target)
    order, losses, before = [], [], 0.0
    for _ in range(steps):
        best = None
        for j, may in enumerate(allowed(gone)):
            if gone[j] or not may:
                continue
            keep = torch.tensor([not g for g in gone])
            keep[j] = False
            error = target - solved(target, moments, keep)
            cost = float(error @ moments @ error)
            if best is None or cost < best[0]:
                best = cost, j
        gone[best[1]] = True
        order.append(best[1])
        losses.append(best[0] - before)
        before = best[0]
    return order, losses


@pytest.mark.parametrize("seed", range(5))
def test_removing_one_weight_equals_solving_for_the_others(seed):
    given = problem(6, 20, seed)
    moments = damped(given)
    order, losses = removals(given, 1 / 20)
    pruned = least_removed(given, 1 / 20)
    inverse = torch.linalg.inv(moments)
    for row, (w, j) in enumerate(zip(given.target, order[:, 0].tolist(), strict=True)):
        # Equation 5 of the paper: the cost w^2 / [H^-1]_jj and the update.
        costs = w.square() / inverse.diagonal()
        assert j == int(costs.argmin())
        assert float(losses[row, 0]) == pytest.approx(float(costs[j]), rel=1e-6)
        updated = w - inverse[:, j] * w[j] / inverse[j, j]
        keep = torch.arange(20) != j
        assert torch.allclose(updated[keep], solved(w, moments, keep)[keep], rtol=0, atol=1e-6)
    gone = (pruned == 0).nonzero().tolist()
    # The whole layer loses as many as it has rows here, from those that lose least.
    assert len(gone) == 6
    for row in range(6):
        expected = solved(given.target[row], moments, pruned[row] != 0)
        assert torch.allclose(pruned[row], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [1, 3, 32])
def test_equals_trying_every_removal(block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    given = problem(5, 12)
    order, losses = removals(given, 0.5)
    for row in range(5):
        expected, costs = naively(given.target[row], damped(given), 12)
        assert order[row].tolist() == expected
        assert torch.allclose(
            losses[row], torch.tensor(costs).double().cummax(0).values, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 6)])
def test_a_pattern_equals_trying_every_removal_it_allows(n, m):
    def allowed(gone):
        full = [sum(gone[g : g + m]) >= m - n for g in range(0, 12, m)]
        return [not full[j // m] for j in range(12)]

    given, goal = problem(4, 12), Pattern(n, m)
    order, _ = removals(given, goal)
    found = least_removed(given, goal)
    for row in range(4):
        expected, _ = naively(given.target[row], damped(given), 12 // m * (m - n), allowed)
        assert order[row].tolist() == expected
    assert ((found.view(4, -1, m) != 0).sum(2) == n).all()


def test_rows_compete_by_what_they_lose():
    # Inputs apart from each other: costs are squares. 1 2 | 3 4 at a half loses 1 and 4.
    given = Problem(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Metric(torch.eye(2)))
    assert least_removed(given, 0.5).tolist() == [[0.0, 0.0], [3.0, 4.0]]


def test_two_inputs_worked_by_hand():
    # H = [[2, 1], [1, 1]], w = [1, 1]: H^-1 = [[1, -1], [-1, 2]], costs 1 / 1 and 1 / 2. The second
    # goes, and the first becomes 1 - (-1) * 1 / 2 = 1.5; without it too w H w = 5 are lost in all.
    given = Problem(torch.tensor([[1.0, 1.0]]), Metric(torch.tensor([[2.0, 1.0], [1.0, 1.0]])))
    order, losses = removals(given, 0.5)
    assert order.tolist() == [[1, 0]]
    assert torch.allclose(losses, torch.tensor([[0.5, 4.5]]))
    assert torch.allclose(least_removed(given, 0.5), torch.tensor([[1.5, 0.0]]))


@pytest.mark.parametrize("few", [1, 3, 100])
def test_least_squares_solves_each_row_on_its_own_weights(few, monkeypatch):
    monkeypatch.setattr("tersor.methods.support._AT_ONCE", few * 20**2)
    given = problem(9, 20)
    keep = torch.rand(9, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    keep[3], keep[4] = False, True
    found = least_squares(replace(given, zeros=~keep))
    for row in range(9):
        assert torch.allclose(found[row], solved(given.target[row], damped(given), keep[row]))
    assert torch.allclose(found[4], given.target[4])


def test_it_loses_less_than_sparsegpt():
    for goal in (0.5, 0.7, Pattern(2, 4)):
        given = problem(32, 64)
        ours, theirs = least_removed(given, goal), fed_forward(given, goal)
        assert given.error(ours).sum() < 0.9 * given.error(theirs).sum()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, "1:2"])
def test_each_layer_loses_what_was_asked_for(name, sparsity):
    net, _ = make(name)
    obs(net, task_for(name), sparsity=sparsity)
    for site in walk(net):
        zero = rows(site.weight, site.axis) == 0
        if sparsity == "1:2":
            assert isinstance(site.form, NofM)
            assert (zero.reshape(-1, 2).sum(1) == 1).all()
        else:
            assert isinstance(site.form, Bitmask)
            assert abs(int(zero.sum()) - sparsity * zero.numel()) <= 1


@pytest.mark.parametrize("name", ["conv", "gru", "tied", "conv1d of gpt-2"])
def test_layers_compete_for_the_fraction_of_all(name):
    net, _ = make(name)
    obs(net, task_for(name), sparsity=0.4, scope="global")
    zeros = {site.name: int((site.weight == 0).sum()) for site in walk(net)}
    sizes = {site.name: site.weight.numel() for site in walk(net)}
    assert abs(sum(zeros.values()) - 0.4 * sum(sizes.values())) <= 1 + len(zeros)
    assert len({round(zeros[name] / sizes[name], 2) for name in zeros}) > 1


class Sum(nn.Module):
    """Two layers side by side, the second of which counts little."""

    def __init__(self, outputs: int, share: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.share = nn.Linear(16, 16), nn.Linear(16, outputs), share

    def forward(self, x):
        return self.a(x) + self.share * self.b(x)


def test_a_layer_that_matters_less_loses_more():
    net = Sum(16, 0.01)
    obs(net, regression(calibration=torch.randn(256, 16)), sparsity=0.3, scope="global")
    assert int((net.a.weight == 0).sum()) < 10
    assert int((net.b.weight == 0).sum()) > 140


def test_the_outputs_are_closer_than_with_sparsegpt():
    x = inputs("linear", 256, 3)
    task = task_for("linear")
    original = make("linear")[0]
    answers = reference_outputs(original, task, [x])
    lost = {}
    for technique in (sparsegpt, obs):
        net = technique(make("linear")[0], task, sparsity=0.4)
        lost[technique] = divergence_of(net, task, [x], answers)
    assert lost[obs] < lost[sparsegpt]


def test_zeros_that_are_there_stay():
    net, task = make("linear")[0], task_for("linear")
    obs(net, task, sparsity=0.3)
    gone = net[0].weight == 0
    obs(net, task, sparsity=0.6)
    assert (net[0].weight[gone] == 0).all()
    assert int((net[0].weight == 0).sum()) == round(0.6 * 48)


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(TaskError, match=r"prune\.obs needs inputs .*; pass a task"):
        obs(nn.Linear(8, 8))
    task = regression(calibration=torch.randn(64, 2))
    with pytest.raises(OptionError, match=r"would remove every weight of 'weight' .*\(1, 2\)"):
        obs(nn.Linear(2, 1), task, sparsity=0.9)
    net = Sum(1, 0.0)
    with pytest.raises(OptionError, match=r'every weight of \'b\.weight\' .* or scope="layer"'):
        obs(net, regression(calibration=torch.randn(64, 16)), sparsity=0.5, scope="global")
