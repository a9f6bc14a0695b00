"""Distillation: answers come back, from inputs alone, and what was removed stays removed."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import run
from tersor.methods.cut.channels import channels
from tersor.methods.distill.logits import logits
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk
from tersor.task import Task, classification, regression
from tersor.train import Lesson, Teacher
from tersor.train.lessons import standardized


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU()), nn.Dropout(0.5), nn.Linear(32, 5)
    )
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(64, 8))
    return model.eval()


def inputs(n: int, seed: int) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def task() -> Task:
    return classification(calibration=inputs(512, 1), holdout=inputs(128, 2))


def outcome(model: nn.Module) -> dict[str, object]:
    return model.recipe.steps[-1].outcome


@pytest.mark.parametrize(
    "damage",
    [
        lambda model, task: channels(model, task, keep=0.5, merge=False),
        lambda model, task: magnitude(model, sparsity=0.7),
        lambda model, task: magnitude(model, sparsity="2:4"),
    ],
)
def test_most_of_what_was_lost_comes_back(damage, task):
    model, original = net(), net()
    damage(model, task)
    logits(model, task, original=original, epochs=10, rate=5e-3)
    assert outcome(model)["kept"]
    assert outcome(model)["divergence_after"] < 0.5 * outcome(model)["divergence_before"]


def test_zeros_stay_zero_and_codes_stay_codes(task):
    model, original = net(), net()
    magnitude(model, sparsity=0.6, include="0")
    rtn(model, bits=4, include="4")
    zeros, codes = model[0].weight == 0, model[4].weight.clone()
    logits(model, task, original=original, epochs=5, rate=5e-3)
    assert torch.equal(model[0].weight == 0, zeros)
    assert torch.equal(model[4].weight, codes)
    assert not torch.equal(model[1].weight, original[1].weight)


def test_only_what_is_chosen_learns(task):
    model, original = net(), net()
    channels(model, task, keep=0.5, merge=False)
    before = copy.deepcopy(model.state_dict())
    logits(model, task, original=original, epochs=5, rate=5e-3, exclude="0")
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])
    assert not torch.equal(model[4].weight, before["4.weight"])


def test_the_loss_is_that_of_the_paper(task):
    # Hinton et al., section 2: T^2 times the cross entropy of softened answers, up to a constant.
    teacher = Teacher(net(), task, 3.0)
    wanted, found = inputs(7, 3)[:, :5], inputs(7, 4)[:, :5].requires_grad_()
    soft = functional.softmax(wanted / 3, 1)
    expected = 9 * functional.cross_entropy(found / 3, soft)
    (slope,) = torch.autograd.grad(expected, found)
    (own,) = torch.autograd.grad(teacher.loss(found, Lesson(None, answer=wanted)), found)
    assert torch.allclose(own, slope, atol=1e-6)


def test_the_network_and_its_original_are_left_in_order(task):
    model, original = net(), net()
    channels(model, task, keep=0.5)
    trained = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(original.state_dict())
    logits(model, task, original=original, epochs=1)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in (*model.modules(), *original.modules()))
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())


def test_a_network_that_is_as_it_was_stays_so(task):
    model = net()
    before = copy.deepcopy(model.state_dict())
    logits(model, task, original=net(), epochs=1)
    assert not outcome(model)["kept"]
    assert outcome(model)["divergence_before"] == outcome(model)["divergence_after"] == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_training_inputs_come_before_calibration_and_labels_do_not_matter(task):
    def done(labels: Tensor) -> Tensor:
        data = classification(
            train=(inputs(300, 5), labels), calibration=inputs(64, 1), holdout=inputs(64, 2)
        )
        model = net()
        magnitude(model, sparsity=0.7)
        logits(model, data, original=net(), epochs=1)
        return model[0].weight

    assert torch.equal(done(torch.zeros(300).long()), done(torch.arange(300) % 5))


def test_numbers_too():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    data = regression(calibration=inputs(256, 1), holdout=inputs(64, 2))
    steps = [
        {"method": "prune.magnitude", "options": {"sparsity": 0.6}},
        {"method": "distill.logits", "options": {"epochs": 20, "rate": 5e-3}},
    ]
    done = run(original, steps, data)
    assert outcome(done)["divergence_after"] < 0.5 * outcome(done)["divergence_before"]
    assert all((s.weight == 0).float().mean() >= 0.59 for s in walk(done))


def test_what_cannot_be_done_is_refused(task):
    with pytest.raises(TaskError, match=r"distill\.logits needs inputs"):
        logits(net(), original=net())
    with pytest.raises(OptionError, match=r"distill\.logits compares with another network"):
        logits(net(), task)
    model = nn.Sequential(nn.Linear(8, 5, bias=False))
    rtn(model)
    with pytest.raises(OptionError, match="Sequential holds nothing but codes"):
        logits(model, task, original=model)


def test_float16_and_other_classes_are_refused(task):
    with pytest.raises(ModelError, match="float16"):
        logits(net().half(), task, original=net())
    other = nn.Sequential(nn.Linear(8, 7)).eval()
    with pytest.raises(ModelError, match=r"teacher gives \(5,\) numbers .* \(7,\)"):
        logits(other, task, original=net())


@pytest.mark.parametrize("count", [33, 65])
def test_one_sample_left_over_is_no_batch(count):
    data = classification(calibration=inputs(count, 1), holdout=inputs(64, 2))
    logits(net(), data, original=net(), epochs=1)


def test_what_is_left_out_is_not_trained(task):
    model = net()
    magnitude(model, sparsity=0.5)
    before = copy.deepcopy(model)
    logits(model, task, original=net(), epochs=10, rate=5e-3, include="4")
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)
    kept = copy.deepcopy(model)
    logits(model, task, original=net(), epochs=10, rate=5e-3, exclude=["1", "0.bias"])
    assert torch.equal(model[1].weight, kept[1].weight)
    assert torch.equal(model[1].bias, kept[1].bias)


def test_a_batch_norm_that_is_left_out_keeps_its_statistics(task):
    model, original = net(), net()
    magnitude(model, sparsity=0.7)
    logits(model, task, original=original, epochs=2, rate=5e-3, exclude="1")
    assert outcome(model)["kept"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(model[1], name), getattr(original[1], name)), name


def test_rows_of_equal_logits_have_a_gradient():
    outputs = torch.zeros(2, 5, requires_grad=True)
    (slope,) = torch.autograd.grad(standardized(outputs)[:, 0].sum(), outputs)
    assert slope.isfinite().all()
