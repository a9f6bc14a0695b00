"""Decoupled distillation: the two parts of the divergence, each with its own weight."""

import math

import pytest
import torch
from torch import Tensor, nn

from methods.toys import mlp, normal, outcome
from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import run
from tersor.methods.distill.decoupled import decoupled, divergences
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.task import Task, classification, language_model, regression


@pytest.fixture
def task() -> Task:
    return classification(calibration=normal(512, 8, seed=1), holdout=normal(128, 8, seed=2))


def naive(wanted: Tensor, found: Tensor, target: int) -> tuple[float, float]:
    """Section 3.1 of the paper, class by class, for one row."""
    p, q = (logits.double().exp() / logits.double().exp().sum() for logits in (wanted, found))
    two = [(p[target], q[target]), (1 - p[target], 1 - q[target])]
    others = [
        (p[i] / (1 - p[target]), q[i] / (1 - q[target])) for i in range(len(p)) if i != target
    ]
    return tuple(sum(float(a * (a / b).log()) for a, b in pairs) for pairs in (two, others))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_two_parts_are_those_of_the_paper(task, classes):
    wanted, found = normal(6, classes, seed=3) * 3, normal(6, classes, seed=4) * 2
    targets = torch.arange(6) % classes
    parts = divergences(task, wanted, found, targets)
    expected = torch.tensor(
        [naive(*rows, int(t)) for *rows, t in zip(wanted, found, targets, strict=True)]
    )
    assert torch.allclose(torch.stack(parts, 1), expected.float(), atol=1e-5)


def test_they_are_the_divergence_taken_apart(task):
    # Eq. 6: KD = TCKD + (1 - p_t) NCKD.
    wanted, found = normal(9, 7, seed=3), normal(9, 7, seed=4)
    targets = torch.arange(9) % 7
    target, others = divergences(task, wanted, found, targets)
    sure = wanted.softmax(1)[torch.arange(9), targets]
    assert torch.allclose(task.divergence(wanted, found), target + (1 - sure) * others, atol=1e-6)


def test_one_row_worked_by_hand(task):
    # Teacher 1/2, 1/4, 1/4 and student 1/4, 1/4, 1/2 with target 0: between target and not target
    # 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3); among the others 1/2 log(3/2) + 1/2 log(3/4).
    wanted, found = torch.tensor([[2.0, 1, 1]]).log(), torch.tensor([[1.0, 1, 2]]).log()
    target, others = divergences(task, wanted, found, torch.tensor([0]))
    assert float(target) == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert float(others) == pytest.approx(0.5 * math.log(9 / 8), abs=1e-6)


def test_an_impossible_class_spoils_no_gradient(task):
    wanted = torch.tensor([[3.0, -torch.inf, 0.0]])
    found = torch.tensor([[0.5, 1.0, 0.0]], requires_grad=True)
    sum(divergences(task, wanted, found, torch.tensor([0]))).sum().backward()
    assert found.grad.isfinite().all()


def test_most_of_what_was_lost_comes_back_and_zeros_stay(task):
    model, original = mlp(32), mlp(32)
    magnitude(model, sparsity=0.7)
    zeros = model[0].weight == 0
    decoupled(model, task, original=original, epochs=8, rate=5e-3)
    assert outcome(model)["divergence_after"] < 0.5 * outcome(model)["divergence_before"]
    assert torch.equal(model[0].weight == 0, zeros)


def test_a_small_student_learns_the_labels_too():
    inputs, original = normal(512, 8, seed=1), mlp(64)
    labels = original(inputs).argmax(1)
    data = classification(train=(inputs, labels), test=(inputs, labels))
    student = mlp(6, seed=3)
    before = data.evaluate(student)["accuracy"]
    decoupled(student, data, original=original, epochs=15, rate=1e-2)
    assert data.evaluate(student)["accuracy"] > before + 0.3


def test_labels_are_the_targets_where_there_are_any():
    def done(labels: Tensor) -> Tensor:
        data = classification(train=(normal(96, 8, seed=5), labels), holdout=normal(64, 8, seed=2))
        return decoupled(mlp(8, seed=3), data, original=mlp(32), epochs=1, rate=1e-2)[0].weight

    assert not torch.equal(done(torch.zeros(96).long()), done(torch.arange(96) % 5))


def test_language_models_learn_too():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Embedding(16, 24), nn.Linear(24, 16)).eval()
    ids = torch.randint(16, (96, 9), generator=torch.Generator().manual_seed(0))
    data = language_model(calibration=ids[:64], holdout=ids[64:])
    steps = [
        {"method": "prune.magnitude", "options": {"sparsity": 0.7}},
        {"method": "distill.decoupled", "options": {"epochs": 10, "rate": 1e-2}},
    ]
    done, again = (run(original, steps, data) for _ in range(2))
    assert outcome(done)["divergence_after"] < 0.5 * outcome(done)["divergence_before"]
    assert torch.equal(done[1].weight, again[1].weight)


def test_what_cannot_be_done_is_refused(task):
    numbers = regression(calibration=normal(64, 8), holdout=normal(32, 8))
    with pytest.raises(TaskError, match=r"one of regression; use distill\.logits"):
        decoupled(mlp(8), numbers, original=mlp(8))
    with pytest.raises(ModelError, match=r"teacher gives \(4,\) numbers .* and the network \(5,\)"):
        decoupled(mlp(8), task, original=mlp(8, classes=4))
    with pytest.raises(OptionError, match=r"decoupled compares with another network"):
        decoupled(mlp(8), task)
    coded = rtn(nn.Sequential(nn.Linear(8, 5, bias=False)))
    with pytest.raises(OptionError, match="holds nothing but codes"):
        decoupled(coded, task, original=mlp(8))
