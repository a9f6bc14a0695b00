"""Distillation without data: what batch norms remember is enough to teach with."""

import copy

import pytest
import torch
from torch import nn

from methods.toys import mlp, normal, outcome, picture_net, pictures, texts, tokens
from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import run
from tersor.methods.distill.data_free import data_free, dream, plain, strange
from tersor.methods.prune.magnitude import magnitude
from tersor.task import Task, classification, regression


@pytest.fixture
def task() -> Task:
    return classification(calibration=torch.zeros(2, 1, 8, 8))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return picture_net(8, steps=60)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4)])
def test_what_is_strange_is_that_of_the_paper(shape):
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3).eval()
    norm.running_mean, norm.running_var = normal(3, seed=1), normal(3, seed=2).square()
    given = normal(*shape, seed=3) + 1
    means = torch.tensor([float(given[:, c].mean()) for c in range(3)])
    squares = torch.tensor([float((given[:, c] - means[c]).square().mean()) for c in range(3)])
    expected = (means - norm.running_mean).square().sum().sqrt()
    expected += (squares - norm.running_var).square().sum().sqrt()
    assert torch.allclose(strange(given, norm), expected, rtol=1e-5)


def test_the_prior_worked_by_hand():
    # Down the rows differ by (3, 4), of length 5, across by (0, 1); 0 + 0 + 9 + 16 in all.
    picture = torch.tensor([[[[0.0, 0.0], [3.0, 4.0]]]])
    assert float(plain(picture)) == pytest.approx(2.5e-5 * (5 + 1) + 3e-8 * 25, rel=1e-5)


def test_the_teacher_is_sure_of_its_dreams_and_finds_them_usual(teacher):
    generator = torch.Generator().manual_seed(0)
    dreams = dream(teacher, torch.zeros(1, 1, 8, 8), 48, 80, generator)
    assert dreams.as_meant > 0.5
    with torch.no_grad():
        found = teacher(dreams.inputs).argmax(1)
        block = teacher.blocks[0]
        noise = strange(block.conv(normal(48, 1, 8, 8)), block.norm)
        usual = strange(block.conv(dreams.inputs), block.norm)
    assert int((found == dreams.classes).sum()) == round(48 * dreams.as_meant)
    assert dreams.classes.bincount().tolist() == [12] * 4
    assert usual < 0.2 * noise
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_learns_without_a_single_real_input(teacher, task):
    inputs, labels = pictures(256, 30)
    student = picture_net(6, seed=1)
    data_free(student, task, original=teacher, epochs=20, rate=1e-2, inputs=192, steps=60)
    accuracy = float((student(inputs).argmax(1) == labels).float().mean())
    assert outcome(student)["as_meant"] > 0.5
    assert outcome(student)["divergence_after"] < 0.5 * outcome(student)["divergence_before"]
    assert accuracy > 0.8


def test_zeros_stay_and_the_same_seed_gives_the_same_bits(teacher, task):
    options = {"epochs": 2, "rate": 1e-2, "inputs": 32, "steps": 5}
    steps = [
        {"method": "prune.magnitude", "options": {"sparsity": 0.5}},
        {"method": "distill.data_free", "options": options},
    ]
    one, same = (run(picture_net(6, seed=1), steps, task, original=teacher) for _ in range(2))
    steps[1]["options"] = {**options, "generator": 1}
    other = run(picture_net(6, seed=1), steps, task, original=teacher)
    before = magnitude(picture_net(6, seed=1), sparsity=0.5).blocks[1].conv.weight
    weight = one.blocks[1].conv.weight
    assert torch.equal(weight == 0, before == 0)
    assert torch.equal(weight, same.blocks[1].conv.weight)
    assert not torch.equal(weight, other.blocks[1].conv.weight)


def test_the_values_of_the_tasks_inputs_do_not_matter(teacher):
    def done(value: float) -> nn.Module:
        data = classification(calibration=torch.full((1, 1, 8, 8), value))
        student = picture_net(6, seed=1)
        return data_free(student, data, original=teacher, epochs=1, rate=1e-2, inputs=16, steps=3)

    assert torch.equal(done(0.0).head.weight, done(7.0).head.weight)


def test_the_teacher_is_left_as_it_was(teacher, task):
    before = copy.deepcopy(teacher.state_dict())
    data_free(picture_net(6), task, original=teacher, epochs=1, inputs=16, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_what_cannot_be_done_is_refused(teacher, task):
    flat = classification(calibration=normal(4, 8))
    with pytest.raises(ModelError, match=r"the teacher, Sequential, has none with statistics; use"):
        data_free(mlp(4), flat, original=mlp(4))
    amounts = regression(calibration=torch.zeros(2, 1, 8, 8))
    with pytest.raises(
        TaskError, match=r"a task of regression on torch.float32; use distill.logits"
    ):
        data_free(picture_net(4), amounts, original=teacher)
    words = classification(calibration=tokens(4, 6))
    with pytest.raises(TaskError, match=r"a task of classification on torch.int64"):
        data_free(picture_net(4), words, original=teacher)
    several = classification(calibration=texts(4, 0))
    with pytest.raises(TaskError, match=r"a task of classification on several tensors"):
        data_free(picture_net(4), several, original=teacher)
    with pytest.raises(TaskError, match=r"must know the shape of an input; pass a task"):
        data_free(picture_net(4), original=teacher)
    with pytest.raises(OptionError, match=r"data_free compares with another network"):
        data_free(picture_net(4), task)
