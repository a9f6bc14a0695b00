import copy

import pytest
import torch
from torch import nn

import zoo
from tersor.errors import ModelError, TaskError
from tersor.forms import Affine
from tersor.measure import quality
from tersor.surgery import walk
from tersor.task import classification, language_model, regression


class Given(nn.Module):
    """Answers with what it is asked."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


def test_accuracy_and_its_interval_worked_by_hand():
    # 80 of 100 right: the standard error of the mean is 4 points.
    logits = torch.eye(2)[torch.zeros(100, dtype=torch.long)]
    labels = torch.tensor([0] * 80 + [1] * 20)
    task = classification((logits, labels), metrics=["accuracy"])
    found = quality(Given(), task)["accuracy"]
    assert (found.value, found.n, found.unit) == (pytest.approx(80), 100, "points")
    assert found.higher_is_better
    assert found.low == pytest.approx(80 - 1.96 * 4, abs=1)
    assert found.high == pytest.approx(80 + 1.96 * 4, abs=1)


def test_quality_agrees_with_the_task_and_with_itself():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(120, 6, generator=generator), torch.randint(0, 3, (120,), generator=generator)
    net, task = nn.Linear(6, 3), classification((x, y), batch_size=50)
    found = quality(net, task)
    assert {name: e.value for name, e in found.items()} == pytest.approx(task.evaluate(net))
    assert next(iter(found)) == "accuracy"
    assert found == quality(net, task)
    assert all(e.low <= e.value <= e.high for n, e in found.items() if n == "accuracy")
    assert quality(net, task, seed=1)["accuracy"].low != found["f1"].low


def test_a_sentence_metric_that_is_no_mean_gets_an_interval_too():
    x = torch.linspace(0, 1, 60)[:, None]
    noisy = x + 0.2 * torch.randn(60, 1, generator=torch.Generator().manual_seed(2))
    task = regression((x, noisy), metrics=["spearman", "rmse"])
    found = quality(Given(), task)
    assert 60 < found["spearman"].low < found["spearman"].value < found["spearman"].high <= 100
    assert not found["rmse"].higher_is_better
    assert found["rmse"].value == pytest.approx(0.2, abs=0.05)


def test_language_models_are_judged_by_token():
    net = zoo.Stories(vocabulary=32, width=16, layers=1)
    documents = torch.randint(0, 32, (6, 9), generator=torch.Generator().manual_seed(3))
    found = quality(net, language_model(documents))
    assert found["perplexity"].n == 6 * 8
    assert found["perplexity"].low < found["perplexity"].value < found["perplexity"].high


def test_resnet20_has_its_published_accuracy_in_a_narrow_interval(shared_data):
    images, labels = zoo.cifar10()
    found = quality(zoo.resnet20(), classification((images, labels), metrics=["accuracy"]))
    # One standard error is 0.87 points.
    assert found["accuracy"].value == pytest.approx(91.64, abs=0.01)
    assert found["accuracy"].high - found["accuracy"].low == pytest.approx(2 * 1.96 * 0.87, abs=0.4)


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    net[2].eval()
    for site in walk(net):
        site.hold(Affine.encode(site.weight, bits=4))
    state = copy.deepcopy(net.state_dict())
    quality(net, classification((torch.rand(8, 4), torch.zeros(8, dtype=torch.long))))
    assert [module.training for module in net.children()] == [True, True, False]
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net[0].weight_form._decoded is None


def test_nan_outputs_are_refused_by_batch_and_number():
    net = Given()
    x = torch.rand(10, 3)
    task = classification((x, torch.zeros(10, dtype=torch.long)), batch_size=4)
    net.register_forward_pre_hook(
        lambda _, given: (torch.where(given[0] == x[6, 0], torch.nan, given[0]),)
    )
    with pytest.raises(
        ModelError, match="Given gives NaN in 1 of the 4 outputs of test batch 2, first in number 2"
    ):
        quality(net, task)


def test_a_task_without_test_data_is_refused():
    task = classification(calibration=torch.rand(4, 3))
    with pytest.raises(TaskError, match=r"no test data; give test=\(inputs, targets\)"):
        quality(Given(), task)
