"""Hinton's first experiment: what a large network knows of MNIST, told to a small one.

    python bench/distill.py                     one seed, 70 minutes on a busy core
    python bench/distill.py --folder runs       trainings are kept there, and go on after a kill
    python bench/distill.py --seeds 0 1 2 --device cuda

A teacher 784-1200-1200-10 is trained with dropout on pictures that are shifted by up to two pixels.
A student 784-800-800-10 sees neither, and is trained for as many epochs at the same rate by labels
alone, by labels and the teacher's answers at a temperature of 20, and by those answers and what the
teacher's hidden layers give. Of trainings on labels alone the last state counts, of the others
the one nearest to the teacher on held-out pictures. Published (arXiv:1503.02531, section 3): 67
errors of 10,000 for the teacher, 146 for the student alone, 74 for the student that was taught.
Writes bench/results/distill.json.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _mnist import Shifted, images
from _record import record
from torch import Tensor, nn

from tersor.methods import run
from tersor.task import Task, classification
from tersor.train import Labels, Training, TrainingLog, fit

EPOCHS = {"teacher": 150, "student": 40}
RATE = 1e-3
TRAINING = {"teacher": {"precision": "bfloat16"}, "student": {}}
BATCH = {"teacher": 256, "student": 64}
HELD_OUT = 1000
TEACHING = {
    "hints": (
        "distill.features",
        {"temperature": 20.0, "weight": 100.0, "pairs": {"2": "2", "4": "5"}},
    ),
    "answers": ("distill.logits", {"temperature": 20.0, "labels": 0.1}),
}
PUBLISHED = {"teacher": 67, "alone": 146, "answers": 74}
Split = tuple[Tensor, Tensor]


def network(width: int, *, dropout: bool, seed: int) -> nn.Sequential:
    """Two hidden layers; dropout of three tenths of the hidden units."""
    torch.manual_seed(seed)
    # Half of them and a fifth of the pixels, as published, take hundreds of epochs to pay.
    layers = [
        [nn.Linear(inputs, width), nn.ReLU(), *([nn.Dropout(0.3)] if dropout else [])]
        for inputs in (784, width)
    ]
    return nn.Sequential(nn.Flatten(), *itertools.chain(*layers), nn.Linear(width, 10))


def learned(model: nn.Module, task: Task, who: str, seed: int, log: TrainingLog) -> nn.Module:
    """Trained on labels; the last state is kept."""
    lessons, settings = Labels(task), Training.of(TRAINING[who])

    def loss(lesson) -> Tensor:
        return lessons.loss(task.predict(model.train(), lesson.inputs), lesson)

    fit(
        model,
        settings.optimizing(model.parameters(), RATE),
        lessons,
        loss,
        epochs=EPOCHS[who],
        judge=None,
        generator=torch.Generator().manual_seed(seed),
        training=settings,
        log=log,
    )
    return model.eval()


def errors(
    train: Split, test: Split, seed: int, device: str, folder: Path | None
) -> dict[str, int]:
    """Of all networks on the test images."""
    pictures, labels = (part[:-HELD_OUT] for part in train)
    task = classification(
        train=(pictures, labels),
        test=test,
        holdout=train[0][-HELD_OUT:],
        batch_size=BATCH["student"],
    )
    moved = Shifted(pictures, labels, batch=BATCH["teacher"], seed=seed)
    # As many numbers for each network as three of a seed need.
    large = network(1200, dropout=True, seed=3 * seed).to(device)
    student = network(800, dropout=False, seed=3 * seed + 1).to(device)
    lessons = classification(train=moved, test=test)

    def log(name: str) -> TrainingLog:
        return TrainingLog(None if folder is None else folder / f"{seed}-{name}", show=False)

    def taught(name: str) -> nn.Module:
        method, options = TEACHING[name]
        common = {"epochs": EPOCHS["student"], "rate": RATE, "training": TRAINING["student"]}
        steps = [{"method": method, "options": options | common}]
        return run(student, steps, task, original=large, log=log(name))

    trainings: dict[str, Callable[[], nn.Module]] = {
        "teacher": lambda: learned(large, lessons, "teacher", seed, log("teacher")),
        **{name: partial(taught, name) for name in TEACHING},
        "alone": lambda: learned(copy.deepcopy(student), task, "student", seed, log("alone")),
    }
    found = {}
    for name, training in trainings.items():
        start = time.perf_counter()
        accuracy = task.evaluate(training())["accuracy"]
        found[name] = round(len(test[0]) * (100 - accuracy) / 100)
        print(
            f"seed {seed}, {name}: {found[name]}, {time.perf_counter() - start:.0f} s", flush=True
        )
    return found


def main() -> None:
    """Trains the networks of each seed and counts their errors."""
    parser = argparse.ArgumentParser(description="Hinton's first experiment.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default 0")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--folder", type=Path, help="where trainings are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = images("train"), images("test")
    found = {
        seed: errors(train, test, seed, options.device, options.folder) for seed in options.seeds
    }
    total = {name: sum(each[name] for each in found.values()) for name in ("alone", *TEACHING)}
    ratios = {name: round(total[name] / total["alone"], 3) for name in TEACHING}
    figures = {
        "errors": found,
        "share_of_errors_alone": ratios,
        "published": PUBLISHED,
        "epochs": EPOCHS,
        "teaching": TEACHING,
        "batch": BATCH,
        "training": TRAINING,
    }
    print(f"{ratios} of the errors of the student alone, {record('distill', figures)}")


if __name__ == "__main__":
    main()
