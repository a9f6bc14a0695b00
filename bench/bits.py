"""How far answers move at 4, 3 and 2 bits a weight, codes of fixed length, nothing entropy-coded.

    python bench/bits.py                    all
    python bench/bits.py resnet20 mixed     some, merged into bench/results/bits.json
    python bench/bits.py --table            none: the table of docs/guide/quantize.md from that file

Each network is judged on data that steered nothing. Bytes are those of everything it stores: codes,
scales, zero points, and float32 for what is not quantized.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from _record import RESULTS, record
from smallest import cifar, disagreement, pairs
from torch import nn

import sentences
import stories
import tersor
import zoo
from tersor.measure import divergence_of, quality, reference_outputs, size
from tersor.methods import run
from tersor.surgery import walk

Steps = list[dict[str, Any]]
GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "quantize.md"
PLACE = re.compile(r"(<!-- bench/bits.py -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
TITLES = {
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "mixed": "ResNet-20, mixed",
    "minilm": "MiniLM",
    "stories": "stories260K",
}


def step(method: str, **options: Any) -> dict[str, Any]:
    """One step of a recipe."""
    return {"method": method, "options": options}


NORMS = step("recover.batchnorm")
CONVOLUTIONS: dict[str, Steps] = {
    f"{method} {bits} bits": [
        step(f"quantize.{method}", bits=bits, symmetric=False),
        NORMS,
    ]
    for bits in (4, 3, 2)
    for method in ("rtn", "gptq", "qronos")
}
SENTENCES: dict[str, Steps] = {
    "qronos 4 bits, group 64": [
        step("quantize.qronos", bits=4, group_size=64, symmetric=False),
        step("recover.scales", epochs=4),
    ],
    "qronos 3 bits, group 64": [
        step("quantize.qronos", bits=3, group_size=64, symmetric=False),
        step("recover.scales", epochs=4),
    ],
    "qronos 2 bits, group 64, tables 4 bits": [
        step("quantize.qronos", bits=2, group_size=64, symmetric=False, exclude="Embedding"),
        step("quantize.rtn", bits=4, group_size=64, include="Embedding"),
        step("recover.scales", epochs=4),
    ],
}
STORIES: dict[str, Steps] = {
    f"qronos {bits} bits, group {group}": [
        step("quantize.qronos", bits=bits, group_size=group, symmetric=False),
        step("recover.scales", epochs=5),
    ]
    for bits, group in ((4, 16), (3, 16), (2, 8))
}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tersor.Task], dict[str, Steps]]] = {
    "resnet20": (zoo.resnet20, cifar, CONVOLUTIONS),
    "resnet56": (zoo.resnet56, cifar, CONVOLUTIONS),
    "minilm": (sentences.model, pairs, SENTENCES),
    "stories": (zoo.stories260k, lambda: stories.task(128), STORIES),
}


def main() -> None:
    """Measures the chosen networks and records them."""
    parser = argparse.ArgumentParser(description="Codes of fixed length against behaviour.")
    parser.add_argument("names", nargs="*", metavar="what", help=f"{[*NETWORKS, 'mixed']}")
    parser.add_argument("--table", action="store_true", help="write the table, measure nothing")
    options = parser.parse_args()
    figures = _earlier()
    if not options.table:
        torch.set_num_threads(2)
        for name in options.names or [*NETWORKS, "mixed"]:
            print(f"== {name}", flush=True)
            figures[name] = mixed() if name == "mixed" else measured(*NETWORKS[name])
            record("bits", dict(sorted(figures.items())))
    page = GUIDE.read_text(encoding="utf-8")
    GUIDE.write_text(PLACE.sub(rf"\1{table(figures)}\2", page), encoding="utf-8")


def measured(
    build: Callable[[], nn.Module], data: Callable[[], tersor.Task], recipes: dict[str, Steps]
) -> dict[str, Any]:
    """Figures of every recipe."""
    model, task = build(), data()
    inputs = [batch for batch, _ in task.test()]
    reference = reference_outputs(model, task, inputs)
    found = {"original": {"metrics": _metrics(model, task), "bytes": size(model).bytes}}
    for label, steps in recipes.items():
        found[label] = judged(model, task, steps, inputs, reference)
        print(label, found[label], flush=True)
    return found


def judged(
    model: nn.Module, task: tersor.Task, steps: Steps, inputs: Any, reference: Any
) -> dict[str, Any]:
    """Figures of one recipe."""
    start = time.perf_counter()
    done = run(model, steps, task)
    figures = {
        "seconds": round(time.perf_counter() - start, 1),
        "bytes": size(done).bytes,
        "bits_per_weight": round(_bits(done), 4),
        "divergence": round(divergence_of(done, task, inputs, reference), 5),
        "metrics": _metrics(done, task),
    }
    if task.kind == "classification":
        figures["disagreement"] = disagreement(done, task, inputs, reference)
    outcomes = {s.method: s.outcome for s in done.recipe.steps if s.outcome}
    return figures | {"outcomes": outcomes}


def mixed() -> dict[str, Any]:
    """ResNet-20 at the bytes of uniform 3-bit codes, and what each weight then gets."""
    model, task = zoo.resnet20(), cifar()
    inputs = [batch for batch, _ in task.test()]
    reference = reference_outputs(model, task, inputs)
    uniform = [step("quantize.qronos", bits=3), NORMS]
    found = {"uniform 3 bits": judged(model, task, uniform, inputs, reference)}
    bits = found["uniform 3 bits"]["bits_per_weight"]
    for generations in (0, 8):
        steps = [step("quantize.mixed", bits=bits, generations=generations), NORMS]
        label = f"mixed, {generations} generations"
        found[label] = judged(model, task, steps, inputs, reference)
        print(label, found[label], flush=True)
    return found


def _bits(model: nn.Module) -> float:
    sites = [site for site in walk(model) if site.form is not None]
    stored = sum(site.form.stored_bits() for site in sites if site.form is not None)
    return stored / sum(site.weight.numel() for site in sites)


def _metrics(model: nn.Module, task: tersor.Task) -> dict[str, float]:
    return {name: round(found.value, 4) for name, found in quality(model, task).items()}


def table(figures: dict[str, Any]) -> str:
    """What was recorded, as Markdown."""
    lines = [
        "| network | recipe | bits a weight | bytes | apart from the original | metric |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        for label, row in figures.get(name, {}).items():
            if label == "original":
                continue
            metric, value = next(iter(row["metrics"].items()))
            apart = f"KL {row['divergence']:.4f}"
            if name == "minilm":
                apart = f"cosine {1 - row['divergence']:.4f}"
            lines.append(
                f"| {title} | {label} | {row['bits_per_weight']:.2f} | {row['bytes']:,} "
                f"| {apart} | {metric} {value:.2f} |"
            )
    return "\n".join(lines)


def _earlier() -> dict[str, Any]:
    path = RESULTS / "bits.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


if __name__ == "__main__":
    main()
