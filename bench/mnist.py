"""MNIST in kilobytes: Deep Compression whole, and weights trained against the coder's bits.

    python bench/mnist.py                    all (about half an hour on two idle cores)
    python bench/mnist.py lenet300 lenet5    some, merged into bench/results/mnist.json

Networks are trained here first, on 55,000 images; the other 5,000 of the training set are held out
and choose between epochs. Errors are those on the 10,000 test images, files are written whole, with
header and without the graph, read again and judged.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from _record import RESULTS, record
from torch import Tensor, nn

import tersor
import zoo
from tersor.methods import run
from tersor.task import Task, classification
from tersor.train import Labels, fit

HELD_OUT = 5_000
AVERAGED = {"ema": 0.995}
Steps = list[dict[str, Any]]


def images(split: str) -> tuple[Tensor, Tensor]:
    """MNIST in 0..1, (n, 1, 28, 28), and labels."""
    with np.load(zoo.DATA / "mnist.npz") as arrays:
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    return torch.from_numpy(x).float()[:, None] / 255, torch.from_numpy(y).long()


def mnist() -> Task:
    """All of it, in batches of 128."""
    x, y = images("train")
    return classification(
        train=(x[:-HELD_OUT], y[:-HELD_OUT]),
        holdout=(x[-HELD_OUT:], y[-HELD_OUT:]),
        test=images("test"),
        batch_size=128,
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


def measured(make: Callable[[], nn.Module], epochs: int, recipes: dict[str, Steps]) -> Any:
    """The dense network, and what each recipe makes of it."""
    task, started = mnist(), time.perf_counter()
    dense = trained(make, task, epochs)
    size = sum(p.numel() for p in dense.parameters()) * 4
    seconds = round(time.perf_counter() - started, 1)
    found: dict[str, Any] = {
        "dense": {"error": error(dense, task), "bytes": size, "epochs": epochs, "seconds": seconds}
    }
    print(found, flush=True)
    for name, steps in recipes.items():
        started = time.perf_counter()
        done = run(dense, steps, task)
        seconds = round(time.perf_counter() - started, 1)
        found[name] = {**judged(done, task), "steps": steps, "seconds": seconds}
        print(name, found[name], flush=True)
    return found


def rate(bits: float, **options: Any) -> Steps:
    """Training against the coder's bits, ten epochs of it."""
    return [{"method": "quantize.rate", "options": {"bits": bits, "epochs": 10, **options}}]


def deep_compression(sparsity: float, epochs: int) -> Steps:
    """Prune while training, share values, train those, code: Han, Mao, Dally 2016, figure 1."""
    pruned = {"sparsity": sparsity, "scope": "global", "epochs": epochs}
    return [
        {"method": "prune.gradual", "options": pruned},
        {"method": "share.kmeans", "options": {"values": 16}},
        {"method": "recover.scales", "options": {"epochs": 2, "on": "train"}},
    ]


PARTS: dict[str, Callable[[], Any]] = {
    "lenet300": lambda: measured(
        lenet300,
        20,
        {
            "Deep Compression": deep_compression(0.94, 20),
            "rate, 0.45 bits": rate(0.45, training=AVERAGED),
            "rate, 0.23 bits": rate(0.23, training=AVERAGED),
            "rate, 0.14 bits": rate(0.14, training=AVERAGED),
        },
    ),
    "lenet5": lambda: measured(
        lenet5,
        10,
        {
            "Deep Compression": deep_compression(0.96, 10),
            "rate, 0.205 bits": rate(0.205, rate=1e-3),
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.names or PARTS:
        found = PARTS[name]()
        path = RESULTS / "mnist.json"
        known = json.loads(path.read_text("utf-8"))["figures"] if path.exists() else {}
        figures = known | {name: found}
        record("mnist", {part: figures[part] for part in PARTS if part in figures})


if __name__ == "__main__":
    main()
