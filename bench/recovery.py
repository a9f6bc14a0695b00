"""What recoveries give back of what rounding took, on data that steered nothing.

    python bench/recovery.py                    all (about half an hour on two idle cores)
    python bench/recovery.py stories resnet20   some, merged into bench/results/recovery.json
    python bench/recovery.py --table            none: the tables of the docs from that file

Bytes are those of the .tersor file without its graph.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import smallest
import torch
from _record import RESULTS, record
from torch import nn

import sentences
import stories
import tersor
import zoo
from tersor.measure import divergence_of, quality, reference_outputs
from tersor.methods import run

Steps = list[dict[str, Any]]
BATCHNORM = {"method": "recover.batchnorm", "options": {}}


def rtn(bits: int, group_size: int | None = None) -> dict[str, Any]:
    """Round to nearest."""
    return {"method": "quantize.rtn", "options": {"bits": bits, "group_size": group_size}}


def lqer(rank: int) -> dict[str, Any]:
    """Low-rank correction."""
    return {"method": "recover.lqer", "options": {"rank": rank}}


def scales(epochs: int, samples: int) -> dict[str, Any]:
    """Scales, biases and norms trained."""
    return {"method": "recover.scales", "options": {"epochs": epochs, "samples": samples}}


@dataclass(frozen=True)
class Network:
    """A network, its data, and pairs of a quantizing step and what may follow it."""

    model: Callable[[], nn.Module]
    task: Callable[[], tersor.Task]
    quantized: tuple[dict[str, Any], ...]
    recoveries: tuple[Steps, ...]


NETWORKS = {
    "stories": Network(
        zoo.stories260k,
        lambda: stories.task(128),
        (rtn(4, 32), rtn(3, 16)),
        ([], [lqer(4)], [scales(3, 128)]),
    ),
    "resnet20": Network(
        zoo.resnet20,
        smallest.cifar,
        (rtn(4), rtn(3)),
        ([], [BATCHNORM], [scales(5, 512)], [BATCHNORM, scales(5, 512)], [lqer(4), BATCHNORM]),
    ),
    "minilm": Network(
        sentences.model,
        smallest.pairs,
        (rtn(4, 64),),
        ([], [lqer(8)], [scales(2, 128)]),
    ),
}


def main() -> None:
    """Measures the chosen networks and records them."""
    parser = argparse.ArgumentParser(description="What recoveries give back.")
    parser.add_argument("names", nargs="*", metavar="network", help=f"among {list(NETWORKS)}")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    for name in () if options.table else options.names or NETWORKS:
        print(f"== {name}", flush=True)
        rows = measured(NETWORKS[name])
        # Read now: another run may have recorded another network meanwhile.
        found = earlier() | {name: rows}
        record("recovery", {n: found[n] for n in NETWORKS if n in found})
    print(table(earlier()))


def earlier() -> dict[str, Any]:
    """What is recorded."""
    path = RESULTS / "recovery.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


def measured(network: Network) -> list[dict[str, Any]]:
    """Divergence, metrics and bytes of each recipe, the untouched network first."""
    model, task = network.model(), network.task()
    inputs = [batch for batch, _ in task.test()]
    reference = reference_outputs(model, task, inputs)
    rows = [{"recipe": "fp32", "metrics": metrics(model, task)}]
    for first in network.quantized:
        for after in network.recoveries:
            recipe = [first, *after]
            started = time.perf_counter()
            done = run(model, recipe, task)
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "recipe": label(recipe),
                    "bytes": written(done),
                    "divergence": divergence_of(done, task, inputs, reference),
                    "metrics": metrics(done, task),
                    "seconds": round(seconds, 1),
                    "steps": recipe,
                }
            )
            print(rows[-1], flush=True)
    return rows


def metrics(model: nn.Module, task: tersor.Task) -> dict[str, float]:
    """Of the test data."""
    return {name: round(each.value, 4) for name, each in quality(model, task).items()}


def written(model: nn.Module) -> int:
    """Bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        return tersor.save(model, Path(folder) / "m.tersor", graph=False).stat().st_size


def label(recipe: Steps) -> str:
    """ "rtn 4 bits, group 32 + scales"."""
    first = recipe[0]["options"]
    group = f", group {first['group_size']}" if first["group_size"] else ""
    after = [
        step["method"].removeprefix("recover.")
        + (f" {step['options']['rank']}" if "rank" in step["options"] else "")
        for step in recipe[1:]
    ]
    return " + ".join([f"rtn {first['bits']} bits{group}", *after])


def table(figures: dict[str, Any]) -> str:
    """What was recorded, as Markdown."""
    lines = [
        "| network | recipe | bytes | divergence | headline | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in figures.items():
        for row in rows:
            metric, value = next(iter(row["metrics"].items()))
            cells = [name, row["recipe"], "", "", f"{metric} {value:g}", ""]
            if "bytes" in row:
                cells[2] = f"{row['bytes']:,}"
                cells[3] = f"{row['divergence']:.4f}"
                cells[5] = f"{row['seconds']:g}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
