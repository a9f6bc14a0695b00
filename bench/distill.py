"""Hinton's first experiment: what a large network knows of MNIST, told to a small one.

    python bench/distill.py                     one seed, three quarters of an hour on a busy core
    python bench/distill.py --folder runs       the same, with the teacher kept there, or from there
    python bench/distill.py --seeds 0 1 2 --device cuda

A teacher 784-1200-1200-10 is trained with dropout on pictures that are shifted by up to two pixels.
A student 784-800-800-10 sees neither: once it learns from labels alone, once from labels and the
teacher's answers at a temperature of 20, for as many epochs at the same rate. Of a training on
labels alone the last state counts, of the other the one nearest to the teacher on held-out
pictures; the test set steers nothing. Published (arXiv:1503.02531, section 3): 67 errors of 10,000
for the teacher, 146 for the student alone, 74 for the student that was taught. Writes
bench/results/distill.json.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _mnist import Shifted, images
from _record import record
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tersor.methods import run
from tersor.task import Task, classification
from tersor.train import Labels, Training, fit

EPOCHS = {"teacher": 150, "student": 40}
RATE = 1e-3
TRAINING = {"teacher": {"precision": "bfloat16"}, "student": {}}
BATCH = {"teacher": 256, "student": 64}
TEMPERATURE, LABELS = 20.0, 0.1
HELD_OUT = 1000
PUBLISHED = {"teacher": 67, "taught": 74, "alone": 146}
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


def learned(model: nn.Module, task: Task, who: str, seed: int) -> nn.Module:
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
    )
    return model.eval()


def kept(path: Path | None, model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """With the weights of that file, or as it is made, for the file."""
    if path is None:
        return make()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made.state_dict(), path)
    return made


def errors(
    train: Split, test: Split, seed: int, device: str, folder: Path | None
) -> dict[str, int]:
    """Of the three networks on the test images."""
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
    options = {
        "epochs": EPOCHS["student"],
        "rate": RATE,
        "temperature": TEMPERATURE,
        "labels": LABELS,
        "training": TRAINING["student"],
    }
    recipe = [{"method": "distill.logits", "options": options}]
    path = None if folder is None else folder / f"hinton-{seed}.safetensors"
    lessons = classification(train=moved, test=test)
    trainings = {
        "teacher": lambda: kept(path, large, lambda: learned(large, lessons, "teacher", seed)),
        "taught": lambda: run(student, recipe, task, original=large),
        "alone": lambda: learned(student, task, "student", seed),
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
    """Trains three networks for each seed and counts their errors."""
    parser = argparse.ArgumentParser(description="Hinton's first experiment.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default 0")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--folder", type=Path, help="where teachers are kept, and found again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = images("train"), images("test")
    found = {
        seed: errors(train, test, seed, options.device, options.folder) for seed in options.seeds
    }
    total = {name: sum(each[name] for each in found.values()) for name in PUBLISHED}
    ratio = round(total["taught"] / total["alone"], 3)
    figures = {
        "errors": found,
        "taught_over_alone": ratio,
        "published": PUBLISHED,
        "epochs": EPOCHS,
        "temperature": TEMPERATURE,
        "labels": LABELS,
        "batch": BATCH,
        "training": TRAINING,
    }
    print(f"{ratio} of the errors, {record('distill', figures)}")
    if ratio > 0.6:
        raise SystemExit(f"the student that was taught makes {ratio} of the errors, not 0.6")


if __name__ == "__main__":
    main()
