"""LSQ at two bits, weights and activations: LeNet-300-100 on MNIST, trained here first.

python bench/lsq.py            ten minutes on one idle core; writes bench/results/lsq.json
"""

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _mnist import images
from _record import record
from torch import nn
from torch.nn import functional

import tersor
from tersor.methods.quantize.lsq import lsq
from tersor.task import classification

EPOCHS = {"fp32": 20, "lsq": 10}
ROWS: dict[str, dict[str, Any]] = {
    "W2A2, ends at 8 bits": {"ends": 8},
    "W2A2, ends at 8 bits, noise 0.5": {"ends": 8, "noise": 0.5},
    "W2A2, ends at 2 bits": {"ends": 2},
    "W2A2, ends at 2 bits, noise 0.5": {"ends": 2, "noise": 0.5},
}


def lenet(epochs: int) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998, section III.C.4), trained with Adam and half a cosine."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(784, 300), nn.ReLU()),
        *(nn.Linear(300, 100), nn.ReLU()),
        nn.Linear(100, 10),
    )
    x, y = images("train")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    steps = epochs * -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main() -> None:
    """Trains, quantizes with 8 and with 2 bits at the ends, and records errors in percent."""
    torch.set_num_threads(1)
    task = classification(train=images("train"), test=images("test"), batch_size=128)

    def error(model: nn.Module) -> float:
        return round(100 - task.evaluate(model)["accuracy"], 2)

    started = time.perf_counter()
    net = lenet(EPOCHS["fp32"])
    figures: dict[str, Any] = {
        "fp32": {"error": error(net), "seconds": round(time.perf_counter() - started, 1)}
    }
    print(figures, flush=True)
    for name, options in ROWS.items():
        started = time.perf_counter()
        done = lsq(copy.deepcopy(net), task, epochs=EPOCHS["lsq"], **options)
        seconds = round(time.perf_counter() - started, 1)
        with tempfile.TemporaryDirectory() as folder:
            size = tersor.save(done, Path(folder) / "m.tersor", graph=False).stat().st_size
        figures[name] = {
            "error": error(done),
            "points_more": round(error(done) - figures["fp32"]["error"], 2),
            "bytes": size,
            "seconds": seconds,
            "outcome": done.recipe.steps[-1].outcome,
        }
        print(figures, flush=True)
        record("lsq", figures)


if __name__ == "__main__":
    main()
