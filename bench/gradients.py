"""Compressed gradients and local updates: LeNet-300-100 on MNIST, with 8 workers and with 2.

    python bench/gradients.py                    all, three seeds (an hour on one idle core)
    python bench/gradients.py "top 1%" sgd       some rows, merged into bench/results/gradients.json
    python bench/gradients.py --table            none: the table of the docs from that file

What is recorded is not run again: delete the file to start anew. The 8 workers are simulated in one
process, each with 32 of 256 rows. "2 processes" are real ones that talk over gloo, each with 128.
All rows have the same seeds, and five epochs.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, record
from lsq import images
from torch import Tensor, distributed, nn
from torch.nn import functional

from tersor.task import Task, classification
from tersor.train import Labels, Lesson, Training, fit
from tersor.train.distributed import (
    DGC,
    Averaging,
    Compressor,
    DiLoCo,
    Int8,
    Portion,
    PowerSGD,
    RandomK,
    Sign,
    Simulated,
    TopK,
    Traffic,
    Uncompressed,
    simulate,
    simulate_local,
    world,
)

WORKERS, ROWS, EPOCHS = 8, 256, 5
# Clipping what error feedback has saved up would lose it again.
TRAINING = Training(clip=math.inf)
RATE = 0.1


@dataclass(frozen=True)
class Row:
    """One way to train. `momentum` is that of the optimizer behind the averaged gradients."""

    compressor: Callable[[], Compressor]
    rate: float = RATE
    momentum: float = 0.9


ROWS_OF_SGD = {
    "sgd": Row(Uncompressed),
    "powersgd 1": Row(partial(PowerSGD, 1)),
    "powersgd 2": Row(partial(PowerSGD, 2)),
    "powersgd 4": Row(partial(PowerSGD, 4)),
    "powersgd 2, no feedback": Row(partial(PowerSGD, 2, feedback=False)),
    "top 1%": Row(partial(TopK, 0.01)),
    "top 1%, no feedback": Row(partial(TopK, 0.01, feedback=False)),
    "random 1%": Row(partial(RandomK, 0.01), rate=0.01),
    "random 1%, no feedback": Row(partial(RandomK, 0.01, feedback=False)),
    "sign": Row(Sign, rate=0.02),
    "sign, no feedback": Row(partial(Sign, feedback=False), rate=0.02),
    "int8": Row(Int8),
    "dgc 0.1%": Row(partial(DGC, 0.001, warmup=47), momentum=0.0),
}
ROWS_OF_DILOCO = {
    "diloco, every step": DiLoCo(every=1, rate=1.0, momentum=0.0),
    "diloco, every 50": DiLoCo(every=50),
    "diloco, every 100": DiLoCo(every=100),
    "diloco, every 100, int8": DiLoCo(every=100, compressor=Int8()),
}
IN_PROCESSES = {f"2 processes, {name}": name for name in ("sgd", "powersgd 2", "top 1%")}
NAMES = [*ROWS_OF_SGD, *ROWS_OF_DILOCO, *IN_PROCESSES]


def main() -> None:
    """Measures the chosen rows, seed after seed, and records them."""
    parser = argparse.ArgumentParser(description="Compressed gradients and local updates.")
    parser.add_argument("names", nargs="*", metavar="row", help=f"among {NAMES}")
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each row")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        process(options.names[0], int(options.rank[0]), Path(options.rank[1]))
        return
    for seed in range(0 if options.table else options.seeds):
        for name in options.names or NAMES:
            if seed == len(earlier().get(name, {"accuracy": []})["accuracy"]):
                measure(name, seed)
    print(table(earlier()))


def earlier() -> dict[str, Any]:
    """What is recorded."""
    path = RESULTS / "gradients.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


def measure(name: str, seed: int) -> None:
    """Trains once more, and records accuracies in percent and what one worker sends in an epoch."""
    started = time.process_time()
    run = in_processes if name in IN_PROCESSES else end
    found, traffic = run(name, seed)
    known = earlier()
    accuracies = [*known.get(name, {"accuracy": []})["accuracy"], found]
    known[name] = {
        "accuracy": accuracies,
        "mean": round(statistics.mean(accuracies), 3),
        "bytes_per_epoch": round(traffic.sent / EPOCHS),
        "times_fewer": round(traffic.saved, 1),
    }
    print(name, seed, known[name], f"{time.process_time() - started:.0f} s", flush=True)
    record("gradients", {n: known[n] for n in NAMES if n in known})


def end(name: str, seed: int) -> tuple[float, Traffic]:
    """Trains once with 8 simulated workers."""
    model, task = lenet(seed), mnist()
    given = {
        "workers": WORKERS,
        "epochs": EPOCHS,
        "generator": torch.Generator().manual_seed(seed),
        "training": TRAINING,
    }
    done: Simulated
    if name in ROWS_OF_DILOCO:
        inner = partial(torch.optim.AdamW, list(model.parameters()), lr=1e-3)
        settings = ROWS_OF_DILOCO[name]
        done = simulate_local(model, inner, Labels(task), loss_of(model), settings, **given)
    else:
        row = ROWS_OF_SGD[name]
        given["compressor"] = row.compressor()
        done = simulate(model, sgd(model, row), Labels(task), loss_of(model), **given)
    return accuracy(model, task), done.traffic


def in_processes(name: str, seed: int) -> tuple[float, Traffic]:
    """Trains once with two processes, which have to end with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"{IN_PROCESSES[name]}/{seed}", "--rank"]
        running = [subprocess.Popen([*command, str(rank), folder]) for rank in range(2)]
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError(f"{name}: a process failed")
        ends = [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]
    if not all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True)):
        raise RuntimeError(f"{name}: the processes ended with different weights")
    return ends[0][1], Traffic(*ends[0][2])


def process(which: str, rank: int, folder: Path) -> None:
    """One of the two."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    name, _, seed = which.rpartition("/")
    model, task, row = lenet(int(seed)), mnist(), ROWS_OF_SGD[name]
    regime = Averaging(row.compressor())
    # A judge that is ever happier, so that the last state is kept, as in the simulation.
    verdicts = iter(range(EPOCHS, -1, -1))
    fit(
        model,
        sgd(model, row),
        Portion(Labels(task), *world()),
        loss_of(model),
        epochs=EPOCHS,
        judge=lambda: float(next(verdicts)),
        generator=torch.Generator().manual_seed(int(seed)),
        training=TRAINING,
        regimes=[regime],
    )
    weights = [parameter.detach() for parameter in model.parameters()]
    traffic = (regime.traffic.sent, regime.traffic.plain)
    torch.save((weights, accuracy(model, task), traffic), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def lenet(seed: int) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998, section III.C.4), untrained."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 300), nn.ReLU()),
        *(nn.Linear(300, 100), nn.ReLU()),
        nn.Linear(100, 10),
    )


def mnist() -> Task:
    """60,000 images to learn from, 10,000 to judge by, with mean 0 and deviation 1."""
    splits = {}
    for split in ("train", "test"):
        pixels, labels = images(split)
        splits[split] = ((pixels - 0.1307) / 0.3081, labels)
    return classification(**splits, batch_size=ROWS)


def sgd(model: nn.Module, row: Row) -> torch.optim.Optimizer:
    """The optimizer behind the averaged gradients."""
    nesterov = row.momentum > 0
    return torch.optim.SGD(
        model.parameters(), lr=row.rate, momentum=row.momentum, nesterov=nesterov
    )


def loss_of(model: nn.Module) -> Callable[[Lesson], Tensor]:
    """Cross-entropy of one worker's rows."""
    return lambda lesson: functional.cross_entropy(model(lesson.inputs), lesson.targets)


def accuracy(model: nn.Module, task: Task) -> float:
    """On the test images, in percent."""
    return round(task.evaluate(model)["accuracy"], 2)


def table(figures: dict[str, Any]) -> str:
    """What was recorded, as Markdown."""
    lines = [
        "| | accuracy | beside plain | bytes an epoch | times fewer |",
        "|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        plain = figures["2 processes, sgd" if name in IN_PROCESSES else "sgd"]
        lines.append(
            f"| {name} | {row['mean']:.2f} | {row['mean'] - plain['mean']:+.2f} "
            f"| {row['bytes_per_epoch']:,} | {row['times_fewer']:g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
