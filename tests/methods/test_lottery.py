"""Lottery tickets: found as the paper says, and their controls change what they say they change."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from methods.trained import clusters, net, one_shot, task, zeros
from tersor.codec import load, save
from tersor.errors import ModelError, OptionError, TaskError
from tersor.forms import Bitmask
from tersor.methods import run
from tersor.methods.prune.lottery import lottery
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk
from tersor.task import classification
from tersor.train import TrainingLog

# So little that no weight moves.
STILL = {"rate": 1e-12, "epochs": 1, "rounds": 2}


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.3, 1), (0.75, 2), (0.9, 3), (0.94, 8)])
def test_exactly_the_fraction_asked_for_is_left_round_by_round(sparsity, rounds):
    done = lottery(net(trained=False), task(n=64), sparsity=sparsity, rounds=rounds, epochs=1)
    for site in walk(done):
        assert isinstance(site.form, Bitmask)
        assert int((site.weight == 0).sum()) == round(sparsity * site.weight.numel())
    left = done.recipe.steps[-1].outcome["left"]
    assert left == pytest.approx(
        [(1 - sparsity) ** (n / rounds) for n in range(1, rounds + 1)], 0.01
    )


def test_two_rounds_worked_by_hand():
    # Of 1 -2 3 -4 5 6 7 8 two are to be left: four after the first round, 5 to 8, then 7 and 8.
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    model[1].weight.data = torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, 6.0, 7.0, 8.0]])
    data = classification(train=(torch.randn(8, 4), torch.arange(8) % 2))
    lottery(model, data, sparsity=0.75, **STILL)
    assert model.recipe.steps[-1].outcome["left"] == [0.5, 0.25]
    assert model[1].weight.tolist() == [[0.0] * 4, [0.0, 0.0, 7.0, 8.0]]


def by_the_paper(model, keep, steps, rate):
    """Frankle, Carbin 2019, section 2: train, remove, reset, in whole batches of plain loops."""
    x, y = clusters(64, 1)
    start = [p.detach().clone() for p in model.parameters()]
    masks = [torch.ones_like(w) for w in start]
    for counts in [*keep, None]:
        weights = [w.clone().requires_grad_() for w in start]
        optimizer = torch.optim.SGD(weights, lr=rate, momentum=0.9, nesterov=True)
        for _ in range(steps):
            optimizer.zero_grad()
            first, bias, second, other = (w * m for w, m in zip(weights, masks, strict=True))
            outputs = functional.linear(functional.linear(x, first, bias).relu(), second, other)
            functional.cross_entropy(outputs, y).backward()
            optimizer.step()
        for at, count in zip((0, 2), counts or (), strict=False):
            sizes = (weights[at] * masks[at]).detach().abs().flatten()
            order = sorted(range(len(sizes)), key=lambda i: -float(sizes[i]))
            masks[at].view(-1)[order[count:]] = 0
    return [w * m for w, m in zip(weights, masks, strict=True)]


def test_equals_a_loop_written_from_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 8))
    # 192 and 48 weights to a quarter in two rounds.
    expected = by_the_paper(model, [(96, 24), (48, 12)], 10, 0.02)
    plain = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "clip": 1e6}
    data = classification(train=clusters(64, 1), holdout=clusters(64, 1), batch_size=64)
    lottery(model, data, sparsity=0.75, rounds=2, epochs=10, rate=0.02, training=plain)
    found = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one == 0, other == 0)
        assert torch.allclose(one, other, atol=1e-6)


def test_controls_change_either_the_values_or_the_places():
    start, data = net(trained=False), task(n=64)
    ticket, other_values, other_places = (
        lottery(net(trained=False), data, sparsity=0.75, control=control, **STILL)
        for control in ("none", "reinitialize", "random")
    )
    for at in (0, 2, 4):
        weight, kept = start[at].weight, ticket[at].weight != 0
        assert torch.allclose(ticket[at].weight[kept], weight[kept], atol=1e-6)
        assert torch.equal(other_values[at].weight != 0, kept)
        near = (other_values[at].weight[kept][:, None] - weight.flatten()).abs().amin(1)
        assert near.max() < 1e-6
        assert not torch.allclose(other_values[at].weight[kept], weight[kept], atol=1e-3)
        places = other_places[at].weight != 0
        assert int(places.sum()) == int(kept.sum())
        assert torch.allclose(other_places[at].weight[places], weight[places], atol=1e-6)
        assert not torch.equal(places, kept)


def test_a_ticket_beats_its_controls_and_cutting_once():
    data = task()

    def accuracy(control):
        options = {"sparsity": 0.9, "rounds": 4, "rate": 5e-3, "control": control}
        steps = [{"method": "prune.lottery", "options": options}]
        return data.evaluate(run(net(trained=False), steps, data))["accuracy"]

    ticket = accuracy("none")
    assert ticket > data.evaluate(one_shot(net(), 0.9))["accuracy"] + 20
    assert ticket > accuracy("reinitialize") + 5
    assert ticket > accuracy("random") + 5


def test_zeros_stay_zero_through_a_file_and_through_rounding(tmp_path):
    done = lottery(net(trained=False), task(n=64), sparsity=0.8, rounds=1, epochs=1)
    before = zeros(done)
    loaded = load(save(done, tmp_path / "m.tersor", graph=False), into=net(trained=False))
    assert all(map(torch.equal, zeros(loaded), before))
    rounded = rtn(loaded, bits=8)
    assert all((after | ~zero).all() for after, zero in zip(zeros(rounded), before, strict=True))


def test_rounds_that_were_kept_serve_other_controls(tmp_path):
    data, seen = task(n=64), []
    plain = data.loss
    data.loss = lambda outputs, targets: seen.append(None) or plain(outputs, targets)
    options = {"sparsity": 0.75, "rounds": 2, "epochs": 1}
    log = TrainingLog(tmp_path, show=False)
    lottery(net(trained=False), data, log=log, **options)
    # Three trainings of one batch each; then the last one alone.
    before = len(seen)
    again = lottery(net(trained=False), data, log=log, control="random", **options)
    assert len(seen) - before == before // 3
    alone = lottery(net(trained=False), data, control="random", **options)
    assert torch.equal(again[0].weight, alone[0].weight)
    assert len(list(tmp_path.glob("*.training.safetensors"))) == 4


def test_after_an_error_the_network_is_as_it_was():
    model, data = net(trained=False), task(n=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, seen = data.loss, []

    def loss(outputs, targets):
        seen.append(None)
        return plain(outputs, targets) if len(seen) < 3 else outputs.sum() * float("nan")

    data.loss = loss
    with pytest.raises(ModelError, match="the loss is nan"):
        lottery(model, data, rounds=4, epochs=1)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(TaskError, match=r"prune\.lottery needs inputs to train on; pass a task"):
        lottery(net(trained=False))
    with pytest.raises(TaskError, match=r"prune\.lottery needs labelled training data"):
        lottery(net(trained=False), task(labels=False))
    with pytest.raises(OptionError, match="the 3 weights have as many zeros already"):
        lottery(one_shot(net(trained=False), 0.9), task())
    with pytest.raises(OptionError, match=r"control='shuffle'"):
        lottery(net(trained=False), task(), control="shuffle")
