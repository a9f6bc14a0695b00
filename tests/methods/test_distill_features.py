"""Hints: the student's layers come to give what the teacher's give, and nothing is left behind."""

import copy

import pytest
import torch
from torch import Tensor, nn

from methods.toys import mlp, normal, outcome, picture_net, pictures
from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import run
from tersor.methods.cut.depth import depth
from tersor.methods.distill.features import error, features
from tersor.methods.inside import Regressors
from tersor.methods.prune.magnitude import magnitude
from tersor.task import Task, classification


@pytest.fixture
def task() -> Task:
    return classification(calibration=pictures(96, 1)[0], holdout=pictures(64, 3)[0])


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return picture_net(12, steps=40)


def inner(net: nn.Module, path: str, inputs: Tensor) -> Tensor:
    found: list[Tensor] = []
    hook = net.get_submodule(path).register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        net(inputs)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (3, 5, 2, 2)])
def test_the_error_is_that_of_the_paper_over_the_mean_square(shape):
    own, theirs = normal(*shape, seed=1), normal(*shape, seed=2)
    pairs = list(zip(own.flatten().tolist(), theirs.flatten().tolist(), strict=True))
    half = sum(0.5 * (b - a) ** 2 for a, b in pairs)
    assert float(error(own, theirs)) == pytest.approx(half / sum(b**2 for _, b in pairs), rel=1e-5)


def test_an_error_worked_by_hand():
    # Averaged to two places the teacher gives 2 and 6, the student 2 and 4: (0 + 4) / 2 over 40.
    own, theirs = torch.tensor([[[2.0, 4.0]]]), torch.tensor([[[1.0, 3.0, 5.0, 7.0]]])
    assert float(error(own, theirs)) == pytest.approx(2 / 40)


def test_what_a_mask_leaves_out_does_not_count():
    own, theirs = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    expected = error(own[:, :, :2], theirs[:, :, :2])
    own[:, :, 2:] = 1e3
    assert torch.allclose(error(own, theirs, mask), expected)


def test_regressors_are_linear_in_the_channels():
    maps = Regressors([(3, 3), (3, 5)], torch.Generator().manual_seed(0))
    x = normal(2, 3, 4, 4)
    assert torch.equal(maps(0, x), x)
    expected = nn.functional.conv2d(x, maps.maps[1].weight[:, :, None, None], maps.maps[1].bias)
    assert torch.allclose(maps(1, x), expected, atol=1e-6)


def test_a_thin_student_comes_closer_and_keeps_no_regressor(task, teacher):
    student = picture_net(6, seed=1, blocks=2, stride=2)
    names, before = list(student.state_dict()), copy.deepcopy(student)
    features(student, task, original=teacher, epochs=12, rate=1e-2)
    assert outcome(student)["pairs"] == [["blocks.0", "blocks.1"], ["blocks.1", "blocks.2"]]
    assert outcome(student)["divergence_after"] < 0.6 * outcome(student)["divergence_before"]
    assert list(student.state_dict()) == names
    assert outcome(student)["trained"] == sum(p.numel() for p in before.parameters())
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


def test_hints_bring_layers_closer_than_answers_alone(task, teacher):
    inputs = pictures(32, 9)[0]
    wanted = inner(teacher, "blocks.1", inputs)

    def apart(weight: float) -> float:
        student = picture_net(12, seed=1)
        features(student, task, original=teacher, epochs=6, rate=1e-2, weight=weight)
        return float(error(inner(student, "blocks.1", inputs), wanted))

    assert apart(10.0) < 0.6 * apart(0.0)


def test_zeros_stay_and_the_same_seed_gives_the_same_bits(task, teacher):
    def done(seed: int) -> nn.Module:
        student = magnitude(picture_net(6, seed=1), sparsity=0.5)
        return features(student, task, original=teacher, epochs=2, rate=1e-2, generator=seed)

    one, same, other = done(1), done(1), done(2)
    before = magnitude(picture_net(6, seed=1), sparsity=0.5).blocks[1].conv.weight
    assert torch.equal(one.blocks[1].conv.weight == 0, before == 0)
    assert torch.equal(one.blocks[1].conv.weight, same.blocks[1].conv.weight)
    assert not torch.equal(one.blocks[1].conv.weight, other.blocks[1].conv.weight)


def test_a_network_that_was_cut_learns_from_what_it_was(task, teacher):
    student = copy.deepcopy(teacher)
    depth(student, task, include="blocks.*")
    features(student, task, original=teacher, epochs=12, rate=5e-3)
    assert len(outcome(student)["pairs"]) == 2
    assert all(own == theirs for own, theirs in outcome(student)["pairs"])
    assert outcome(student)["divergence_after"] < 0.7 * outcome(student)["divergence_before"]


def test_given_pairs_are_used_and_noted_in_the_recipe(task, teacher):
    steps = [{"method": "distill.features", "options": {"pairs": {"blocks.0": "blocks.2"}}}]
    done = run(picture_net(6, seed=1), steps, task, original=teacher)
    assert done.recipe.steps[0].options["pairs"] == {"blocks.0": "blocks.2"}
    assert outcome(done)["pairs"] == [["blocks.0", "blocks.2"]]


def test_what_cannot_be_done_is_refused(task, teacher):
    with pytest.raises(ModelError, match=r"features finds no repeated blocks in the student"):
        features(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), task, original=teacher)
    with pytest.raises(OptionError, match=r"pairs=.* the teacher has no layer 'blocks.7'"):
        features(picture_net(6), task, original=teacher, pairs={"blocks.0": "blocks.7"})
    with pytest.raises(ModelError, match=r"gives \(.*\) and the teacher's"):
        features(picture_net(6), task, original=teacher, pairs={"blocks.0": "head"})
    with pytest.raises(TaskError, match=r"features needs inputs to train on; pass a task"):
        features(picture_net(6), original=teacher)
    unused = picture_net(6)
    unused.spare = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"layer 'spare' of the student gives no tensor"):
        features(unused, task, original=teacher, pairs={"spare": "blocks.0"})
    two = classification(calibration=normal(64, 8), holdout=normal(32, 8))
    with pytest.raises(OptionError, match=r"features compares with another network"):
        features(mlp(4), two)
