"""Placing: grids where a runtime can go on with integers, and nowhere else."""

import torch
from torch import nn

from tersor.measure.flow import watch
from tersor.methods.placing import spots
from tersor.surgery.fold import fold


def placed(net, x, layers=None):
    """{(path, where), ...} of each grid, and the paths of the layers it feeds."""
    names = {module: name for name, module in net.named_modules()}
    chosen = set(net.modules()) if layers is None else layers
    return [
        ({(names[m], where) for m, where in spot.places}, [names[m] for m in spot.layers])
        for spot in spots(watch(net.eval(), lambda: net(x)), chosen)
    ]


class Residual(nn.Module):
    """A block as torchvision has them: one ReLU module, called twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


def test_a_residual_network_stays_in_integers():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Residual(), Residual(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    fold(net, x)
    assert placed(net, x) == [
        ({("0", "input")}, ["0"]),
        # The convolution and the shortcut read the same integers.
        ({("2", "output")}, ["3.conv1"]),
        # The ReLU runs twice, so the grid sits where its first result enters.
        ({("3.conv2", "input")}, ["3.conv2"]),
        ({("3", "output")}, ["4.conv1"]),
        ({("4.conv2", "input")}, ["4.conv2"]),
        ({("7", "input")}, ["7"]),
        # No ReLU between these and the sum: a runtime needs a rounding right behind them.
        ({("3.conv2", "output")}, []),
        ({("4.conv2", "output")}, []),
    ]


def test_pooling_passes_a_grid_on():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Flatten(),
        nn.Linear(4, 2),
    ).eval()  # fmt: skip
    assert placed(net, torch.randn(2, 3, 8, 8)) == [
        ({("0", "input")}, ["0"]),
        ({("2", "output")}, ["3"]),
        # What the last layer reads is the convolution's own output, flattened.
        ({("5", "input"), ("3", "output")}, ["5"]),
    ]


def test_linear_layers_fed_the_same_share_a_grid_and_the_stream_stays_float():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.query, self.key, self.out = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            y = self.norm(x)
            return x + self.out(self.query(y) * self.key(y))

    assert placed(nn.Sequential(Block(), nn.Linear(8, 2)), torch.randn(2, 5, 8)) == [
        ({("0.query", "input"), ("0.key", "input")}, ["0.query", "0.key"]),
        ({("0.out", "input")}, ["0.out"]),
        ({("1", "input")}, ["1"]),
    ]


def test_layers_that_were_not_chosen_or_not_called_get_none():
    net = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2, batch_first=True), "head": nn.Linear(8, 2)}
    )
    net.forward = lambda x: net["head"](net["attention"](x, x, x)[0])
    x = torch.randn(2, 5, 8)
    assert placed(net, x) == [({("head", "input")}, ["head"])]
    assert placed(net, x, {net["attention"].out_proj}) == []


def test_a_layer_called_twice_has_one_grid_for_all_that_enters_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(8, 8)

        def forward(self, x):
            x = self.conv(self.conv(x).relu())
            return self.linear(self.linear(x).tanh())

    assert placed(Twice(), torch.randn(2, 3, 8, 8)) == [
        ({("conv", "input")}, ["conv"]),
        ({("linear", "input")}, ["linear"]),
    ]
