"""Entropy-penalised training: bits are spent where they matter, as many as were asked for."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.errors import ModelError, OptionError, TaskError
from tersor.forms import Rounded, Trellis
from tersor.methods import rates, run
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.entropy import entropy
from tersor.methods.quantize.rate import Spending, _between, rate
from tersor.surgery import walk
from tersor.task import classification
from train.test_loop import blobs


def trained() -> nn.Sequential:
    """A network much too wide for three clouds in the plane."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    x, y = blobs(512)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return trained()


@pytest.fixture
def task():
    return classification(
        train=blobs(512), test=blobs(600, seed=1), holdout=blobs(128, seed=2)[0], batch_size=32
    )


def outcome(model):
    return model.recipe.steps[-1].outcome


def test_the_price_of_a_code_is_that_of_the_table_and_lies_on_lines_between():
    tables = torch.tensor([[0.5, 3.0, 5.0, 6.0], [1.0, 1.5, 2.0, 9.0]])
    levels = torch.tensor([[0.0, -1.0, 2.0], [0.5, -1.25, 7.0]], requires_grad=True)
    classes = torch.tensor([[0, 0, 1], [0, 1, 0]])
    bits = _between(levels, classes, tables)
    assert torch.allclose(bits.detach()[0], torch.tensor([0.5, 3.0, 2.0]), atol=2e-3)
    assert torch.allclose(bits.detach()[1], torch.tensor([1.75, 1.625, 6.0]), atol=2e-3)
    bits.sum().backward()
    assert torch.allclose(levels.grad[1], torch.tensor([2.5, -0.5, 0.0]))


def test_bits_are_counted_as_the_search_for_codes_counts_them():
    torch.manual_seed(0)
    forms = [
        Rounded.encode(torch.randn(40, 30), step=0.7),
        Rounded.encode(torch.randn(9, 8), step=0.5),
    ]
    found = []
    for form in forms:
        levels = form.levels().detach().numpy()
        found.append((np.rint(levels).astype(np.int32), rates.classes_of(levels, 1)))
    expected = rates.estimate(found, rates.count(found, 1)) / (40 * 30 + 9 * 8)
    assert Spending(forms, 1.0).count() == pytest.approx(expected)


@pytest.mark.parametrize("bits", [0.5, 1.5])
def test_as_many_bits_are_left_as_were_asked_for(model, task, bits, tmp_path):
    done = rate(copy.deepcopy(model), task, bits=bits, epochs=10)
    assert outcome(done)["bits"] <= 1.03 * bits
    assert outcome(done)["bits"] >= 0.8 * bits
    assert all(isinstance(site.form, Trellis) for site in walk(done))
    assert task.evaluate(done)["accuracy"] >= task.evaluate(model)["accuracy"] - 2
    path = tersor.save(done, tmp_path / "m.tersor", graph=False, profile="max")
    # Codes, and for a network as small as this one its vectors and the header.
    assert path.stat().st_size * 8 < 1.3 * bits * 4_416 + 8 * 900


def test_training_is_worth_bits(model, task):
    trained_for_it = rate(copy.deepcopy(model), task, bits=0.3, epochs=12)
    found = entropy(copy.deepcopy(model), task, bits=0.3)
    assert task.evaluate(trained_for_it)["accuracy"] > task.evaluate(found)["accuracy"]


def test_zeros_stay_zero(model, task):
    pruned = copy.deepcopy(model)
    magnitude(pruned, sparsity=0.8)
    zeros = [site.weight == 0 for site in walk(pruned)]
    rate(pruned, task, bits=0.8, epochs=2, original=model)
    for site, gone in zip(walk(pruned), zeros, strict=True):
        assert not bool(site.weight[gone].any())


def test_what_was_not_chosen_stays_as_it_is(model, task):
    done = rate(copy.deepcopy(model), task, bits=1.0, epochs=1, include="2")
    assert torch.equal(done[0].weight, model[0].weight)
    assert isinstance(walk(done, "2")[0].form, Trellis)


def test_bits_that_are_out_of_reach_are_said(model, task):
    done = rate(copy.deepcopy(model), task, bits=0.001, epochs=1)
    assert outcome(done)["asked"] == 0.001


def test_wrong_use_is_refused(model, task):
    with pytest.raises(TaskError, match="needs inputs to train on"):
        rate(copy.deepcopy(model))
    with pytest.raises(OptionError, match="already"):
        run(model, [{"method": "quantize.rtn"}, {"method": "quantize.rate"}], task)


def test_averages_spend_what_was_asked_for(model, task):
    options = {"bits": 1.2, "epochs": 16, "training": {"ema": 0.99}}
    done = run(model, [{"method": "quantize.rate", "options": options}], task)
    assert outcome(done)["bits"] <= 1.03 * 1.2


def test_biases_with_something_in_common_keep_their_differences(task):
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([100.0, 100.5, 101.0]))
    rate(model, task, bits=8.0, epochs=1, rate=1e-6)
    assert torch.allclose(model[0].bias, torch.tensor([100.0, 100.5, 101.0]), atol=0.05)


def test_after_an_error_the_network_is_as_it_was(model):
    before = copy.deepcopy(model)
    bad = classification(train=(blobs(64)[0], torch.zeros(64).long()), holdout=blobs(8)[0])
    bad.loss = lambda outputs, targets: outputs.sum() * float("nan")
    with pytest.raises(ModelError, match="the loss is nan"):
        rate(before, bad, bits=1.0)
    assert all(site.form is None for site in walk(before))
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_vectors_that_were_not_chosen_stay(model, task):
    done = rate(copy.deepcopy(model), task, bits=1.0, epochs=1, include="2")
    assert torch.equal(done[0].bias, model[0].bias)
    assert torch.equal(done[4].weight, model[4].weight)


def test_with_labels_alone_no_teacher_judges(model, task):
    done = run(model, [{"method": "quantize.rate", "options": {"labels": 1.0, "epochs": 20}}], task)
    # Held-out samples have no labels here, so that the last state counts.
    assert "divergence_after" not in outcome(done)
    assert outcome(done)["bits"] < 1.03
    assert task.evaluate(done)["accuracy"] > task.evaluate(model)["accuracy"] - 2
