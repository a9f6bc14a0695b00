import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import zoo
from tersor.errors import ModelError, OptionError, TaskError
from tersor.forms import Affine, Dense
from tersor.measure import divergence_of, probing, reference_outputs, sensitivity, swapped
from tersor.measure.running import unfused
from tersor.program.interpreter import Interpreted
from tersor.program.trace import trace
from tersor.surgery import walk
from tersor.task import classification, language_model, regression

OPTIONS = {
    f"int{bits}": lambda site, bits=bits: Affine.encode(site.weight, bits=bits, axis=site.axis)
    for bits in (8, 3)
}


def images(n=12, classes=4, side=8, batch_size=5):
    x = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    return classification(calibration=x, batch_size=batch_size)


class InPlace(nn.Module):
    """In-place operators, views, two branches, and a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        out = self.left(x)
        out.relu_()
        other = self.right(x)
        kept = out[:, ::2].mean()
        out += other
        out[:, 0] *= 0.5
        other.mul_(2)
        flat = out.mean((2, 3)) + other.flatten(2).amax(2) * kept
        flat = self.twice(flat).relu_()
        return self.head(self.twice(flat.t().t()))


class Branching(nn.Module):
    """Which layer runs last depends on what the first one says."""

    def __init__(self):
        super().__init__()
        self.first, self.low, self.high = nn.Linear(192, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.high(x) if x.sum() > 0 else self.low(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.cell = nn.LSTM(8, 6, 2, bidirectional=True), nn.GRUCell(12, 4)

    def forward(self, x):
        return self.cell(self.rnn(x.flatten(1, 2).transpose(0, 1))[0][-1])


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.old = weight_norm(nn.Linear(192, 8))
        self.new = parametrizations.weight_norm(nn.Linear(8, 8))
        self.round = parametrizations.orthogonal(nn.Linear(8, 4))

    def forward(self, x):
        return self.round(self.new(self.old(x.flatten(1)).relu()))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.encoder(x.flatten(1, 2)).mean(1))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(192, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(x + torch.rand(x.shape, generator=torch.Generator().manual_seed(1)))


class Counting(nn.Module):
    """Does other operators on every call, to the same effect."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(192, 4), nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        x = self.first(x.flatten(1))
        for _ in range(self.calls % 3):
            x = x.clone()
        return self.last(x)


class Small(nn.Sequential):
    def __init__(self):
        conv = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        super().__init__(*conv, nn.Flatten(), nn.Linear(144, 4))


NETWORKS = (
    InPlace,
    Branching,
    Recurrent,
    Parametrized,
    Attention,
    Noisy,
    Counting,
    lambda: zoo.CifarResNet(8),
)


def naive(model, task, options):
    """Every option on a deep copy, everything computed."""
    inputs, found = task.calibration(), []
    reference = [task.predict(model, batch) for batch in inputs]
    for number, site in enumerate(walk(model)):
        for make in options.values():
            changed = copy.deepcopy(model)
            walk(changed)[number].hold(make(site))
            rows = [
                task.divergence(outputs, task.predict(changed, batch))
                for outputs, batch in zip(reference, inputs, strict=True)
            ]
            found.append(torch.cat(rows).double().mean().item())
    return found


@pytest.mark.parametrize("make", NETWORKS, ids=lambda m: m.__name__)
def test_skipping_changes_no_figure(make):
    model, task = make().eval(), images()
    with torch.no_grad(), unfused():
        expected = naive(model, task, OPTIONS)
    found = sensitivity(model, task, OPTIONS)
    assert [row.divergence for row in found] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert max(expected) > 1e-6
    inputs = task.calibration()
    reference = reference_outputs(model, task, inputs)
    full = []
    for site in walk(model):
        for option in OPTIONS.values():
            with swapped(site, option(site)):
                full.append(divergence_of(model, task, inputs, reference))
    assert [row.divergence for row in found] == full


@pytest.mark.parametrize("make", NETWORKS, ids=lambda m: m.__name__)
def test_the_model_is_left_exactly_as_it_was(make):
    model, task = make().train(), images()
    list(model.modules())[-1].eval()
    everything = [(m, type(m), dict(m.__dict__), m.training) for m in model.modules()]
    tensors = {
        name: (t, t.clone(), t.data_ptr(), t.requires_grad)
        for name, t in model.state_dict(keep_vars=True).items()
    }
    sensitivity(model, task, OPTIONS)
    now = [(m, type(m), m.training) for m in model.modules()]
    assert now == [(m, kind, training) for m, kind, _, training in everything]
    for module, _, contents, _ in everything:
        assert module.__dict__.keys() == contents.keys()
        assert list(module._parameters) == list(contents["_parameters"])
    for name, tensor in model.state_dict(keep_vars=True).items():
        before, value, place, grad = tensors[name]
        assert tensor is before
        assert torch.equal(tensor, value)
        assert (tensor.data_ptr(), tensor.requires_grad) == (place, grad)
    assert all(p.grad is None for p in model.parameters())


def test_prefix_is_not_computed_again():
    model, task = zoo.CifarResNet(8).eval(), images(batch_size=12)
    ran = []
    conv = torch.ops.aten.convolution.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(func is conv)
            return func(*args, **kwargs or {})

    with Watch(), probing(model, task, task.calibration()) as divergence:
        sites = {site.name: site for site in walk(model)}
        form = OPTIONS["int3"](last := sites["layer3.0.conv2.weight"])
        first = divergence(last, form)
        ran.clear()
        assert divergence(last, form) == first > 0
        assert sum(ran) == 1
        first = sites["conv1.weight"]
        divergence(first, OPTIONS["int3"](first))
        ran.clear()
        divergence(first, OPTIONS["int3"](first))
        assert sum(ran) == 7


def test_figures_are_those_of_a_hand_made_case():
    # One weight 1.0 of a linear map; stored as 0.5 every output halves. The variance of 0, 1, 2, 3
    # is 1.25, the squared errors are 0, .25, 1, 2.25: their mean over it is 0.7.
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    inputs = torch.arange(4.0)[:, None]
    task = regression(calibration=inputs, holdout=inputs)
    halved = {"half": lambda site: Dense.encode(site.weight / 2, dtype=torch.float16)}
    found = sensitivity(net, task, halved)
    assert [(r.site, r.option, r.bytes) for r in found] == [("weight", "half", 2)]
    assert found[0].divergence == pytest.approx(0.7)


def test_tied_weights_move_together_and_come_back_tied():
    net = zoo.Stories(vocabulary=32, width=16, layers=1)
    ids = torch.randint(0, 32, (6, 9), generator=torch.Generator().manual_seed(3))
    task = language_model(calibration=ids)
    site = walk(net)[0]
    assert len(site.uses) == 2
    found = sensitivity(net, task, OPTIONS, sites=[site])
    assert 0 < found[0].divergence < found[1].divergence
    assert net.output.weight is net.tok_embeddings.weight
    assert found[0].divergence == pytest.approx(naive(net, task, {"int8": OPTIONS["int8"]})[0])


def test_held_weights_are_measured_against_the_held_model():
    net = zoo.CifarResNet(8).eval()
    sites = walk(net)
    for site in sites:
        site.hold(Affine.encode(site.weight, bits=5, axis=site.axis))
    forms = [site.form for site in sites]
    found = sensitivity(net, images(), {"same": lambda site: site.form, **OPTIONS})
    assert [row.divergence for row in found if row.option == "same"] == [0.0] * len(sites)
    assert all(row.divergence > 0 for row in found if row.option == "int3")
    assert [site.form for site in sites] == forms
    assert all(form._decoded is None for form in forms)


def test_a_network_read_from_a_file_gives_the_same_figures():
    net, task = Small().eval(), images()
    again = Interpreted(trace(copy.deepcopy(net), (torch.zeros(2, 3, 8, 8),)), copy.deepcopy(net))
    first, second = sensitivity(net, task, OPTIONS), sensitivity(again, task, OPTIONS)
    assert [row.site for row in first] == [row.site for row in second]
    assert [r.divergence for r in second] == pytest.approx([r.divergence for r in first], rel=1e-5)


def test_results_are_reported_one_by_one_with_the_callers_bytes():
    seen = []
    net, task = zoo.CifarResNet(8).eval(), images()
    found = sensitivity(net, task, OPTIONS, size_of=lambda form: 7, on_result=seen.append)
    assert seen == found == sensitivity(net, task, OPTIONS, size_of=lambda form: 7)
    assert {row.bytes for row in found} == {7}
    assert json.dumps(found[0].as_json()).startswith('{"site": "conv1.weight", "option": "int8"')


def test_an_option_that_breaks_the_outputs_is_infinitely_bad():
    broken = {"broken": lambda site: Dense(torch.full_like(site.weight, torch.nan), torch.float32)}
    found = sensitivity(InPlace().eval(), images(), broken)
    assert {row.divergence for row in found} == {math.inf}
    assert found[0].as_json()["divergence"] is None


def test_an_error_inside_puts_everything_back():
    net = zoo.CifarResNet(8)
    weight = net.conv1.weight
    site = walk(net)[0]
    with pytest.raises(ZeroDivisionError), swapped(site, OPTIONS["int3"](site)):
        1 / 0  # noqa: B018
    assert net.conv1.weight is weight
    assert type(net.conv1) is nn.Conv2d


def test_refusals():
    net = zoo.CifarResNet(8)
    with pytest.raises(OptionError, match=r"options=\{\} has nothing to try"):
        sensitivity(net, images(), {})
    with pytest.raises(TaskError, match="no calibration inputs; give the task at least one batch"):
        sensitivity(net, images(), OPTIONS, inputs=[])
    with pytest.raises(TaskError, match="no calibration inputs"):
        reference_outputs(net, images(), [])
    nn.init.constant_(net.linear.bias, torch.nan)
    with pytest.raises(
        ModelError, match="CifarResNet gives NaN in 6 of the 6 outputs of calibration batch 1"
    ):
        sensitivity(net, images(), OPTIONS)
