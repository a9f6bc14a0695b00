"""Gradient pruning: each score as its paper defines it, gradient by gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from methods.pruned import task_for
from surgery.nets import NETS, make
from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods.prune import gradient as module
from tersor.methods.prune.gradient import fisher, gradient, movement, taylor
from tersor.surgery import walk
from tersor.task import classification


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def data(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def labelled(n=40, batch_size=16):
    return classification(train=data(n), calibration=data(n)[0], batch_size=batch_size)


def weights_of(model):
    return [model[0].weight, model[2].weight]


# The old weight norm cannot be copied while its weight is computed with gradients.
@pytest.mark.parametrize("name", sorted(NETS.keys() - {"old weight norm"}))
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_exactly_the_fraction_asked_for_becomes_zero(name, scope):
    model, _ = make(name)
    before = {site.name: site.weight.clone() for site in walk(model)}
    gradient(model, task_for(name), sparsity=0.2, scope=scope)
    zeros = {site.name: site.weight == 0 for site in walk(model)}
    for site in walk(model):
        kept = ~zeros[site.name]
        assert torch.equal(site.weight[kept], before[site.name][kept])
        if scope == "layer":
            assert int((~kept).sum()) == round(0.2 * kept.numel())
    sizes = [zero.numel() for zero in zeros.values()]
    if scope == "global":
        assert sum(int(zero.sum()) for zero in zeros.values()) == round(0.2 * sum(sizes))


def test_fisher_is_the_mean_over_all_answers_the_network_may_give():
    # The mean of many draws against the sum over the three classes, weighed by their chances.
    model, (x, _) = net(), data(16)
    expected = [torch.zeros_like(w) for w in weights_of(model)]
    for sample in x:
        chances = model(sample).softmax(0).detach()
        for label in range(3):
            loss = functional.cross_entropy(model(sample)[None], torch.tensor([label]))
            found = torch.autograd.grad(loss, weights_of(model))
            for total, each in zip(expected, found, strict=True):
                total += chances[label] * each.square() / len(x)
    many = classification(calibration=x.repeat(300, 1), batch_size=512)
    with torch.no_grad():
        scores = fisher(model, many, weights_of(model), 4000)
    for w, square, score in zip(weights_of(model), expected, scores, strict=True):
        assert torch.allclose(score.sum(), (w.square() * square).sum(), rtol=0.1)
        pair = torch.stack((score.flatten(), (w.square() * square).flatten()))
        assert torch.corrcoef(pair)[0, 1] > 0.98


def test_taylor_is_the_weight_times_the_gradient_of_the_mean_loss():
    model, (x, labels) = net(), data(40)
    loss = functional.cross_entropy(model(x), labels)
    expected = torch.autograd.grad(loss, weights_of(model))
    with torch.no_grad():
        scores = taylor(model, labelled(), weights_of(model), 512)
    for w, each, score in zip(weights_of(model), expected, scores, strict=True):
        assert torch.allclose(score, (w * each).abs(), atol=1e-6)
    # Two and a half batches of 16.
    part = torch.autograd.grad(
        functional.cross_entropy(model(x[:24]), labels[:24]), weights_of(model)
    )
    with torch.no_grad():
        scores = taylor(model, labelled(), weights_of(model), 24)
    assert torch.allclose(scores[0], (model[0].weight * part[0]).abs(), atol=1e-6)


def test_movement_adds_up_over_steps_of_sgd(monkeypatch):
    monkeypatch.setattr(module, "_RATE", 0.5)
    model, (x, labels) = net(), data(40)
    twin = copy.deepcopy(model)
    expected = [torch.zeros_like(w) for w in weights_of(twin)]
    for start in range(0, 40, 16):
        batch = slice(start, start + 16)
        loss = functional.cross_entropy(twin(x[batch]), labels[batch])
        found = torch.autograd.grad(loss, weights_of(twin))
        with torch.no_grad():
            for total, w, each in zip(expected, weights_of(twin), found, strict=True):
                total -= w * each
                w -= 0.5 * each
    with torch.no_grad():
        scores = movement(model, labelled(), weights_of(model), 512)
    for score, total in zip(scores, expected, strict=True):
        assert torch.allclose(score, total, atol=1e-6)


def test_one_weight_worked_by_hand():
    # Two classes, logits (w0 x, w1 x), x = 1, w = (0, 2), label 0. p = softmax = (0.119, 0.881),
    # g = p - (1, 0) = (-0.881, 0.881). Taylor: 0 and 1.762. Movement: 0 and -1.762.
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[0.0], [2.0]])
    task = classification(
        train=(torch.ones(1, 1), torch.zeros(1, dtype=torch.long)), calibration=torch.ones(1, 1)
    )
    with torch.no_grad():
        (first,) = taylor(layer, task, [layer.weight], 1)
        (moved,) = movement(layer, task, [layer.weight], 1)
    assert first.flatten().tolist() == pytest.approx([0, 1.7616], rel=1e-4)
    assert moved.flatten().tolist() == pytest.approx([0, -1.7616], rel=1e-4)


@pytest.mark.parametrize("score", ["fisher", "taylor", "movement"])
def test_the_highest_scores_stay_with_the_values_they_had(score):
    model = net()
    before = [w.detach().clone() for w in weights_of(model)]
    gradient(model, labelled(), score=score, sparsity=0.5, scope="global")
    zeros = sum(int((w == 0).sum()) for w in weights_of(model))
    assert zeros == round(0.5 * (48 + 24))
    for w, was in zip(weights_of(model), before, strict=True):
        assert torch.equal(w[w != 0], was[w != 0])
    pattern = gradient(net(), labelled(), score=score, sparsity="1:2")
    assert ((pattern[0].weight.view(-1, 2) != 0).sum(1) == 1).all()


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(
        TaskError, match=r"prune\.gradient runs the network on samples; pass a task"
    ):
        gradient(net())
    unlabelled = classification(calibration=data(8)[0])
    with pytest.raises(TaskError, match=r"score='taylor' needs labelled .* score=\"fisher\""):
        gradient(net(), unlabelled, score="taylor")

    class Rounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ModelError, match="gradients do not pass through the network"):
        gradient(Rounded(6, 3).eval(), unlabelled)
    faint = net().requires_grad_(False)
    faint[0].weight *= 1e-8
    with pytest.raises(OptionError, match=r"every weight of '0\.weight' .* or scope=\"layer\""):
        gradient(faint, unlabelled, scope="global", sparsity=0.8)
