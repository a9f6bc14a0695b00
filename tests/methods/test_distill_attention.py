"""Attention transfer: where a layer looks, whatever its channels are."""

import math

import pytest
import torch
from torch import Tensor, nn

from methods.toys import mlp, normal, outcome, picture_net, pictures
from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import run
from tersor.methods.distill.attention import apart, attention
from tersor.methods.prune.magnitude import magnitude
from tersor.task import Task, classification


@pytest.fixture
def task() -> Task:
    return classification(calibration=pictures(96, 1)[0], holdout=pictures(64, 3)[0])


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return picture_net(12, steps=60)


def naive(own: Tensor, theirs: Tensor) -> float:
    """Eq. 2 of the paper for one sample and one pair, place by place."""
    maps = []
    for output in (own, theirs):
        places = output.flatten(1).T.tolist()
        energies = [sum(value**2 for value in channels) for channels in places]
        length = math.sqrt(sum(e**2 for e in energies))
        maps.append([e / length for e in energies])
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(*maps, strict=True)))


@pytest.mark.parametrize(("few", "many"), [((3, 4, 4), (7, 4, 4)), ((2, 5), (3, 5))])
def test_the_distance_is_that_of_the_paper(few, many):
    own, theirs = normal(4, *few, seed=1), normal(4, *many, seed=2)
    expected = sum(naive(*pair) for pair in zip(own, theirs, strict=True)) / 4
    assert float(apart(own, theirs)) == pytest.approx(expected, rel=1e-5)


def test_two_maps_worked_by_hand():
    # Energies (9 + 16, 0) and (0, 4): at right angles, so sqrt(2) apart. Signs do not matter.
    own, theirs = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert float(apart(own, theirs)) == pytest.approx(math.sqrt(2))
    assert float(apart(own, -7 * own)) == pytest.approx(0, abs=1e-6)


def test_maps_of_two_sizes_are_averaged_and_masked_tokens_do_not_count():
    large = torch.tensor([[[1.0, 3.0, 0.0, 0.0]]])
    assert float(apart(torch.tensor([[[2.0, 0.0]]]), large)) == pytest.approx(0, abs=1e-6)
    own, theirs = normal(1, 3, 4, seed=1), normal(1, 3, 4, seed=2)
    expected = apart(own[..., :3], theirs[..., :3])
    own[..., 3] = 1e3
    assert torch.allclose(apart(own, theirs, torch.tensor([[1, 1, 1, 0]])), expected)


def test_layers_that_look_alike_or_at_nothing_spoil_no_gradient():
    own = normal(2, 3, 4).requires_grad_()
    (apart(own, own.detach()) + apart(own * 0, own.detach())).backward()
    assert own.grad.isfinite().all()


def test_a_student_with_fewer_channels_looks_where_its_teacher_looks(task, teacher):
    inputs = pictures(32, 9)[0]

    def done(weight: float) -> tuple[nn.Module, float]:
        student = picture_net(4, seed=1)
        attention(student, task, original=teacher, epochs=10, rate=1e-2, weight=weight)
        with torch.no_grad():
            own, theirs = (net.blocks[1](net.blocks[0](inputs)) for net in (student, teacher))
        return student, float(apart(own, theirs))

    assert done(5.0)[1] < 0.8 * done(0.0)[1]
    student, _ = done(0.5)
    assert outcome(student)["pairs"] == [[f"blocks.{n}", f"blocks.{n}"] for n in range(3)]
    assert outcome(student)["divergence_after"] < 0.8 * outcome(student)["divergence_before"]


def test_zeros_stay_and_the_same_seed_gives_the_same_bits(task, teacher):
    steps = [
        {"method": "prune.magnitude", "options": {"sparsity": 0.5}},
        {"method": "distill.attention", "options": {"epochs": 2, "rate": 1e-2}},
    ]
    one, same = (run(picture_net(6, seed=1), steps, task, original=teacher) for _ in range(2))
    before = magnitude(picture_net(6, seed=1), sparsity=0.5).blocks[1].conv.weight
    assert torch.equal(one.blocks[1].conv.weight == 0, before == 0)
    assert torch.equal(one.blocks[1].conv.weight, same.blocks[1].conv.weight)
    assert not torch.equal(one.blocks[1].conv.weight, before)


def test_what_cannot_be_done_is_refused(task, teacher):
    with pytest.raises(ModelError, match=r"attention finds no repeated blocks in the student"):
        attention(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), task, original=teacher)
    with pytest.raises(ModelError, match=r"compares places, and a layer gives \(2, 4\)"):
        attention(picture_net(6), task, original=teacher, pairs={"head": "head"})
    with pytest.raises(OptionError, match=r"pairs=.* the student has no layer 'block'"):
        attention(picture_net(6), task, original=teacher, pairs={"block": "head"})
    with pytest.raises(TaskError, match=r"attention needs inputs to train on; pass a task"):
        attention(picture_net(6), original=teacher)
    with pytest.raises(OptionError, match=r"attention compares with another network"):
        attention(mlp(4), task)
