"""What pruning costs without training and without labels, on data that steered nothing.

    python bench/pruning.py                   all (a quarter of an hour on two idle cores)
    python bench/pruning.py resnet20          some, merged into bench/results/pruning.json
    python bench/pruning.py --table           none: the tables of the docs from that file

Bytes are those of the .tersor file without its graph. Disagreement is the share of decisions that
differ from those of the dense network.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, record
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import cifar10
import stories
import tersor
import zoo
from tersor.measure import divergence_of, evaluating, reference_outputs
from tersor.methods import run

Steps = list[dict[str, Any]]
Options = dict[str, Any]
POLISH = {"method": "recover.polish", "options": {}}
BATCHNORM = {"method": "recover.batchnorm", "options": {}}


def step(name: str, **options: Any) -> dict[str, Any]:
    """One technique."""
    return {"method": name, "options": options}


def by_share(share: float) -> list[Steps]:
    """Every way to remove this share of the weights, alone and with what may follow."""
    first = [
        step("prune.magnitude", sparsity=share, scope="layer"),
        step("prune.magnitude", sparsity=share, scope="global"),
        step("prune.gradient", sparsity=share, score="fisher", scope="global"),
        step("prune.wanda", sparsity=share),
        step("prune.sparsegpt", sparsity=share),
        step("prune.obs", sparsity=share, scope="layer"),
        step("prune.obs", sparsity=share, scope="global"),
    ]
    return [[one, *after] for one in first for after in ([], [BATCHNORM], [POLISH, BATCHNORM])]


def by_pattern(pattern: str, **options: Any) -> list[Steps]:
    """Every way to leave n of m, with and without permuted channels."""
    named = ("prune.magnitude", "prune.wanda", "prune.sparsegpt", "prune.obs")
    permuted = step("transform.permute", pattern=pattern)
    return [
        [*before, step(name, sparsity=pattern, **options), *after]
        for name in named
        for before in ([], [permuted])
        for after in ([], [POLISH])
    ]


@dataclass(frozen=True)
class Network:
    """A network, its data and the recipes to try."""

    model: Callable[[], nn.Module]
    task: Callable[[], tersor.Task]
    recipes: list[Steps]


# The table of words and the layer that is tied to it stay dense, as is usual for language models.
NETWORKS = {
    "resnet20": Network(
        zoo.resnet20,
        cifar10.task,
        [*by_share(0.5), *by_share(0.7), *by_pattern("2:4"), *by_pattern("4:8")],
    ),
    "stories": Network(
        zoo.stories260k,
        lambda: stories.task(32),
        [
            *by_pattern("2:4", exclude="Embedding"),
            *by_pattern("4:8", exclude="Embedding"),
        ],
    ),
}


def main() -> None:
    """Measures the chosen networks and records them."""
    parser = argparse.ArgumentParser(description="What pruning costs.")
    parser.add_argument("names", nargs="*", metavar="network", help=f"among {list(NETWORKS)}")
    parser.add_argument("--table", action="store_true", help="print what is recorded")
    options = parser.parse_args()
    for name in () if options.table else options.names or NETWORKS:
        print(f"== {name}", flush=True)
        rows = measured(NETWORKS[name])
        # Read now: another run may have recorded another network meanwhile.
        found = earlier() | {name: rows}
        record("pruning", {n: found[n] for n in NETWORKS if n in found})
    print(table(earlier()))
    check(earlier())


def earlier() -> dict[str, Any]:
    """What is recorded."""
    path = RESULTS / "pruning.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


def measured(network: Network) -> list[dict[str, Any]]:
    """Figures of each recipe, the dense network first."""
    model, task = network.model(), network.task()
    inputs = [batch for batch, _ in task.test()]
    reference = reference_outputs(model, task, inputs)
    rows = [{"recipe": "dense", "bytes": written(model), "metrics": task.evaluate(model)}]
    print(rows[-1], flush=True)
    for recipe in network.recipes:
        started = time.perf_counter()
        done = run(model, recipe, task)
        seconds = time.perf_counter() - started
        rows.append(
            {
                "recipe": label(recipe),
                "bytes": written(done),
                "divergence": divergence_of(done, task, inputs, reference),
                "disagreement": disagreement(done, task, inputs, reference),
                "metrics": task.evaluate(done),
                "seconds": round(seconds, 1),
                "steps": recipe,
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "steps"}, flush=True)
    return rows


def disagreement(
    model: nn.Module, task: tersor.Task, inputs: list[Any], reference: list[Tensor]
) -> float:
    """Share of the decisions that are other ones than before."""
    with evaluating(model):
        found = [
            task.predict(model, batch).argmax(1) != before.argmax(1)
            for batch, before in zip(inputs, reference, strict=True)
        ]
    return float(torch.cat(found).float().mean())


def written(model: nn.Module) -> int:
    """Bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        return tersor.save(model, Path(folder) / "m.tersor", graph=False).stat().st_size


def label(recipe: Steps) -> str:
    """ "permute, magnitude 2:4, polish"."""
    parts = []
    for one in recipe:
        options = one["options"]
        words = [one["method"].partition(".")[2]]
        words += [str(options[key]) for key in ("score", "sparsity", "scope") if key in options]
        parts.append(" ".join(words))
    return ", ".join(parts)


def table(figures: dict[str, Any]) -> str:
    """What was recorded, as Markdown."""
    lines = [
        "| network | recipe | bytes | divergence | decisions changed | headline | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in figures.items():
        for row in rows:
            metric, value = next(iter(row["metrics"].items()))
            cells = [name, row["recipe"], f"{row['bytes']:,}", "", "", f"{metric} {value:.4g}", ""]
            if "divergence" in row:
                cells[3] = f"{row['divergence']:.3g}"
                cells[4] = f"{100 * row['disagreement']:.2f} %"
                cells[6] = f"{row['seconds']:g}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check(figures: dict[str, Any]) -> None:
    """Says whether what pruning promises on ResNet-20 holds."""
    rows = {row["recipe"]: row for row in figures.get("resnet20", [])}
    if not rows:
        return
    half = rows["sparsegpt 0.5"]["disagreement"] / rows["magnitude 0.5 global"]["disagreement"]
    print(
        f"sparsegpt at 50 % changes {half:.2f} x the decisions of magnitude, at most .75: ", end=""
    )
    print("holds" if half <= 0.75 else "MISSED")
    recovered = rows["obs 0.7 layer, polish, batchnorm"]["metrics"]["accuracy"]
    print(f"obs at 70 %, polished, is right in {recovered:.2f} %, at least 85: ", end="")
    print("holds" if recovered >= 85 else "MISSED")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
