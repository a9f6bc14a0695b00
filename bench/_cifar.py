"""CIFAR-10 as benchmarks train on it: lossless images, and those of the whole set coded as JPEG."""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from torch import Tensor
from torch.nn import functional

import zoo
from tersor.task import Task, classification

HELD_OUT = 2000


class Crops:
    """Shuffled batches of training images, shifted by up to `pad` pixels, half of them mirrored."""

    def __init__(self, images: Tensor, labels: Tensor, size: int = 64, pad: int = 4) -> None:
        """images: (n, 3, 32, 32)"""
        self.images, self.labels, self.size, self.pad = images, labels, size, pad
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        padded = functional.pad(self.images, (self.pad,) * 4)
        for at in torch.randperm(len(padded), generator=self.generator).split(self.size):
            y, x = torch.randint(2 * self.pad + 1, (2, len(at)), generator=self.generator)
            inside = torch.arange(32)
            rows = (y[:, None] + inside)[:, None, :, None]
            columns = (x[:, None] + inside)[:, None, None, :]
            channels = torch.arange(3)[None, :, None, None]
            found = padded[at[:, None, None, None], channels, rows, columns]
            mirrored = torch.rand(len(at), generator=self.generator) < 0.5
            found[mirrored] = found[mirrored].flip(3)
            yield found, self.labels[at]


def cifar() -> Task:
    """Calibrated on training images; trained on all 8,068 of them."""
    images, labels = zoo.cifar10("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return classification(
        test=zoo.cifar10("test"),
        train=Crops(images, labels),
        calibration=images[order[:512]],
        holdout=images[order[-512:]],
    )


def pictures() -> Task:
    """The lossless training images and 48,000 of the JPEG-coded ones; 2,000 choose an epoch."""
    sharp, coded = zoo.cifar10("train"), zoo.cifar10_jpeg("train")
    order = torch.randperm(len(coded[0]), generator=torch.Generator().manual_seed(0))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    images, labels = (torch.cat([a, b[rest]]) for a, b in zip(sharp, coded, strict=True))
    return classification(
        test=zoo.cifar10("test"),
        train=Crops(images, labels),
        calibration=sharp[0][torch.arange(0, len(sharp[0]), 16)],
        holdout=coded[0][held],
    )
