"""Group sparsity: the penalty is the paper's, and units that are cut were empty before."""

import pytest
import torch
from torch import nn

from methods.trained import net, task
from tersor.errors import BudgetError, OptionError, TaskError
from tersor.methods import run
from tersor.methods.cut.group_lasso import Shrinking, group_lasso, pull
from tersor.methods.cut.removing import removable
from tersor.methods.prune.magnitude import magnitude
from tersor.surgery.proving import cuttable


class Residual(nn.Module):
    """Both convolutions write the same channels, which the norm scales and the last one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.last((x + self.norm(self.second(x))).relu()).mean((2, 3))


def shrinking(model: nn.Module, example: torch.Tensor) -> Shrinking:
    groups, _ = removable(model, cuttable(model, example), None, None)
    return Shrinking(groups, dict(model.named_parameters()), 1.0)


def by_the_paper(groups: list[list[list[torch.Tensor]]]) -> float:
    """Fang et al. 2023, section 3.3: groups of units of the parts that belong to each."""
    total = 0.0
    for units in groups:
        sizes = [sum((part**2).sum().item() for part in parts) for parts in units]
        for size in sizes:
            total += 2 ** (4 * (max(sizes) - size) / (max(sizes) - min(sizes))) * size
    return total


def test_the_penalty_of_two_layers_is_the_papers():
    model = net()
    found = shrinking(model, torch.randn(2, 32)).penalty(0).item()
    groups = [
        [
            [model[at].weight[k], model[at].bias[k], model[at + 2].weight[:, k]]
            for k in range(48)
        ]
        for at in (0, 2)
    ]  # fmt: skip
    assert found == pytest.approx(0.5 * by_the_paper(groups), rel=1e-4)


def test_the_penalty_of_a_sum_takes_all_that_belongs_together():
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2.0)
        model.norm.bias.uniform_(-1.0, 1.0)
    found = shrinking(model, torch.randn(2, 1, 6, 6)).penalty(0).item()
    first, second, norm, last = model.first, model.second, model.norm, model.last
    units = [
        [
            *(first.weight[k], first.bias[k], second.weight[k], second.bias[k]),
            *(second.weight[:, k], norm.weight[k], norm.bias[k], last.weight[:, k]),
        ]
        for k in range(4)
    ]
    assert found == pytest.approx(0.5 * by_the_paper([units]), rel=1e-4)


def test_pull_worked_by_hand():
    # Sizes 1, 3, 5: the smallest is pulled 16 times, the one in the middle 4 times as much.
    assert pull(torch.tensor([1.0, 3.0, 5.0])).tolist() == [16.0, 4.0, 1.0]
    assert pull(torch.ones(3)).tolist() == [1.0] * 3


def test_the_gradient_is_gamma_times_the_weight():
    model = net()
    groups, _ = removable(model, cuttable(model, torch.randn(2, 32)), None, None)
    regime = Shrinking(groups, dict(model.named_parameters()), 0.5)
    model.requires_grad_(True).zero_grad()
    regime.penalty(0).backward()
    for group, sizes in zip(groups, regime.sizes(), strict=True):
        bias = model.get_parameter(group.name.replace("weight", "bias"))
        order = [unit.slices[group.name, 0][0] for unit in group.group.units]
        gamma = pull(sizes.detach())
        assert torch.allclose(bias.grad[order], 0.5 * gamma * bias.detach()[order], rtol=1e-4)


def test_units_are_empty_before_they_are_cut_and_answers_stay():
    model, data = net(), task()
    lasso = {"keep": 0.4, "epochs": 20, "rate": 3e-3, "penalty": 0.01}
    done = run(model, [{"method": "cut.group_lasso", "options": lasso}], data)
    options = {"keep": 0.4, "criterion": "group_norm", "merge": False}
    once = run(model, [{"method": "cut.channels", "options": options}], data)
    found, cut = (data.evaluate(m)["accuracy"] for m in (done, once))
    assert found > cut + 3
    outcome = done.recipe.steps[-1].outcome
    assert outcome["after"] <= 0.4 * outcome["before"]
    assert outcome["kept"].keys() == {"0.weight", "2.weight"}
    assert done[0].weight.shape[0] < 48


def test_excluded_layers_are_neither_cut_nor_trained():
    model, before = net(), net()
    group_lasso(model, task(), keep=0.9, epochs=1, exclude="4")
    assert model[0].weight.shape[0] < 48
    assert torch.equal(model[4].weight, before[4].weight)
    assert torch.equal(model[4].bias, before[4].bias)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(TaskError, match=r"cut\.group_lasso needs inputs to train on; pass a task"):
        group_lasso(net())
    with pytest.raises(OptionError, match=r'"0.weight" of shape \(48, 32\) is held as bitmask'):
        group_lasso(magnitude(net()), task())
    with pytest.raises(BudgetError, match=r"keep=0.001: at most \d+% of the macs can be cut"):
        group_lasso(net(), task(), keep=0.001, epochs=1)
