"""MNIST in kilobytes: Deep Compression whole, and weights trained against the coder's bits.

    python bench/mnist.py                    all (about half an hour on two idle cores)
    python bench/mnist.py lenet300 lenet5    some, merged into bench/results/mnist.json
    python bench/mnist.py lenet5 --recipes "Deep Compression"    some of its recipes

Networks are trained here first, on 55,000 images, which LeNet-5 sees moved by up to two pixels; the
other 5,000 of the training set are held out and choose between epochs. Errors are those on the
10,000 test images, files are written whole, with header and without the graph, read again and
judged.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from _mnist import Shifted, images
from _record import RESULTS, record
from torch import nn

import tersor
from tersor.methods import run
from tersor.task import Task, classification
from tersor.train import Labels, fit

HELD_OUT, BATCH, CALIBRATION = 5_000, 128, 512
AVERAGED = {"ema": 0.995}
Steps = list[dict[str, Any]]


def mnist(*, shifted: bool) -> Task:
    """All of it, in batches of 128. shifted: whether training pictures are moved about"""
    (x, y), rest = images("train"), slice(-HELD_OUT, None)
    train = x[:-HELD_OUT], y[:-HELD_OUT]
    return classification(
        train=Shifted(*train, batch=BATCH) if shifted else train,
        calibration=train[0][:CALIBRATION],
        holdout=(x[rest], y[rest]),
        test=images("test"),
        batch_size=BATCH,
    )


def lenet300() -> nn.Module:
    """LeNet-300-100, LeCun et al. 1998, section III.C.4; 266,610 parameters."""
    hidden = (nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(100, 10))


def lenet5() -> nn.Module:
    """LeNet-5 as Han et al. 2015 have it from Caffe: 20 and 50 kernels, 431,080 parameters."""
    kernels = (nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2))
    return nn.Sequential(*kernels, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def trained(make: Callable[[], nn.Module], task: Task, epochs: int) -> nn.Module:
    """With labels alone, Adam, and half a cosine."""
    torch.manual_seed(0)
    model, lessons = make().train(), Labels(task)

    def judge() -> float:
        loss = task.validate(model)
        assert loss is not None
        return loss

    fit(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        lessons,
        lambda lesson: lessons.loss(model(lesson.inputs), lesson),
        epochs=epochs,
        judge=judge,
        generator=torch.Generator().manual_seed(0),
    )
    return model.eval()


def judged(model: nn.Module, task: Task) -> dict[str, Any]:
    """The file, and the error of what is read from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.tersor"
        tersor.save(model, path, graph=False, profile="max")
        read = tersor.load(path, into=torch.nn.Sequential(*_fresh(model)))
        return {"bytes": path.stat().st_size, "error": error(read, task)}


def _fresh(model: nn.Module) -> list[nn.Module]:
    make = lenet5 if any(isinstance(m, nn.Conv2d) for m in model.modules()) else lenet300
    return list(make().children())


def error(model: nn.Module, task: Task) -> float:
    """In percent of the test images."""
    return round(100 - task.evaluate(model)["accuracy"], 2)


@dataclass(frozen=True)
class Part:
    """A network, how it is trained at first, and what is then done with it."""

    make: Callable[[], nn.Module]
    epochs: int
    shifted: bool
    recipes: dict[str, Steps]

    def measured(self, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The dense network, and what each of these recipes makes of it."""
        task, started = mnist(shifted=self.shifted), time.perf_counter()
        dense = trained(self.make, task, self.epochs)
        size = sum(p.numel() for p in dense.parameters()) * 4
        seconds = round(time.perf_counter() - started, 1)
        figures = {"error": error(dense, task), "bytes": size}
        yield "dense", {**figures, "epochs": self.epochs, "seconds": seconds}
        for name in names:
            started = time.perf_counter()
            done = run(dense, self.recipes[name], task)
            seconds = round(time.perf_counter() - started, 1)
            yield name, {**judged(done, task), "steps": self.recipes[name], "seconds": seconds}


def rate(bits: float, epochs: int = 10, **options: Any) -> Steps:
    """Training against the coder's bits."""
    return [{"method": "quantize.rate", "options": {"bits": bits, "epochs": epochs, **options}}]


def deep_compression(sparsity: float, epochs: int) -> Steps:
    """Prune while training, share values, train those, code: Han, Mao, Dally 2016, figure 1."""
    pruned = {"sparsity": sparsity, "scope": "global", "epochs": epochs}
    return [
        {"method": "prune.gradual", "options": pruned},
        {"method": "share.kmeans", "options": {"values": 16}},
        {"method": "recover.scales", "options": {"epochs": 2, "on": "train"}},
    ]


PARTS = {
    "lenet300": Part(
        lenet300,
        20,
        False,
        {
            "Deep Compression": deep_compression(0.94, 20),
            "rate, 0.45 bits": rate(0.45, training=AVERAGED),
            "rate, 0.23 bits": rate(0.23, training=AVERAGED),
            "rate, 0.14 bits": rate(0.14, training=AVERAGED),
        },
    ),
    "lenet5": Part(
        lenet5,
        10,
        True,
        {
            "Deep Compression": deep_compression(0.96, 10),
            "rate, 0.2 bits": rate(0.2, rate=1e-3),
            "rate, 0.07 bits": rate(0.07, rate=1e-3),
            "entropy, 0.6 bits, not trained": [
                {"method": "quantize.entropy", "options": {"bits": 0.6}}
            ],
            "2 bits, trained without a price": [
                {
                    "method": "quantize.lsq",
                    "options": {"bits": 2, "activation_bits": None, "ends": 2, "epochs": 10},
                }
            ],
        },
    ),
}


def main() -> None:
    """Measures the chosen parts and records them."""
    parser = argparse.ArgumentParser(description="MNIST in kilobytes.")
    parser.add_argument("names", nargs="*", help=f"among {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--recipes", nargs="*", help="of the parts; all by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.names or PARTS:
        part = PARTS[name]
        for row, found in part.measured(options.recipes or list(part.recipes)):
            print(name, row, found, flush=True)
            keep(name, row, found)


def keep(name: str, row: str, found: dict[str, Any]) -> None:
    """Records one more row, beside the others that there are."""
    path = RESULTS / "mnist.json"
    known = json.loads(path.read_text("utf-8"))["figures"] if path.exists() else {}
    known.setdefault(name, {})[row] = found
    record(
        "mnist",
        {
            part: {r: known[part][r] for r in ("dense", *PARTS[part].recipes) if r in known[part]}
            for part in PARTS
            if part in known
        },
    )


if __name__ == "__main__":
    main()
