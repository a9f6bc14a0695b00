"""Shared values, sub-vectors and layers against rounding to nearest, on data that steered nothing.

    python bench/sharing.py             both networks, about half an hour on one core
    python bench/sharing.py resnet20    one, merged into bench/results/sharing.json
    python bench/sharing.py --table     none: what is recorded, as Markdown

Bytes are those of the .tersor file without its graph. Disagreement is the share of test images that
are answered otherwise than by the dense network.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _proof import imagenet
from _record import RESULTS, record
from torch import nn

import cifar10
import tersor
import zoo
from tersor.measure import divergence_of, reference_outputs
from tersor.methods import run
from tersor.surgery import decoded

Steps = list[dict[str, Any]]


def step(method: str, **options: Any) -> dict[str, Any]:
    """One step of a recipe."""
    return {"method": method, "options": options}


SCALES = step("recover.scales")
PLAIN: dict[str, Steps] = {
    f"kmeans {count} values, without data": [step("share.kmeans", values=count)]
    for count in (16, 8)
}
"""Run without a task."""
RECIPES: dict[str, Steps] = {
    **{f"rtn {bits} bits": [step("quantize.rtn", bits=bits)] for bits in (4, 3, 2)},
    **{
        f"kmeans 16 values, thrift {thrift:g}": [step("share.kmeans", thrift=thrift)]
        for thrift in (0.0, 1.5)
    },
    "kmeans 16 values, best start": [step("share.kmeans", start="best")],
    "kmeans 16 values, thrift 1.5 + scales": [step("share.kmeans", thrift=1.5), SCALES],
    **{
        f"kmeans 8 values, thrift {thrift:g}": [step("share.kmeans", values=8, thrift=thrift)]
        for thrift in (0.0, 2.0)
    },
    "gptq 2 bits": [step("quantize.gptq", bits=2)],
    "kmeans 4 values, best start": [step("share.kmeans", values=4, start="best")],
    **{
        f"product {count} values of {length}": [step("share.product", values=count, length=length)]
        for count, length in ((16, 2), (64, 3), (256, 4))
    },
    "product 64 values of 3 + scales": [step("share.product", values=64, length=3), SCALES],
}
LAYERS: dict[str, Steps] = {
    "layers 80 %": [step("share.layers", size=0.8)],
    "layers 80 % + distill": [step("share.layers", size=0.8), step("distill.logits")],
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tersor.Task], dict[str, Steps]]] = {
    "mobilenet_v1": (zoo.mobilenet_v1, imagenet, RECIPES),
    "resnet20": (zoo.resnet20, cifar10.task, RECIPES | LAYERS),
}
BETTER = {
    "16 values: smaller and nearer than rtn 4 bits": (
        "kmeans 16 values, thrift 1.5",
        "rtn 4 bits",
    ),
    "8 values: smaller and nearer than rtn 3 bits": ("kmeans 8 values, thrift 2", "rtn 3 bits"),
}


def main() -> None:
    """Measures the chosen networks and records them."""
    parser = argparse.ArgumentParser(description="Shared weights against rounded ones.")
    parser.add_argument("names", nargs="*", metavar="network", help=f"among {list(NETWORKS)}")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    for name in () if options.table else options.names or NETWORKS:
        print(f"== {name}", flush=True)
        rows = measured(*NETWORKS[name])
        found = earlier() | {name: rows}
        record("sharing", {n: found[n] for n in NETWORKS if n in found})
    print(table(earlier()))


def earlier() -> dict[str, Any]:
    """What is recorded."""
    path = RESULTS / "sharing.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


def measured(
    build: Callable[[], nn.Module], data: Callable[[], tersor.Task], recipes: dict[str, Steps]
) -> dict[str, Any]:
    """Figures of every recipe, and whether what must hold does."""
    model, task = build(), data()
    inputs = [batch for batch, _ in task.test()]
    reference = reference_outputs(model, task, inputs)
    answers = decisions(model, task, inputs)
    found: dict[str, Any] = {"fp32": {"bytes": written(model)}}
    for label, steps in (PLAIN | recipes).items():
        started = time.perf_counter()
        done = run(model, steps, None if label in PLAIN else task)
        seconds = time.perf_counter() - started
        apart = decisions(done, task, inputs) != answers
        found[label] = {
            "bytes": written(done),
            "disagreement": round(float(apart.float().mean()), 5),
            "divergence": round(divergence_of(done, task, inputs, reference), 5),
            "seconds": round(seconds, 1),
        }
        print(label, found[label], flush=True)
    found["holds"] = {
        claim: all(found[mine][figure] < found[theirs][figure] for figure in FIGURES)
        for claim, (mine, theirs) in BETTER.items()
    }
    print(found["holds"], flush=True)
    return found


FIGURES = ("bytes", "disagreement")


def decisions(model: nn.Module, task: tersor.Task, inputs: Any) -> torch.Tensor:
    """The class that each input is given."""
    with torch.inference_mode(), decoded(model):
        return torch.cat([task.predict(model, batch).argmax(1) for batch in inputs])


def written(model: nn.Module) -> int:
    """Bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        return tersor.save(model, Path(folder) / "m.tersor", graph=False).stat().st_size


def table(figures: dict[str, Any]) -> str:
    """What was recorded, as Markdown: bytes and disagreement."""
    labels = dict.fromkeys(label for rows in figures.values() for label in rows)
    lines = [f"| recipe | {' | '.join(figures)} |", "|---|" + "---|" * len(figures)]
    for label in labels:
        if label not in ("holds", "fp32"):
            cells = [cell(rows.get(label)) for rows in figures.values()]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    """One recipe on one network."""
    return f"{row['bytes']:,} B, {row['disagreement']:.1%}" if row else ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
