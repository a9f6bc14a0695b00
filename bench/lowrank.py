"""What low rank keeps: outputs of skewed inputs, an MLP at a quarter, real networks at less.

    python bench/lowrank.py                     all (about an hour on two busy cores)
    python bench/lowrank.py skewed mnist        some, merged into bench/results/lowrank.json
    python bench/lowrank.py --table             none: the tables of the docs from that file

Divergence and metrics are those of test data that steered nothing; no network is trained after it.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import smallest
import torch
from _mnist import images
from _record import RESULTS, record
from torch import Tensor, nn
from torch.nn import functional

import cifar10
import sentences
import tersor
import zoo
from tersor.measure import divergence_of, macs, quality, reference_outputs
from tersor.methods import run
from tersor.methods.spectra import spectrum
from tersor.task import classification

RANK, WIDTH = 32, 256
BATCHNORM = {"method": "recover.batchnorm", "options": {}}


def main() -> None:
    """Measures what was chosen and records it."""
    parser = argparse.ArgumentParser(description="What low rank keeps.")
    parser.add_argument("names", nargs="*", metavar="part", help=f"among {list(PARTS)}")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    for name in () if options.table else options.names or PARTS:
        print(f"== {name}", flush=True)
        rows = PARTS[name]()
        # Read now: another run may have recorded another part meanwhile.
        found = earlier() | {name: rows}
        record("lowrank", {n: found[n] for n in PARTS if n in found})
    print(table(earlier()))


def earlier() -> dict[str, Any]:
    """What is recorded."""
    path = RESULTS / "lowrank.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


def skewed() -> list[dict[str, Any]]:
    """Lost output energy at rank 32 of 256, for inputs of standard deviations 1 / i**a, mixed."""
    rows = []
    for a in (1.0, 1.5):
        lost: dict[str, list[float]] = {}
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            matrix, mix, noise = (
                torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
                for n in (WIDTH, WIDTH, 4096)
            )
            falling = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** -a
            x = noise * falling @ (torch.eye(WIDTH) + mix / WIDTH**0.5)
            for name, weight in factors(matrix, x).items():
                missed = (x @ (matrix - weight).T).square().sum() / (x @ matrix.T).square().sum()
                lost.setdefault(name, []).append(float(missed))
        rows.append({"a": a} | {name: round(sum(v) / len(v), 4) for name, v in lost.items()})
        print(rows[-1], flush=True)
    return rows


def factors(matrix: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The weight of rank 32 by plain values, by inputs scaled each by itself, and by moments."""
    scale = x.square().mean(0).sqrt()
    plain, scaled = spectrum(matrix, None), spectrum(matrix * scale, None)
    whitened = spectrum(matrix, x.T @ x / len(x))
    products = {
        "plain": torch.matmul(*plain.factors(RANK)),
        "diagonal": torch.matmul(*scaled.factors(RANK)) / scale,
        "whitened": torch.matmul(*whitened.factors(RANK)),
    }
    return products


def mnist() -> list[dict[str, Any]]:
    """An MLP of 784-1200-1200-10 at a quarter of the weights of its wide layers."""
    (x, y), (test_x, test_y) = images("train"), images("test")
    x, test = x.flatten(1), (test_x.flatten(1), test_y)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 1200), nn.ReLU(), nn.Linear(1200, 1200), nn.ReLU(), nn.Linear(1200, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):
        for batch in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    task = classification(test=test, calibration=x[:512], holdout=x[512:768])
    recipes = [
        [step("svd", keep=keep, weigh=weigh)]
        for keep in (0.25, 0.1, 0.05)
        for weigh in ("none", "inputs", "fisher")
    ]
    recipes += [[step("tensor_train", keep=0.25)], [step("tensor_train", keep=0.25, cores=3)]]
    return measured(model.eval(), task, [*recipes, [step("nmf", keep=0.25)]])


def resnet(model: Callable[[], nn.Module], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Multiply-accumulates cut to a share, with batch norms corrected after it."""
    recipes = [
        [step(name, keep=keep, of="macs"), BATCHNORM] for keep in (0.7, 0.5) for name in names
    ]
    return measured(model(), cifar10.task(), recipes)


def minilm() -> list[dict[str, Any]]:
    """The linear layers of a sentence encoder."""
    recipes = [[step("svd", keep=keep)] for keep in (0.7, 0.5)]
    return measured(sentences.model(), smallest.pairs(), recipes)


def step(name: str, **options: Any) -> dict[str, Any]:
    """One of the family."""
    return {"method": f"factorize.{name}", "options": options}


def measured(
    model: nn.Module, task: tersor.Task, recipes: list[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Divergence, metrics, weights and multiply-accumulates, the untouched network first."""
    inputs = [batch for batch, _ in task.test()]
    reference, one = reference_outputs(model, task, inputs), task.example(1)
    weights, work = sum(p.numel() for p in model.parameters()), macs(model, one).total
    rows = [{"recipe": "fp32", "metrics": metrics(model, task), "macs": work, "weights": weights}]
    for recipe in recipes:
        started = time.perf_counter()
        done = run(copy.deepcopy(model), recipe, task)
        seconds = time.perf_counter() - started
        rows.append(
            {
                "recipe": label(recipe),
                "divergence": round(divergence_of(done, task, inputs, reference), 5),
                "metrics": metrics(done, task),
                "macs": round(macs(done, one).total / work, 4),
                "weights": round(sum(p.numel() for p in done.parameters()) / weights, 4),
                "seconds": round(seconds, 1),
                "steps": recipe,
            }
        )
        print(rows[-1], flush=True)
    return rows


def metrics(model: nn.Module, task: tersor.Task) -> dict[str, float]:
    """Of the test data."""
    return {name: round(each.value, 4) for name, each in quality(model, task).items()}


def label(recipe: list[dict[str, Any]]) -> str:
    """ "svd keep=0.5 of=macs, batchnorm"."""
    words = [
        " ".join([s["method"].partition(".")[2], *(f"{k}={v}" for k, v in s["options"].items())])
        for s in recipe
    ]
    return ", ".join(words)


def table(figures: dict[str, Any]) -> str:
    """What was recorded, as Markdown."""
    lines = [
        "| network | recipe | weights | MACs | divergence | headline |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in figures.items():
        for row in rows:
            if name == "skewed":
                lines.append(f"| {name} | {row} | | | | |")
                continue
            metric, value = next(iter(row["metrics"].items()))
            cells = [name, row["recipe"], "", "", "", f"{metric} {value:.2f}"]
            if "divergence" in row:
                cells[2:5] = (
                    f"{row['weights']:.3f}",
                    f"{row['macs']:.3f}",
                    f"{row['divergence']:.4f}",
                )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "skewed": skewed,
    "mnist": mnist,
    "resnet20": lambda: resnet(zoo.resnet20, ("svd", "tucker", "cp")),
    "resnet56": lambda: resnet(zoo.resnet56, ("tucker", "cp")),
    "minilm": minilm,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
