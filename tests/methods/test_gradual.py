"""Gradual pruning: the schedule and the masks are the paper's, and what is gone stays gone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from methods.pruned import task_for
from methods.trained import clusters, net, one_shot, task, zeros
from surgery.nets import NETS, make
from tersor.codec import load, save
from tersor.errors import ModelError, OptionError, TaskError
from tersor.forms import Bitmask, NofM
from tersor.forms.form import rows
from tersor.methods import run
from tersor.methods.masking import GROWTH, cubic
from tersor.methods.prune.gradual import gradual
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk
from tersor.task import classification
from tersor.train import TrainingLog


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("sparsity", "scope"), [(0.1, "layer"), (0.83, "layer"), (0.2, "global"), (0.37, "global")]
)
def test_exactly_the_fraction_asked_for_becomes_zero(name, sparsity, scope):
    done = gradual(make(name)[0], task_for(name), sparsity=sparsity, scope=scope, epochs=2)
    sites = walk(done)
    assert all(isinstance(site.form, Bitmask) for site in sites)
    found = [int((site.weight == 0).sum()) for site in sites]
    counts = [site.weight.numel() for site in sites]
    if scope == "layer":
        assert found == [round(sparsity * n) for n in counts]
    else:
        assert sum(found) == round(sparsity * sum(counts))


@pytest.mark.parametrize("name", ["linear", "lstm", "conv1d of gpt-2"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2)])
def test_n_of_every_m_neighbours_stay(name, n, m):
    done = gradual(make(name)[0], task_for(name), sparsity=f"{n}:{m}", epochs=2)
    left = done.recipe.steps[-1].outcome.get("left", {})
    for site in walk(done):
        matrix = rows(site.weight, site.axis)
        if site.name in left:
            assert matrix.shape[1] % m
            continue
        assert isinstance(site.form, NofM)
        assert ((matrix.reshape(-1, m) != 0).sum(1) == n).all()


def test_the_schedule_worked_by_hand():
    # Half of the way is 1 - (1/2)^3 = 7/8 of what is to go; from 0.2 to 0.8 that is 0.725.
    assert cubic(5, 10, 0.2, 0.8) == pytest.approx(0.725)
    assert cubic(0, 10, 0.2, 0.8) == pytest.approx(0.2)
    assert cubic(10, 10, 0.2, 0.8) == cubic(11, 10, 0.2, 0.8) == 0.8


def by_the_paper(model, sparsity, steps, rate):
    """Whole batches, SGD with momentum; smallest weights hidden one by one, after each step."""
    x, y = clusters(64, 1)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    masks = [torch.ones_like(w) for w in weights]
    optimizer = torch.optim.SGD(weights, lr=rate, momentum=0.9, nesterov=True)
    growing = round(GROWTH * steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        first, bias, second, other = (w * m for w, m in zip(weights, masks, strict=True))
        outputs = functional.linear(functional.linear(x, first, bias).relu(), second, other)
        functional.cross_entropy(outputs, y).backward()
        optimizer.step()
        # Zhu and Gupta 2017, eq. 1, with t0 = 0, s_i = 0.
        share = sparsity - sparsity * (1 - step / growing) ** 3 if step <= growing else sparsity
        for weight, mask in ((weights[0], masks[0]), (weights[2], masks[2])):
            for _ in range(round(share * weight.numel()) - int((mask == 0).sum())):
                sizes = [
                    (abs(w) if m else float("inf"))
                    for w, m in zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True)
                ]
                mask.view(-1)[sizes.index(min(sizes))] = 0
    return [w * m for w, m in zip(weights, masks, strict=True)]


def test_equals_a_loop_written_from_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 8))
    expected = by_the_paper(model, 0.7, 10, 0.02)
    plain = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "clip": 1e6}
    data = classification(train=clusters(64, 1), holdout=clusters(64, 1), batch_size=64)
    gradual(model, data, sparsity=0.7, epochs=10, rate=0.02, labels=1.0, training=plain)
    found = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one == 0, other == 0)
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("labels", [True, False])
def test_it_keeps_more_than_cutting_once(labels):
    model, data = net(), task(labels=labels)
    options = {"sparsity": 0.9, "epochs": 12, "rate": 3e-3}
    done = run(model, [{"method": "prune.gradual", "options": options}], data)
    cut = one_shot(model, 0.9)
    again = {"method": "distill.logits", "options": {"epochs": 12, "rate": 3e-3}}
    trained = run(cut, [again], data, original=model)
    once, twice, found = (data.evaluate(m)["accuracy"] for m in (cut, trained, done))
    assert found > once + 20
    assert found > twice
    outcome = done.recipe.steps[-1].outcome
    assert outcome["kept"]
    assert outcome["divergence_before"] == 0.0
    assert outcome["divergence_after"] > 0


def test_zeros_stay_zero_through_a_file_and_through_rounding(tmp_path):
    done = gradual(net(), task(), sparsity=0.8, epochs=1)
    before = zeros(done)
    loaded = load(save(done, tmp_path / "m.tersor", graph=False), into=net(trained=False))
    assert all(map(torch.equal, zeros(loaded), before))
    rounded = rtn(loaded, bits=8)
    assert all((after | ~zero).all() for after, zero in zip(zeros(rounded), before, strict=True))


def test_what_was_zero_before_stays_zero_and_counts():
    model = magnitude(net(), sparsity=0.5)
    before = zeros(model)
    gradual(model, task(), sparsity=0.8, epochs=1)
    for zero, after in zip(before, zeros(model), strict=True):
        assert (after | ~zero).all()
        assert int(after.sum()) == round(0.8 * after.numel())


def test_only_chosen_layers_change():
    model, before = net(), net()
    gradual(model, task(), sparsity=0.8, epochs=1, include="2")
    assert isinstance(model[2].weight_form, Bitmask)
    for at in (0, 4):
        assert torch.equal(model[at].weight, before[at].weight)
        assert torch.equal(model[at].bias, before[at].bias)


def test_a_training_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    class Stop(Exception):
        pass

    model, data, options = net(), task(), {"sparsity": 0.9, "epochs": 3}
    steps = [{"method": "prune.gradual", "options": options}]
    whole = run(model, steps, data)
    seen, plain = [], data.loss

    def loss(outputs, targets):
        seen.append(None)
        if len(seen) == 13:
            raise Stop
        return plain(outputs, targets)

    data.loss = loss
    log = TrainingLog(tmp_path, minutes=0, show=False)
    with pytest.raises(Stop):
        run(model, steps, data, log=log)
    again = run(model, steps, data, log=log)
    assert len(seen) == 12 + 1 + 12
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_after_an_error_the_network_is_as_it_was():
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(1e-6)
    before = copy.deepcopy(model.state_dict())
    weight = model[0].weight
    with pytest.raises(OptionError, match=r"every weight of '4.weight' .* or scope=\"layer\""):
        gradual(model, task(), sparsity=0.9, scope="global", epochs=2)
    assert model[0].weight is weight
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_after_an_error_in_the_end_tied_weights_are_tied_and_vectors_are_back():
    model, data = make("tied")[0], task_for("tied")
    before = copy.deepcopy(model.state_dict())
    plain, seen = data.divergence, []

    def apart(reference, outputs):
        seen.append(None)
        return plain(reference, outputs) * (float("nan") if len(seen) > 12 else 1)

    data.divergence = apart
    with pytest.raises(ModelError, match="answers that are infinitely far off"):
        gradual(model, data, sparsity=0.5, epochs=8)
    assert model.output.weight is model.embedding.weight
    assert isinstance(model.embedding._parameters["weight"], nn.Parameter)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(TaskError, match=r"prune\.gradual needs inputs to train on; pass a task"):
        gradual(net())
    with pytest.raises(TaskError, match=r"labels=1\.0 needs labelled training data"):
        gradual(net(), task(labels=False), labels=1.0)
    with pytest.raises(OptionError, match=r"'0.weight' of shape \(48, 32\) is stored as affine"):
        gradual(rtn(net()), task())
    done = magnitude(net(), sparsity=0.9)
    for scope in ("layer", "global"):
        with pytest.raises(OptionError, match=r"sparsity=0.8: the 3 weights have as many zeros"):
            gradual(done, task(), scope=scope)
    tiny = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 1))
    with pytest.raises(OptionError, match=r"sparsity=0.95 would remove every weight of '2.weight'"):
        gradual(tiny, task(), sparsity=0.95)
