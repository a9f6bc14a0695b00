"""Wanda: each output loses what adds least to it."""

import pytest
import torch
from torch import nn

from methods.pruned import inputs, task_for
from surgery.nets import NETS, make
from tersor.errors import OptionError, TaskError
from tersor.forms.form import rows
from tersor.methods import run
from tersor.methods.prune.wanda import wanda
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk
from tersor.task import classification, regression


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83])
def test_each_output_loses_the_fraction_asked_for_and_nothing_moves(name, sparsity):
    net, _ = make(name)
    before = {site.name: rows(site.weight, site.axis).clone() for site in walk(net)}
    wanda(net, task_for(name), sparsity=sparsity)
    for site in walk(net):
        after = rows(site.weight, site.axis)
        zero = after == 0
        assert (zero.sum(1) == round(sparsity * after.shape[1])).all()
        assert torch.equal(after[~zero], before[site.name][~zero])


@pytest.mark.parametrize("name", ["linear", "conv", "attention", "conv1d of gpt-2"])
def test_n_of_every_m_stay(name):
    net, _ = make(name)
    wanda(net, task_for(name), sparsity="1:2")
    for site in walk(net):
        groups = rows(site.weight, site.axis).reshape(-1, 2)
        assert ((groups != 0).sum(1) == 1).all()


def test_equals_scores_computed_weight_by_weight():
    # The second layer is scored by what the pruned first one gives.
    net, x = make("linear")[0].requires_grad_(False), inputs("linear", 64, 1)
    first, second = net[0].weight.clone(), net[2].weight.clone()
    wanda(net, task_for("linear"), sparsity=0.5)
    seen = x.reshape(-1, 8)
    for weight, layer in ((first, net[0]), (second, net[2])):
        expected = weight.clone()
        for i in range(len(weight)):
            scores = [
                abs(float(weight[i, j])) * float(seen[:, j].norm()) for j in range(weight.shape[1])
            ]
            for j in sorted(range(len(scores)), key=scores.__getitem__)[: len(scores) // 2]:
                expected[i, j] = 0
        assert torch.equal(layer.weight, expected)
        seen = (seen @ layer.weight.T + layer.bias).relu()


def test_one_output_worked_by_hand():
    # |w| * |x|: 3 * 1 = 3 against 1 * 4 = 4, so that the larger weight goes.
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[3.0, 1.0]])
    wanda(layer, regression(calibration=torch.tensor([[1.0, 4.0], [-1.0, -4.0]])))
    assert layer.weight.tolist() == [[0.0, 1.0]]


def test_zeros_that_are_there_go_first():
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    task = regression(calibration=torch.randn(64, 8))
    wanda(net, task, sparsity=0.25)
    gone = net[0].weight == 0
    wanda(net, task, sparsity=0.5)
    assert (net[0].weight[gone] == 0).all()
    assert int((net[0].weight == 0).sum()) == 16


def test_what_cannot_be_pruned_is_refused_and_nothing_is_changed():
    task = classification(calibration=torch.randn(64, 8))
    with pytest.raises(TaskError, match=r"prune\.wanda needs inputs .*; pass a task"):
        wanda(nn.Linear(8, 8))
    with pytest.raises(
        OptionError, match=r"would remove every weight of 'weight' of shape \(4, 2\)"
    ):
        wanda(nn.Linear(2, 4), task, sparsity=0.95)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)).eval()
    rtn(net, include="1")
    with pytest.raises(OptionError, match=r"'1.weight' of shape \(6, 8\) is stored as affine"):
        wanda(net, task)
    assert type(net[0]) is nn.Linear
    with pytest.raises(OptionError, match=r"'2:4' fits none of the 1 weights: .* its 6 inputs"):
        wanda(nn.Linear(6, 6), task, sparsity="2:4")


@pytest.mark.parametrize("method", ["prune.sparsegpt", "prune.obs"])
@pytest.mark.parametrize("sparsity", [0.5, 0.95])
def test_groups_of_a_convolution_share_what_a_layer_loses(method, sparsity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Flatten(), nn.Linear(576, 3)).eval()
    task = classification(calibration=torch.randn(64, 16, 8, 8))
    step = {"method": method, "options": {"sparsity": sparsity, "include": "0"}}
    zeros = int((run(model, [step], task)[0].weight == 0).sum())
    assert zeros == round(sparsity * 144)


@pytest.mark.parametrize(("inputs", "sparsity"), [(2, 0.8), (1, 0.6)])
def test_rows_that_would_all_be_empty_are_refused(inputs, sparsity):
    model = nn.Sequential(nn.Linear(inputs, 20)).eval()
    with pytest.raises(OptionError, match="would remove every weight"):
        wanda(model, classification(calibration=torch.randn(64, inputs)), sparsity=sparsity)
