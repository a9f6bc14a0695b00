"""One proof, in the process that runs it: compress, compare, export, note outputs for the reload.

python bench/_proof.py <name> <folder>
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from _reload import call

import cifar10
import sentences
import speech
import stories
import tersor
import zoo
from tersor.errors import CompressError
from tersor.export import to_onnx
from tersor.plan import Result
from tersor.surgery import decoded
from tersor.task import Inputs, classification

Holds = Callable[[dict[str, Any]], dict[str, bool]]


@dataclass(frozen=True)
class Proof:
    """What is compressed under which budget, and what must then be true of the figures."""

    model: Callable[[], torch.nn.Module]
    task: Callable[[], tersor.Task]
    budget: str
    holds: Holds = lambda found: {}


def main() -> None:
    """Writes proof.json and outputs.pt into the folder."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    proof = PROOFS[name]
    started = time.perf_counter()
    model, task = proof.model(), proof.task()
    result = tersor.compress(model, task, proof.budget, run=folder / "run", progress=False)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "budget": proof.budget,
        **figures(result),
        "wall_s": round(seconds, 1),
        "peak_rss_gb": round(peak / 1e9, 3),
        "threads": torch.get_num_threads(),
    }
    compressed = tersor.run(model, result.report["recipe"], task)
    found["onnx"] = exported(compressed, task.example(), folder)
    torch.save(list(outputs(compressed, task)), folder / "outputs.pt")
    found["holds"] = {"exports to ONNX": "error" not in found["onnx"], **proof.holds(found)}
    (folder / "proof.json").write_text(json.dumps(found), encoding="utf-8")


def figures(result: Result) -> dict[str, Any]:
    """Bytes and quality, from the file."""
    report, comparison = result.report, result.report["comparison"]
    found: dict[str, Any] = {
        "bytes_before": report["before"]["bytes"],
        "bytes": report["file"]["bytes"],
        "ratio": round(report["file"]["ratio"], 5),
        "samples": comparison["n"],
        "metrics": {
            name: {
                "before": change["before"]["value"],
                "after": change["after"]["value"],
                "change": change["delta"],
                "interval": [change["low"], change["high"]],
            }
            for name, change in comparison["metrics"].items()
        },
        "divergence": comparison["divergence"],
    }
    for key in ("disagreement", "mcnemar", "cosine"):
        if comparison.get(key) is not None:
            found[key] = comparison[key]
    if comparison.get("flips"):
        found["flips"] = {k: comparison["flips"][k] for k in ("total", "broken", "fixed", "other")}
    return found


def exported(model: torch.nn.Module, example: Inputs, folder: Path) -> dict[str, Any]:
    """What became of the ONNX file; its outputs are compared with torch's as it is written."""
    try:
        done = to_onnx(model, folder / "model.onnx", example=example).as_json()
    except CompressError as error:
        return {"error": str(error)}
    found = {key: done[key] for key in ("bytes", "opset", "runtime")}
    for key in ("difference", "default_difference"):
        found[f"relative_{key}"] = (done[key] or {}).get("relative")
    return found


def outputs(model: torch.nn.Module, task: tersor.Task) -> Any:
    """(what, inputs, outputs) for several batch sizes and lengths."""
    batches = [("one sample", task.example(1)), ("three samples", task.example(3))]
    batches += [("a calibration batch", task.calibration()[0])]
    if task.kind == "language":
        shorter = task.example(1)[:, :37]
        batches += [("37 tokens", shorter), ("two rows", torch.cat((shorter, shorter.flip(1))))]
    for said, inputs in batches:
        with torch.inference_mode(), decoded(model):
            yield said, inputs, call(model, inputs)


def imagenet() -> tersor.Task:
    """Judged on 500 of the samples; 256 others guide the choice."""
    images, labels = zoo.imagenet(1000, 128)
    return classification(
        test=(images[:500], labels[:500]), calibration=images[500:756], holdout=images[756:]
    )


def story_task() -> tersor.Task:
    """verify.py's protocol: the last 150 stories; stories before them guide the choice."""
    return stories.task(calibration=64)


def _cifar(found: dict[str, Any]) -> dict[str, bool]:
    return {
        "file <= 15 % of the float32 safetensors": found["ratio"] <= 0.15,
        "accuracy within 0.5 points": found["metrics"]["accuracy"]["change"] >= -0.5,
        "disagreement <= 3 %": found["disagreement"] <= 0.03,
    }


def _minilm(found: dict[str, Any]) -> dict[str, bool]:
    return {
        "file <= 18.2 MB": found["bytes"] <= 18.2e6,
        "Spearman >= 81.8": found["metrics"]["spearman"]["after"] >= 81.8,
        "mean cosine >= 0.985": found["cosine"] >= 0.985,
        "<= 10 minutes": found["wall_s"] <= 600,
        "peak RSS <= 2.5 GB": found["peak_rss_gb"] <= 2.5,
    }


def _stories(found: dict[str, Any]) -> dict[str, bool]:
    perplexity = found["metrics"]["perplexity"]
    return {
        "file <= 25 % of the float32 safetensors": found["ratio"] <= 0.25,
        "perplexity before is verify.py's 3.893": abs(perplexity["before"] - 3.893) < 5e-4,
        "perplexity <= 1.02 x 3.893": perplexity["after"] <= 1.02 * 3.893,
    }


def _quarter(found: dict[str, Any]) -> dict[str, bool]:
    return {"file <= 25 % of the float32 safetensors": found["ratio"] <= 0.25}


PROOFS = {
    "resnet20": Proof(zoo.resnet20, cifar10.task, "size=0.15x, drop=0.5", _cifar),
    "resnet56": Proof(zoo.resnet56, cifar10.task, "size=0.15x, drop=0.5", _cifar),
    "minilm": Proof(sentences.model, sentences.task, "size=0.2x, drop=0.5", _minilm),
    "stories": Proof(zoo.stories260k, story_task, "size=0.25x", _stories),
    "mobilenet": Proof(zoo.mobilenet_v1, imagenet, "size=0.25x", _quarter),
    "resnet8": Proof(zoo.resnet8, cifar10.task, "size=0.25x", _quarter),
    "silero": Proof(zoo.silero_vad, speech.task, "size=0.25x", _quarter),
}


if __name__ == "__main__":
    main()
