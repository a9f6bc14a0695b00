"""Hinton's first experiment: what a large network knows of MNIST, told to a small one.

python bench/distill.py        half an hour on one core; writes bench/results/distill.json

A teacher 784-1200-1200-10 is trained with dropout on pictures that are shifted by up to two pixels.
A student 784-800-800-10 sees neither: once it learns from labels alone, once from the teacher's
answers at a temperature of 20, for as many epochs at the same rate. The last state of each training
counts; the test set steers nothing. Published (arXiv:1503.02531, section 3): 67 errors of 10,000
for the teacher, 146 for the student alone, 74 for the student that was taught.
"""

import argparse
import itertools
import time

import torch
from _mnist import Shifted, images
from _record import record
from torch import Tensor, nn

from tersor.methods import run
from tersor.task import Task, classification
from tersor.train import Labels, fit

EPOCHS = {"teacher": 30, "student": 40}
RATE = 1e-3
BATCH = {"teacher": 256, "student": 64}
TEMPERATURE = 20.0
HELD_OUT = 1000


def network(width: int, *, dropout: bool, seed: int) -> nn.Sequential:
    """Two hidden layers; dropout of three tenths of the hidden units."""
    torch.manual_seed(seed)
    # Half of them and a fifth of the pixels, as published, take hundreds of epochs to pay.
    layers = [
        [nn.Linear(inputs, width), nn.ReLU(), *([nn.Dropout(0.3)] if dropout else [])]
        for inputs in (784, width)
    ]
    return nn.Sequential(nn.Flatten(), *itertools.chain(*layers), nn.Linear(width, 10))


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
    (pictures, labels), test = images("train"), images("test")
    train = pictures[:-HELD_OUT], labels[:-HELD_OUT]
    task = classification(
        train=train, test=test, holdout=pictures[-HELD_OUT:], batch_size=BATCH["student"]
    )
    errors, seconds = {}, {}

    def count(name: str, model: nn.Module, start: float) -> None:
        with torch.no_grad():
            errors[name] = int((model(test[0]).argmax(1) != test[1]).sum())
        seconds[name] = round(time.perf_counter() - start)
        print(f"{name}: {errors[name]} errors, {seconds[name]} s", flush=True)

    start = time.perf_counter()
    shifted = classification(train=Shifted(*train, batch=BATCH["teacher"]), test=test)
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
