"""Lottery tickets of LeNet-300-100 on MNIST, beside the controls that make the claim.

    python bench/lottery.py              two seeds; ten minutes each on one core
    python bench/lottery.py 0 1 2        these seeds; writes bench/results/lottery.json

A ticket with at most 20 % of the weights is to be within 0.1 points of the dense network or better;
at 5 % of the weights and less the same places with new starting values are to be 0.3 points worse.
"""

import copy
import sys
import tempfile
import time
from statistics import mean
from typing import Any

import torch
from _mnist import images
from _record import record
from torch import nn

from tersor.methods.learning import learn, trainable
from tersor.methods.prune.lottery import lottery
from tersor.task import Task, classification
from tersor.train import Labels, TrainingLog

EPOCHS = 12
RATE = 1.2e-3
"""Of Adam, as in the paper."""
LEVELS = {"17 %": (0.832, 8), "4.4 %": (0.956, 14)}
"""Weights left: sparsity and rounds, each of about a fifth as in the paper."""
CONTROLS = ("none", "reinitialize", "random")


def lenet(seed: int) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998, section III.C.4) as it starts, Glorot normal."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 300), nn.ReLU()),
        *(nn.Linear(300, 100), nn.ReLU()),
        nn.Linear(100, 10),
    )
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net.eval()


def dense(net: nn.Module, task: Task, seed: int) -> nn.Module:
    """All weights, trained as each ticket is."""
    learn(
        "dense",
        net,
        Labels(task),
        None,
        parameters=trainable("dense", net),
        epochs=EPOCHS,
        rate=RATE,
        generator=torch.Generator().manual_seed(seed),
    )
    return net


def accuracies(seed: int, task: Task) -> dict[str, float]:
    """Of the dense network, and of tickets and controls at each level, in percent."""
    start = lenet(seed)
    found = {"dense": task.evaluate(dense(copy.deepcopy(start), task, seed))["accuracy"]}
    for level, (sparsity, rounds) in LEVELS.items():
        with tempfile.TemporaryDirectory() as folder:
            # Kept there, the rounds of the ticket serve its controls too.
            log = TrainingLog(folder, show=False)
            for control in CONTROLS:
                done = lottery(
                    copy.deepcopy(start),
                    task,
                    sparsity=sparsity,
                    rounds=rounds,
                    epochs=EPOCHS,
                    rate=RATE,
                    control=control,
                    generator=torch.Generator().manual_seed(seed),
                    log=log,
                )
                found[f"{level}, {control}"] = task.evaluate(done)["accuracy"]
                print(seed, level, control, found[f"{level}, {control}"], flush=True)
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    """Trains with each seed and records accuracies, and their means."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    task = classification(train=images("train"), test=images("test"), batch_size=256)
    started = time.perf_counter()
    seeds = [int(seed) for seed in sys.argv[1:]] or [0, 1]
    by_seed: dict[str, dict[str, float]] = {}
    for seed in seeds:
        by_seed[str(seed)] = accuracies(seed, task)
        figures: dict[str, Any] = {
            "accuracy": {
                name: round(mean(found[name] for found in by_seed.values()), 3)
                for name in by_seed[str(seed)]
            },
            "by_seed": by_seed,
            "epochs": EPOCHS,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(figures, flush=True)
        record("lottery", figures)


if __name__ == "__main__":
    main()
