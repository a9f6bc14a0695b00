"""Hinton's first experiment: what a large network knows of MNIST, told to a small one.

python bench/distill.py        half an hour on one idle core; writes bench/results/distill.json

A teacher 784-1200-1200-10 is trained with dropout on pictures that are shifted by up to two pixels.
A student 784-800-800-10 sees neither: once it learns from labels alone, once from the teacher's
answers at a temperature of 20, for as many epochs at the same rate. The last state of each training
counts; the test set steers nothing. Published (arXiv:1503.02531, section 3): 67 errors of 10,000
for the teacher, 146 for the student alone, 74 for the student that was taught.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from _record import record
from torch import Tensor, nn

import zoo
from tersor.methods import run
from tersor.task import Task, classification
from tersor.train import Labels, fit

EPOCHS = {"teacher": 60, "student": 80}
RATE = 1e-3
BATCH = 256
SHIFT = 2
TEMPERATURE = 20.0
HELD_OUT = 1000


def digits(split: str) -> tuple[Tensor, Tensor]:
    """(n, 784) in 0..1, and labels."""
    with np.load(zoo.DATA / "mnist.npz") as arrays:
        pictures = torch.from_numpy(arrays[f"x_{split}"]).float().reshape(-1, 784) / 255
        return pictures, torch.from_numpy(arrays[f"y_{split}"]).long()


class Shifted:
    """Training batches, each picture moved by up to two pixels; another order in each epoch."""

    def __init__(self, pictures: Tensor, labels: Tensor, seed: int) -> None:
        self._pictures = nn.functional.pad(pictures.reshape(-1, 28, 28), [SHIFT] * 4)
        self._labels = labels
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self._labels), generator=self._generator).split(BATCH):
            moves = torch.randint(2 * SHIFT + 1, (2, len(rows), 1), generator=self._generator)
            down, across = torch.arange(28) + moves
            moved = self._pictures[rows[:, None, None], down[:, :, None], across[:, None, :]]
            yield moved.flatten(1), self._labels[rows]


def network(width: int, *, dropout: bool, seed: int) -> nn.Sequential:
    """Two hidden layers; dropout of three tenths of the hidden units."""
    torch.manual_seed(seed)
    # Half of them and a fifth of the pixels, as published, take hundreds of epochs to pay.
    layers = [
        [nn.Linear(inputs, width), nn.ReLU(), *([nn.Dropout(0.3)] if dropout else [])]
        for inputs in (784, width)
    ]
    return nn.Sequential(*itertools.chain(*layers), nn.Linear(width, 10))


def learned(model: nn.Module, task: Task, epochs: int) -> nn.Module:
    """Trained on labels; the last state is kept."""
    lessons, later = Labels(task), itertools.count(0, -1)

    def loss(lesson) -> Tensor:
        return lessons.loss(model.train()(lesson.inputs), lesson)

    fit(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE, fused=True),
        lessons,
        loss,
        epochs=epochs,
        judge=lambda: next(later),
        generator=torch.Generator().manual_seed(0),
    )
    return model.eval()


def main() -> None:
    """Trains the three networks and counts their errors."""
    parser = argparse.ArgumentParser(description="Hinton's first experiment.")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    torch.set_num_threads(parser.parse_args().threads)
    (pictures, labels), test = digits("train"), digits("test")
    train = pictures[:-HELD_OUT], labels[:-HELD_OUT]
    task = classification(train=train, test=test, holdout=pictures[-HELD_OUT:], batch_size=BATCH)
    errors, seconds = {}, {}

    def count(name: str, model: nn.Module, start: float) -> None:
        with torch.no_grad():
            errors[name] = int((model(test[0]).argmax(1) != test[1]).sum())
        seconds[name] = round(time.perf_counter() - start)
        print(f"{name}: {errors[name]} errors, {seconds[name]} s", flush=True)

    start = time.perf_counter()
    shifted = classification(train=Shifted(*train, seed=0), test=test)
    teacher = learned(network(1200, dropout=True, seed=0), shifted, EPOCHS["teacher"])
    count("teacher", teacher, start)

    student = network(800, dropout=False, seed=1)
    start = time.perf_counter()
    options = {
        "epochs": EPOCHS["student"],
        "rate": RATE,
        "temperature": TEMPERATURE,
    }
    recipe = [{"method": "distill.logits", "options": options}]
    count("taught", run(student, recipe, task, original=teacher), start)

    start = time.perf_counter()
    count("alone", learned(student, task, EPOCHS["student"]), start)

    ratio = round(errors["taught"] / errors["alone"], 3)
    path = record(
        "distill",
        {
            "errors": errors,
            "taught_over_alone": ratio,
            "published": {"teacher": 67, "alone": 146, "taught": 74},
            "epochs": EPOCHS,
            "temperature": TEMPERATURE,
            "batch": BATCH,
            "seconds": seconds,
        },
    )
    print(f"{ratio} of the errors, {path}")
    if ratio > 0.6:
        raise SystemExit(f"the student that was taught makes {ratio} of the errors, not 0.6")


if __name__ == "__main__":
    main()
