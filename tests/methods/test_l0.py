"""L0 regularization: gates are steered to the goal, cut exactly, and the rest goes on without."""

import math

import pytest
import torch
from torch import nn

from methods.pruned import task_for
from methods.trained import net, one_shot, task, zeros
from surgery.nets import make
from tersor.codec import load, save
from tersor.errors import OptionError, TaskError
from tersor.forms import Bitmask, HardConcrete, SoftMask
from tersor.methods import run
from tersor.methods.gating import Gating
from tersor.methods.prune.l0 import l0
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk
from tersor.train import TrainingLog


def gated(sizes: dict[str, float], openness: float) -> nn.Module:
    """One layer of 2 x 3 weights behind gates."""
    model = nn.Sequential(nn.Linear(3, 2))
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    form = HardConcrete(weight, torch.full((2, 3), openness))
    form.openness.data[0, 0] = sizes.get("first", openness)
    walk(model)[0].hold(form)
    return model


def gating(model: nn.Module, sparsity: float, steps: int) -> Gating:
    regime = Gating(walk(model), sparsity, torch.Generator().manual_seed(0))
    regime.begin(model, steps)
    return regime


@pytest.mark.parametrize("name", ["linear", "conv", "lstm", "attention", "tied", "weight norm"])
def test_exactly_the_fraction_asked_for_becomes_zero(name):
    done = l0(make(name)[0], task_for(name), sparsity=0.3, epochs=2)
    sites = walk(done)
    assert all(isinstance(site.form, Bitmask) for site in sites)
    counts = sum(site.weight.numel() for site in sites)
    zero = sum(int((site.weight == 0).sum()) for site in sites)
    assert zero == round(0.3 * counts)
    assert done.recipe.steps[-1].outcome["sparsity"] == zero / counts


def test_whole_rows_go_and_no_more_than_asked_for():
    done = l0(net(), task(), sparsity=0.5, unit="row", epochs=4)
    outcome, removed = done.recipe.steps[-1].outcome, 0
    for site in walk(done):
        zero = (site.weight == 0).sum(1)
        assert set(zero.tolist()) <= {0, site.weight.shape[1]}
        removed += int(zero.sum())
    size = sum(site.weight.numel() for site in walk(done))
    # The longest row has 48 weights, so that fewer than that are missing.
    assert 0.5 * size - 48 < removed <= 0.5 * size
    assert outcome["sparsity"] == removed / size


def test_the_penalty_worked_by_hand():
    # In the first of 100 steps with gates (of 167) the goal is 0.6 / 50; the multipliers are 2, 3.
    model = gated({}, 1.0)
    regime = gating(model, 0.6, 167)
    regime._multipliers = [2.0, 3.0]
    closed = 1 - 1 / (1 + math.exp(-1.0 + (2 / 3) * math.log(0.1 / 1.1)))
    gap = 0.6 / 50 - closed
    assert regime.penalty(0).item() == pytest.approx(2 * gap + 3 * gap**2, rel=1e-4)
    # Behind half of the way it is the whole goal.
    gap = 0.6 - closed
    assert regime.penalty(49).item() == pytest.approx(2 * gap + 3 * gap**2, rel=1e-4)
    assert regime.penalty(80).item() == pytest.approx(2 * gap + 3 * gap**2, rel=1e-4)


def test_the_penalty_alone_closes_as_many_gates_as_asked_for():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50))
    weight = walk(model)[0].weight
    walk(model)[0].hold(HardConcrete.encode(weight, start=2.2))
    regime = gating(model, 0.8, 1000)
    for step in range(600):
        regime.penalty(step).backward()
        regime.gradients(step)
        if step == 598:
            closed = 1 - walk(model)[0].form.chance().mean().item()
        regime.after(step)
    assert closed == pytest.approx(0.8, abs=0.05)
    assert regime.settled
    assert int((walk(model)[0].weight == 0).sum()) == 1600


def test_the_cut_worked_by_hand():
    # Two of six go: the two most closed. The others keep their weight times their gate.
    model = gated({"first": -1.0}, 1.0)
    walk(model)[0].form.openness.data[1, 2] = -5.0
    regime = gating(model, 1 / 3, 1)
    latent = walk(model)[0].form.latent
    regime.after(0)
    form = walk(model)[0].form
    assert isinstance(form, SoftMask)
    assert form.latent is latent
    gate = 1.2 / (1 + math.exp(-1.0)) - 0.1
    expected = [[0.0, 2 * gate, 3 * gate], [4 * gate, 5 * gate, 0.0]]
    assert torch.allclose(form.dense(), torch.tensor(expected), rtol=1e-5)
    # Only the gate at -5 had closed by itself.
    assert regime.reached == pytest.approx(1 / 6)


@pytest.mark.parametrize("labels", [True, False])
def test_it_keeps_more_than_cutting_once(labels):
    model, data = net(), task(labels=labels)
    options = {"sparsity": 0.9, "epochs": 24, "rate": 3e-3}
    done = run(model, [{"method": "prune.l0", "options": options}], data)
    cut = one_shot(model, 0.9, "global")
    once, found = (data.evaluate(m)["accuracy"] for m in (cut, done))
    assert found > once + 10


def test_zeros_stay_zero_through_a_file_and_through_rounding(tmp_path):
    done = l0(net(), task(), sparsity=0.8, epochs=2)
    before = zeros(done)
    loaded = load(save(done, tmp_path / "m.tersor", graph=False), into=net(trained=False))
    assert all(map(torch.equal, zeros(loaded), before))
    rounded = rtn(loaded, bits=8)
    assert all((after | ~zero).all() for after, zero in zip(zeros(rounded), before, strict=True))


def test_what_was_zero_before_stays_zero_and_counts():
    model = magnitude(net(), sparsity=0.5)
    before = zeros(model)
    l0(model, task(), sparsity=0.8, epochs=2)
    assert all((after | ~zero).all() for after, zero in zip(zeros(model), before, strict=True))
    count = sum(zero.numel() for zero in before)
    assert sum(int(zero.sum()) for zero in zeros(model)) == round(0.8 * count)


@pytest.mark.parametrize("stop", [9, 22])
def test_a_training_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path, stop):
    # 24 steps, of which 14 have gates.
    class Stop(Exception):
        pass

    model, data = net(), task()
    steps = [{"method": "prune.l0", "options": {"sparsity": 0.7, "epochs": 3}}]
    whole = run(model, steps, data)
    seen, plain = [], data.loss

    def loss(outputs, targets):
        seen.append(None)
        if len(seen) == stop:
            raise Stop
        return plain(outputs, targets)

    data.loss = loss
    log = TrainingLog(tmp_path, minutes=0, show=False)
    with pytest.raises(Stop):
        run(model, steps, data, log=log)
    again = run(model, steps, data, log=log)
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(TaskError, match=r"prune\.l0 needs inputs to train on; pass a task"):
        l0(net())
    with pytest.raises(OptionError, match="in float16 the loss is scaled"):
        l0(net(), task(), training={"precision": "float16"})
    with pytest.raises(OptionError, match="the 3 weights have as many zeros already"):
        l0(magnitude(net(), sparsity=0.9), task())
    model = gated({}, 3.0)
    model.add_module("1", nn.Linear(2, 2))
    walk(model)[1].hold(HardConcrete(torch.ones(2, 2), torch.full((2, 2), -9.0)))
    with pytest.raises(OptionError, match=r"remove every weight of '1.weight' of shape \(2, 2\)"):
        gating(model, 0.5, 1).after(0)
