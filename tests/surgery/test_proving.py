"""What a cut would change about the function itself is left alone, and ordinary code is not."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.codec import load, save
from tersor.methods import run
from tersor.methods.cut.channels import channels
from tersor.surgery.coupling import couple
from tersor.surgery.proving import cuttable
from tersor.task import classification


class Net(nn.Module):
    """Hidden units between two layers, and what happens to them."""

    def __init__(self, happens) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.even, self.odd = nn.Linear(8, 4), nn.Linear(8, 4)
        self.norm = nn.GroupNorm(4, 16, affine=False)
        self.width, self.happens = 16, happens
        self.register_buffer("slope", torch.linspace(0, 3, 16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.happens(self, self.a(x))


def longer(y: Tensor, times: int) -> Tensor:
    for _ in range(times):
        y = y * 1.5
    return y


OTHERWISE = {
    "a norm of groups without weights": lambda net, h: net.b(net.norm(h)),
    "a number of groups in the code": lambda net, h: net.b(functional.group_norm(h, 4)),
    "every other unit": lambda net, h: net.even(h[:, ::2]) + net.odd(h[:, 1::2]),
    "a factor that is the width": lambda net, h: net.b(h * h.shape[-1] ** 0.5),
    "a divisor that is the width": lambda net, h: net.b(h.reshape(-1, net.width) / net.width),
    "pooling over units": lambda net, h: net.b(functional.avg_pool1d(h, 3, 1, 1)),
    "places in the code": lambda net, h: net.b(torch.cat([h[:, :8].relu(), h[:, 8:].tanh()], 1)),
    "a loop over the width": lambda net, h: longer(net.b(h), h.shape[1] // 4),
    "a buffer that no file holds": lambda net, h: net.b(h * net.slope[: h.shape[-1]]),
}
ALIKE = {
    "nothing": lambda net, h: net.b(h.relu()),
    "halves": lambda net, h: net.even(h.chunk(2, 1)[0].sigmoid() * h.chunk(2, 1)[1]),
    "a length": lambda net, h: net.b(h / h.norm(p=2, dim=0, keepdim=True)),
    "a largest value": lambda net, h: net.b(
        functional.adaptive_max_pool2d(h[:, :, None, None].relu(), 1).flatten(1)
    ),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_units_whose_number_is_part_of_the_function_are_left(what):
    coupling = cuttable(Net(OTHERWISE[what]).eval(), torch.randn(4, 8))
    assert not coupling.groups
    assert coupling.left["a.weight", 0]


@pytest.mark.parametrize("what", ALIKE)
def test_others_can_be_cut(what):
    coupling = cuttable(Net(ALIKE[what]).eval(), torch.randn(4, 8))
    assert ("a.weight", 0) in coupling.groups[0].places


class Recurrent(nn.Module):
    """A classifier on the last state, or one that gives it away."""

    def __init__(self, kind: str, *, state: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = getattr(nn, kind)(5, 16, batch_first=True)
        self.out, self.state = nn.Linear(16, 3), state

    def forward(self, x: Tensor):
        y, last = self.rnn(x)
        last = last[0] if isinstance(last, tuple) else last
        return (self.out(y[:, -1]), last) if self.state else self.out(last[-1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_last_states_have_the_units_of_their_layers(kind):
    x = torch.randn(4, 6, 5)
    assert couple(Recurrent(kind, state=False).eval(), x).groups
    # As an output of the network they stay as wide as they are.
    assert not couple(Recurrent(kind, state=True).eval(), x).groups


@pytest.mark.parametrize("options", [{"proj_size": 3}, {"hidden_size": 1}])
def test_recurrent_layers_of_other_kinds_are_left(options):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(**{"input_size": 5, "hidden_size": 8, "batch_first": True} | options)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    assert not couple(Small().eval(), torch.randn(2, 4, 5)).groups


def test_outputs_of_a_depthwise_transposed_convolution_stay():
    layers = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2, 2, groups=8, bias=False)
    model = nn.Sequential(*layers).eval()
    assert not couple(model, torch.randn(2, 3, 8, 8)).groups


def test_a_cut_network_goes_through_its_file():
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    task = classification(calibration=x[:128], holdout=x[128:])
    small = run(Net(ALIKE["nothing"]).eval(), [{"method": "cut.channels"}], task)
    assert small.a.out_features == 11


def test_weight_norm_is_put_into_the_weight(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    task = classification(calibration=x[:128], holdout=x[128:])
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))
    model = channels(nn.Sequential(normed, nn.ReLU(), nn.Linear(16, 4)).eval(), task, keep=0.5)
    path = save(model, tmp_path / "m.tersor", example=x[:2])
    with torch.no_grad():
        assert torch.allclose(load(path)(x), model(x), atol=1e-6)


def test_where_a_cut_fails_gradients_are_kept_too():
    model = Net(OTHERWISE["places in the code"]).eval()
    model(torch.randn(4, 8)).sum().backward()
    before = copy.deepcopy([p.grad for p in model.parameters()])
    cuttable(model, torch.randn(4, 8))
    for p, grad in zip(model.parameters(), before, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
