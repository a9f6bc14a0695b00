"""Flow: which tensor went where, by identity, in-place writes and shared scalings included."""

import torch
from torch import nn

from tersor.forms.scaling import Scaling
from tersor.measure.flow import watch
from tersor.surgery.grids import put_scaling


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.block = nn.Sequential(nn.Identity(), nn.ReLU())
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.block(self.first(x))
        y = self.second(x) + x
        y = y.mean((2, 3))
        return self.left(y), self.right(y)


def test_who_gives_and_who_reads_a_tensor():
    net = Branches().eval()
    flow = watch(net, lambda: net(torch.randn(2, 3, 8, 8)))
    value, made = flow.calls[net.second][0]
    assert value.operator == "relu"
    # An identity gives what it was given, and a sequence what its last child gave, later.
    assert value.givers == [net.block[1], net.block]
    assert [operator for operator, _, _ in value.uses] == ["convolution", "add"]
    assert value.uses[0][1] == (net, net.second)
    assert value.uses[1][2] == made.uses[0][2]
    assert flow.calls[net.left][0][0] is flow.calls[net.right][0][0]
    assert flow.calls[net.block][0][0].enters == [net.block, net.block[0], net.block[1]]
    assert flow.once(net.left)
    assert not flow.once(nn.ReLU())


def test_a_tensor_that_is_written_to_is_another_from_then_on():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.last = nn.Conv2d(3, 3, 1), nn.ReLU(True), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = self.conv(x)
            x = self.relu(x)
            x[:, 0] = 1.0
            return self.last(x)

    net = InPlace().eval()
    flow = watch(net, lambda: net(torch.randn(2, 3, 4, 4)))
    (_, made), (_, rectified) = flow.calls[net.conv][0], flow.calls[net.relu][0]
    assert made is not rectified
    assert made.uses[0][2] == (rectified,)
    assert rectified.givers == [net.relu]
    # Part of it was overwritten, so what the last layer reads is no module's output.
    assert flow.calls[net.last][0][0] is not rectified
    assert flow.calls[net.last][0][0].givers == []


def test_values_are_followed_back_to_where_they_were_made():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)).eval()
    flow = watch(net, lambda: net(torch.randn(2, 3, 8, 8)))
    value = flow.calls[net[3]][0][0]
    assert flow.calls[net[0]][0][1] in list(value.origins())
    assert flow.calls[net[0]][0][0] not in list(value.origins())


def test_layers_that_share_a_scaling_are_fed_the_same():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.other = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.query(x) + self.key(x) + self.other(x)

    net = Heads().eval()
    shared = Scaling(torch.rand(4))
    put_scaling(net.query, shared)
    put_scaling(net.key, shared)
    put_scaling(net.other, Scaling(torch.rand(4)))
    flow = watch(net, lambda: net(torch.randn(2, 4)))
    fed = [flow.calls[layer][0][0] for layer in (net.query, net.key, net.other)]
    assert fed[0] is fed[1] is not fed[2]
