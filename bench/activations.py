"""What 8-bit activations cost: divergence and accuracy of networks that compute as integers would.

Takes about ten minutes on one core. Simulated in torch; `bench/runtimes.py` has runtimes.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _record import record
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import sentences
import zoo
from tersor.measure import compare
from tersor.methods import run
from tersor.task import Task, classification

Steps = list[dict[str, Any]]


def step(method: str, **options: Any) -> dict[str, Any]:
    """One step of a recipe."""
    return {"method": method, "options": options}


def static(samples: int, **options: Any) -> dict[str, Any]:
    """Static quantization, calibrated on so many inputs."""
    return step("quantize.static", samples=samples, **options)


WEIGHTS, BIAS = step("quantize.rtn"), step("recover.bias")
EQUALIZE, SMOOTH = step("transform.equalize"), step("transform.smooth")
OBSERVERS = ("minmax", "percentile", "mse", "entropy")
CONVOLUTIONS: dict[str, Steps] = {
    "rtn 8 bits": [WEIGHTS],
    **{f"static, {observer}": [static(256, observer=observer)] for observer in OBSERVERS},
    "equalize, static": [EQUALIZE, static(256)],
    "static, bias": [static(256), BIAS],
    "static, half of it falls back": [static(256, fallback=0.5)],
    "static, 6-bit activations": [static(256, bits=6)],
    "static, 6-bit activations, bias": [static(256, bits=6), BIAS],
}
SENTENCES: dict[str, Steps] = {
    "rtn 8 bits": [WEIGHTS],
    "static": [static(512)],
    "smooth, static": [SMOOTH, static(512)],
    "smooth, static, minmax": [SMOOTH, static(512, observer="minmax")],
    "dynamic": [step("quantize.dynamic")],
    "dynamic, per row": [step("quantize.dynamic", per_row=True)],
}


def images(name: str) -> tuple[nn.Module, Task]:
    """A CIFAR-10 network, calibrated on training images and judged on the lossless test images."""
    (test, labels), (train, _) = zoo.cifar10("test"), zoo.cifar10("train")
    task = classification(test=(test, labels), calibration=train[:512], holdout=train[512:1024])
    return getattr(zoo, name)(), task


def mobilenet() -> tuple[nn.Module, Task]:
    """MobileNetV1 0.25, calibrated on 256 ImageNet samples and judged on 616 others."""
    pictures, labels = zoo.imagenet(1000, 128)
    task = classification(
        test=(pictures[384:], labels[384:]), calibration=pictures[:256], holdout=pictures[256:384]
    )
    return zoo.mobilenet_v1(), task


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Task]], dict[str, Steps]]] = {
    "resnet20": (lambda: images("resnet20"), CONVOLUTIONS),
    "resnet8": (lambda: images("resnet8"), CONVOLUTIONS),
    "mobilenet_v1": (mobilenet, CONVOLUTIONS),
    "minilm": (lambda: (sentences.model(), sentences.task()), SENTENCES),
}


def judged(net: nn.Module, task: Task, steps: Steps) -> dict[str, Any]:
    """Figures of one recipe, or the reason why it does not apply."""
    start = time.perf_counter()
    try:
        model = run(net, steps, task)
    except ValueError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - start
    found = compare(net, model, task)
    change = next(iter(found.metrics.values()))
    figures: dict[str, Any] = {
        "divergence": round(found.divergence, 6),
        "metric": round(change.after.value, 2),
        "metric_change": round(change.delta, 2),
        "seconds": round(seconds, 1),
    }
    if found.disagreement is not None:
        figures["disagreement_percent"] = round(100 * found.disagreement, 2)
    if found.cosine is not None:
        figures["cosine"] = round(found.cosine, 5)
    outcomes = {step.method: step.outcome for step in model.recipe.steps if step.outcome}
    return figures | {"outcomes": outcomes}


def main() -> None:
    """Measures every recipe on every network, or on those named, and writes the results."""
    torch.set_num_threads(1)
    results = Path(__file__).parent / "results" / "activations.json"
    known = json.loads(results.read_text(encoding="utf-8"))["figures"] if results.exists() else {}
    for name in sys.argv[1:] or CASES:
        make, recipes = CASES[name]
        net, task = make()
        known[name] = {}
        for label, steps in recipes.items():
            known[name][label] = judged(net, task, steps)
            print(name, label, known[name][label], flush=True)
        record("activations", known, packages=("numpy", "transformers"))


if __name__ == "__main__":
    main()
