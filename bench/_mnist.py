"""MNIST as benchmarks read it: pictures in 0..1, as they are or moved about."""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from torch import Tensor, nn

import zoo

SHIFT = 2


def images(split: str) -> tuple[Tensor, Tensor]:
    """(n, 1, 28, 28) in 0..1, and labels."""
    with np.load(zoo.DATA / "mnist.npz") as arrays:
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    return torch.from_numpy(x).float()[:, None] / 255, torch.from_numpy(y).long()


class Shifted:
    """Batches of pictures, each moved by up to two pixels; another order in each epoch."""

    def __init__(self, pictures: Tensor, labels: Tensor, *, batch: int, seed: int = 0) -> None:
        """pictures: (n, 1, 28, 28)"""
        self._pictures = nn.functional.pad(pictures[:, 0], [SHIFT] * 4)
        self._labels, self._batch = labels, batch
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self._labels), generator=self._generator).split(self._batch):
            moves = torch.randint(2 * SHIFT + 1, (2, len(rows), 1), generator=self._generator)
            down, across = torch.arange(28) + moves
            moved = self._pictures[rows[:, None, None], down[:, :, None], across[:, None, :]]
            yield moved[:, None], self._labels[rows]
