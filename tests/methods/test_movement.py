"""Movement pruning: scores are those of the paper, and decide what is hidden."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from methods.pruned import task_for
from methods.trained import clusters, net, one_shot, task, zeros
from surgery.nets import NETS, make
from tersor.codec import load, save
from tersor.errors import OptionError, TaskError
from tersor.forms import Bitmask, NofM
from tersor.methods import run
from tersor.methods.masking import GROWTH
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.prune.movement import movement
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk
from tersor.task import classification
from tersor.train import TrainingLog


@pytest.mark.parametrize(
    ("name", "sparsity", "scope"),
    [*((name, 0.83, "layer") for name in NETS), ("linear", 0.5, "global"), ("tied", 0.2, "global")],
)
def test_exactly_the_fraction_asked_for_becomes_zero(name, sparsity, scope):
    done = movement(make(name)[0], task_for(name), sparsity=sparsity, scope=scope, epochs=2)
    sites = walk(done)
    assert all(isinstance(site.form, Bitmask) for site in sites)
    found = [int((site.weight == 0).sum()) for site in sites]
    counts = [site.weight.numel() for site in sites]
    if scope == "layer":
        assert found == [round(sparsity * n) for n in counts]
    else:
        assert sum(found) == round(sparsity * sum(counts))


def test_a_pattern_is_kept():
    done = movement(net(), task(), sparsity="2:4", epochs=2)
    for site in walk(done):
        assert isinstance(site.form, NofM)
        assert ((site.weight.reshape(-1, 4) != 0).sum(1) == 2).all()


def by_the_paper(model, sparsity, steps, rate):
    """Whole batches; S -= dL/dW' * W and W -= rate * dL/dW' * M, the lowest scores hidden."""
    x, y = clusters(64, 1)
    first, bias, second, other = (p.detach().clone() for p in model.parameters())
    masks, scores = [torch.ones_like(w) for w in (first, second)], [0 * first, 0 * second]
    velocity = [torch.zeros_like(w) for w in (first, bias, second, other)]
    growing = round(GROWTH * steps)
    for step in range(1, steps + 1):
        shown = [first * masks[0], bias, second * masks[1], other]
        shown = [w.clone().requires_grad_() for w in shown]
        hidden = functional.linear(x, shown[0], shown[1]).relu()
        functional.cross_entropy(functional.linear(hidden, *shown[2:]), y).backward()
        upstream = [w.grad for w in shown]
        scores[0] -= upstream[0] * first
        scores[1] -= upstream[2] * second
        gradients = [upstream[0] * masks[0], upstream[1], upstream[2] * masks[1], upstream[3]]
        for at, weight in enumerate((first, bias, second, other)):
            # Nesterov's momentum as torch has it.
            velocity[at] = 0.9 * velocity[at] + gradients[at] if step > 1 else gradients[at].clone()
            weight -= rate * (gradients[at] + 0.9 * velocity[at])
        if step <= growing:
            share = sparsity - sparsity * (1 - step / growing) ** 3
            for mask, score in zip(masks, scores, strict=True):
                order = sorted(range(score.numel()), key=lambda i, s=score: float(s.view(-1)[i]))
                mask.fill_(1)
                mask.view(-1)[order[: round(share * score.numel())]] = 0
    return [first * masks[0], bias, second * masks[1], other]


def test_equals_a_loop_written_from_the_paper():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 8))
    expected = by_the_paper(model, 0.7, 10, 0.02)
    plain = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "clip": 1e6}
    data = classification(train=clusters(64, 1), holdout=clusters(64, 1), batch_size=64)
    movement(model, data, sparsity=0.7, epochs=10, rate=0.02, labels=1.0, training=plain)
    found = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one == 0, other == 0)
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("labels", [True, False])
def test_it_keeps_more_than_cutting_once(labels):
    model, data = net(), task(labels=labels)
    options = {"sparsity": 0.9, "epochs": 12, "rate": 3e-3}
    done = run(model, [{"method": "prune.movement", "options": options}], data)
    once, found = (data.evaluate(m)["accuracy"] for m in (one_shot(model, 0.9), done))
    assert found > once + 20


def test_on_another_task_it_keeps_more_than_magnitude_does():
    # The centres have changed places among the labels: what was large before is of no use now.
    model, data = net(), task()
    x, y = clusters(512, 1)
    test = clusters(512, 3)
    data = classification(
        train=(x, (y + 3) % 8), holdout=clusters(128, 2)[0], test=(test[0], (test[1] + 3) % 8),
        batch_size=64,
    )  # fmt: skip
    options = {"sparsity": 0.95, "epochs": 12, "rate": 3e-3, "labels": 1.0}
    moved, sized = (
        data.evaluate(run(model, [{"method": name, "options": options}], data))["accuracy"]
        for name in ("prune.movement", "prune.gradual")
    )
    assert moved > sized + 5


def test_zeros_stay_zero_through_a_file_and_through_rounding(tmp_path):
    done = movement(net(), task(), sparsity=0.8, epochs=1)
    before = zeros(done)
    loaded = load(save(done, tmp_path / "m.tersor", graph=False), into=net(trained=False))
    assert all(map(torch.equal, zeros(loaded), before))
    rounded = rtn(loaded, bits=8)
    assert all((after | ~zero).all() for after, zero in zip(zeros(rounded), before, strict=True))


def test_what_was_zero_before_stays_zero_and_counts():
    model = magnitude(net(), sparsity=0.5)
    before = zeros(model)
    movement(model, task(), sparsity=0.8, epochs=1)
    for zero, after in zip(before, zeros(model), strict=True):
        assert (after | ~zero).all()
        assert int(after.sum()) == round(0.8 * after.numel())


def test_a_training_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    class Stop(Exception):
        pass

    model, data = net(), task()
    steps = [{"method": "prune.movement", "options": {"sparsity": 0.9, "epochs": 3}}]
    whole = run(model, steps, data)
    seen, plain = [], data.loss

    def loss(outputs, targets):
        seen.append(None)
        if len(seen) == 11:
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
    with pytest.raises(TaskError, match=r"prune\.movement needs inputs to train on; pass a task"):
        movement(net())
    with pytest.raises(OptionError, match="in float16 the loss is scaled"):
        movement(net(), task(), training={"precision": "float16"})
    with pytest.raises(OptionError, match="the 3 weights have as many zeros already"):
        movement(magnitude(net(), sparsity=0.9), task())
