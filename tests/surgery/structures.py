"""Small networks, each with one way of connecting channels that a cut has to respect."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(
    inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Shuffle(nn.Module):
    """ShuffleNetV2: half of the channels pass by, then the halves are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.units = nn.ModuleList(
            nn.Sequential(block(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), block(8, 8, 1))
            for _ in range(2)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for unit in self.units:
            left, right = x.chunk(2, dim=1)
            x = torch.cat([left, unit(right)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """DenseNet: every layer sees the outputs of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(8 + 4 * n), nn.ReLU(), nn.Conv2d(8 + 4 * n, 4, 3, padding=1)
            )
            for n in range(3)
        )
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return self.head(torch.cat(seen, 1).mean((2, 3)))


class Squeeze(nn.Module):
    """SqueezeNet: a narrow layer feeds two that are joined; the last convolution is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, stride=2)
        self.squeeze = nn.Conv2d(16, 6, 1)
        self.one, self.three = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(F.max_pool2d(self.stem(x), 3, 2)).relu()
        x = torch.cat([self.one(x).relu(), self.three(x).relu()], 1)
        return F.adaptive_avg_pool2d(self.last(x), 1).flatten(1)


class UNet(nn.Module):
    """Down and up again, with what was there on the way down joined on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, 8), block(8, 12), block(12, 16)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)])
        self.join = nn.ModuleList([block(24, 12), block(16, 8)])
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        x = self.down[2](F.max_pool2d(second, 2))
        for up, join, other in zip(self.up, self.join, (second, first), strict=True):
            x = join(torch.cat([up(x), other], 1))
        return self.last(x)


class Inception(nn.Module):
    """Four branches of different widths, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 12)
        self.branches = nn.ModuleList(
            [
                block(12, 4, 1),
                nn.Sequential(block(12, 6, 1), block(6, 8)),
                nn.Sequential(block(12, 3, 1), block(3, 4, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), block(12, 4, 1)),
            ]
        )
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([branch(x) for branch in self.branches], 1)
        return self.head(x.mean((2, 3)))


class Mixer(nn.Module):
    """MLP-Mixer: one perceptron mixes tokens, another channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8)
        self.tokens = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16))
        self.channels = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
        self.norms = nn.ModuleList([nn.LayerNorm(24), nn.LayerNorm(24)])
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(1))


class TiedAutoencoder(nn.Module):
    """The decoder multiplies with the encoder's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(30, 20), nn.Linear(20, 8)
        self.shift = nn.Parameter(torch.randn(20))

    def forward(self, x: Tensor) -> Tensor:
        code = self.second(self.first(x).relu()).relu()
        wide = F.linear(code, self.second.weight.t(), self.shift).relu()
        return F.linear(wide, self.first.weight.t())


class Siamese(nn.Module):
    """Two inputs through the same layers, compared."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 8), block(8, 12), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(48, 10)
        self.last = nn.Linear(10, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, second = self.head(self.body(x)), self.head(self.body(y))
        return self.last((first - second).abs())


class Branching(nn.Module):
    """Python decides by sizes which way to go, and loops over its layers."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.depth = depth
        self.stem = nn.Linear(12, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for n in range(self.depth):
            if n % 2 == 0 and x.shape[-1] > 4:
                x = x + self.layers[n](x).tanh() * self.gates[n](x).sigmoid()
            else:
                x = torch.where(x > 0, self.layers[n](x), 0.1 * x)
        return self.head(x)


class Recurrent(nn.Module):
    """A two-way LSTM and a GRU behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 12, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(24, 14, batch_first=True)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0][:, -1])


class Queries(nn.Module):
    """DETR-like: learned queries look at a picture's places, with heads of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 16, stride=2), block(16, 24, stride=2))
        self.project = nn.Conv2d(24, 32, 1)
        self.queries = nn.Parameter(torch.randn(6, 32))
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
        self.classes, self.boxes = nn.Linear(32, 4), nn.Linear(32, 4)
        self.heads = 4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = self.project(self.body(x)).flatten(2).transpose(1, 2)
        asked = self.queries.expand(len(x), -1, -1)
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, t in ((self.q, asked), (self.k, places), (self.v, places))
        )
        found = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = self.norm(asked + self.o(found.transpose(1, 2).flatten(2)))
        x = x + self.mlp(x)
        return self.classes(x), self.boxes(x).sigmoid()


class Grouped(nn.Module):
    """Group norms, grouped convolutions, a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.wide = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.up = nn.Conv2d(32, 24, 1)
        self.last = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.norm(self.stem(x)).relu()).relu()
        return self.last(F.pixel_shuffle(self.up(x), 2))


IMAGE, PATCHES = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
NETS = {
    "shuffle": (Shuffle, (IMAGE,)),
    "dense": (Dense, (IMAGE,)),
    "squeeze": (Squeeze, (IMAGE,)),
    "unet": (UNet, (IMAGE,)),
    "inception": (Inception, (IMAGE,)),
    "mixer": (Mixer, (IMAGE,)),
    "tied autoencoder": (TiedAutoencoder, (torch.randn(3, 30),)),
    "siamese": (Siamese, (IMAGE, PATCHES)),
    "branching": (Branching, (torch.randn(3, 12),)),
    "recurrent": (Recurrent, (torch.randn(2, 5, 10),)),
    "queries": (Queries, (IMAGE,)),
    "grouped": (Grouped, (IMAGE,)),
}
