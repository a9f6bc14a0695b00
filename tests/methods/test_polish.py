"""Polishing: the best values on any mask, towards what the original gives."""

import copy

import pytest
import torch
from torch import nn

from methods.pruned import inputs, task_for
from surgery.nets import NETS, make
from tersor.errors import OptionError, TaskError
from tersor.forms import Bitmask, NofM
from tersor.measure import divergence_of, reference_outputs
from tersor.methods import run
from tersor.methods.moments import DAMPING
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.methods.recover.polish import polish
from tersor.surgery import walk
from tersor.task import regression


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.3, 0.6, "1:2"])
def test_zeros_and_forms_stay_and_held_out_inputs_are_answered_no_worse(name, sparsity):
    task, original = task_for(name), make(name)[0]
    pruned = magnitude(make(name)[0], sparsity=sparsity)
    zeros = {site.name: site.weight == 0 for site in walk(pruned)}
    bits = [site.form.stored_bits() for site in walk(pruned)]
    held_out = task.holdout()
    answers = reference_outputs(original, task, held_out)
    before = divergence_of(pruned, task, held_out, answers)
    polish(pruned, task, original=original)
    outcome = pruned.recipe.steps[-1].outcome
    assert outcome["layers"] == len(zeros)
    assert outcome["divergence_before"] == pytest.approx(before)
    after = divergence_of(pruned, task, held_out, answers)
    assert after == pytest.approx(min(before, outcome["divergence_after"]), rel=1e-5)
    for site in walk(pruned):
        assert isinstance(site.form, NofM if sparsity == "1:2" else Bitmask)
        assert torch.equal(site.weight == 0, zeros[site.name])
    assert [site.form.stored_bits() for site in walk(pruned)] == bits


def test_equals_least_squares_row_by_row_towards_the_original():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).requires_grad_(False)
    x, held_out = torch.randn(200, 8), torch.randn(50, 8)
    pruned = magnitude(copy.deepcopy(original), sparsity=0.5)
    keep = [pruned[i].weight != 0 for i in (0, 2)]
    polish(pruned, regression(calibration=x, holdout=held_out), original=original)
    assert pruned.recipe.steps[-1].outcome["kept"]
    here = there = x
    for layer, mask in ((0, keep[0]), (2, keep[1])):
        weight = original[layer].weight
        damping = DAMPING * here.square().mean()
        for row in range(len(weight)):
            kept = mask[row]
            # min |here w - there w0|^2 / n + damping |w - w0|^2 over the weights that stay.
            moments = here[:, kept].T @ here / len(here)
            pulls = here[:, kept].T @ (there @ weight[row]) / len(here)
            pulls += damping * weight[row][kept]
            system = moments[:, kept] + damping * torch.eye(int(kept.sum()))
            expected = torch.linalg.solve(system, pulls)
            assert torch.allclose(pruned[layer].weight[row][kept], expected, atol=1e-5)
        here, there = (
            net[layer + 1 : layer + 2](net[layer](x))
            for net, x in ((pruned, here), (original, there))
        )


def test_one_output_worked_by_hand():
    # y = x0 + x1 with x0 = x1: without x1, twice x0 gives the same, but for the damping of
    # 0.01 * 1: (1 * 2 + 0.01 * 1) / 1.01.
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.9]])
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    pruned = magnitude(copy.deepcopy(layer), sparsity=0.5)
    polish(pruned, regression(calibration=x, holdout=x), original=layer)
    assert torch.allclose(pruned.weight, torch.tensor([[(1.9 + 0.01) / 1.01, 0.0]]))


def test_values_that_help_nobody_are_taken_back():
    # Held-out inputs that are nothing like those calibrated on.
    torch.manual_seed(0)
    original = nn.Linear(8, 4)
    pruned = magnitude(copy.deepcopy(original), sparsity=0.5)
    before = pruned.weight.clone()
    common = torch.randn(64, 1)
    task = regression(calibration=common.expand(64, 8), holdout=torch.randn(64, 8))
    polish(pruned, task, original=original)
    assert pruned.recipe.steps[-1].outcome["kept"] is False
    assert torch.equal(pruned.weight, before)


def test_channels_that_changed_places_find_their_originals():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[0].weight *= torch.tensor([5.0] * 4 + [0.2] * 12)[:, None]
        net[2].weight *= torch.tensor([5.0] * 4 + [0.2] * 12)
    task = regression(calibration=torch.randn(256, 8), holdout=torch.randn(64, 8))
    steps = ["transform.permute", "prune.magnitude", "recover.polish"]
    options = {"prune.magnitude": {"sparsity": "2:4"}}
    done = run(net, [{"method": s, "options": options.get(s, {})} for s in steps], task)
    assert done.recipe.steps[0].outcome["permuted"] == 1
    outcome = done.recipe.steps[-1].outcome
    assert outcome["divergence_after"] < 0.8 * outcome["divergence_before"]


def test_excluded_and_quantized_weights_stay():
    task, original = task_for("linear"), make("linear")[0]
    pruned = magnitude(make("linear")[0], sparsity=0.5)
    rtn(pruned, include="2")
    before = pruned[2].weight.clone()
    polish(pruned, task, original=original)
    assert pruned.recipe.steps[-1].outcome["layers"] == 1
    assert torch.equal(pruned[2].weight, before)


def test_what_cannot_be_polished_is_refused():
    original = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    task = regression(calibration=torch.randn(64, 8), holdout=torch.randn(16, 8))
    pruned = magnitude(copy.deepcopy(original), sparsity=0.5)
    with pytest.raises(TaskError, match=r"recover\.polish needs inputs .*; pass a task"):
        polish(pruned, original=original)
    with pytest.raises(OptionError, match=r"recover\.polish compares with another network"):
        polish(pruned, task)
    with pytest.raises(OptionError, match="holds no pruned weight that is not quantized"):
        polish(copy.deepcopy(original), task, original=original)
    other = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).eval()
    with pytest.raises(OptionError, match=r"'0\.weight' has shape \(8, 8\) .* and shape \(6, 8\)"):
        polish(pruned, task, original=other)


def test_the_original_stays_as_it_is():
    task, original = task_for("linear"), make("linear")[0]
    before = copy.deepcopy(original.state_dict())
    polish(magnitude(make("linear")[0], sparsity=0.5), task, original=original)
    assert all(torch.equal(original.state_dict()[key], before[key]) for key in before)
    assert original(inputs("linear", 2, 0)).isfinite().all()
