"""What tests of several processes train, and the simulation that they are held against."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tersor.task import classification
from tersor.train import Labels, Training
from tersor.train.distributed import (
    DGC,
    Int8,
    Portion,
    PowerSGD,
    RandomK,
    Sign,
    TopK,
    Uncompressed,
    simulate,
    world,
)

WORKERS, EPOCHS = 2, 2
FLAT = Training(schedule="constant", warmup=0.0, clip=1e9)
COMPRESSORS = {
    "none": Uncompressed,
    "powersgd": lambda: PowerSGD(1),
    "topk": lambda: TopK(0.1),
    "randomk": lambda: RandomK(0.1),
    "sign": Sign,
    "int8": Int8,
    "dgc": lambda: DGC(0.1, warmup=4),
}


def blobs(n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds in the plane."""
    labels = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
    return centres[labels] + torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), labels


def lessons() -> Labels:
    return Labels(classification(train=blobs(), batch_size=32))


def net(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(2, 16), middle, nn.ReLU(), nn.Linear(16, 3))


class Blocks(nn.Module):
    """The same layers in a list, which are gathered one at a time."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(net())

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def loss_of(model, lesson):
    return functional.cross_entropy(model(lesson.inputs), lesson.targets)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def always_better(first: int = 99):
    """A judge with which the last state is kept."""
    return partial(next, iter([float(n) for n in range(first, 0, -1)]))


def looped(model) -> None:
    """The same in a loop of one's own."""
    optimizer, generator = sgd(model), torch.Generator().manual_seed(1)
    for _ in range(EPOCHS):
        for lesson in Portion(lessons(), *world()).epoch(generator):
            optimizer.zero_grad()
            loss_of(model, lesson).backward()
            optimizer.step()


def simulated(compressor, workers=WORKERS, **options):
    model = net()
    done = simulate(
        model,
        sgd(model),
        lessons(),
        partial(loss_of, model),
        compressor=compressor,
        workers=workers,
        epochs=EPOCHS,
        generator=torch.Generator().manual_seed(1),
        training=FLAT,
        **options,
    )
    return model, done.traffic


def close(state, other, tolerance=1e-5):
    return all(torch.allclose(state[key], other[key], atol=tolerance) for key in other)
