"""The target of a budget: the exported file is held to the same limits as the .tersor file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from tersor.export import OnnxModel, to_onnx
from tersor.measure import latency_ab, quality
from tersor.plan.search import shortfalls
from tersor.plan.trial import Bench


def check_target(bench: Bench, compressed: nn.Module) -> tuple[dict[str, Any], str]:
    """Exports the result beside it and measures the export.

    Returns its figures for the report, and a sentence on what it loses above the budget, if it
    does. Latency is compared with the original exported the same way, both on the runtime in turn.
    """
    found = bench.study
    bench.bar.doing("checking the exported model")
    folder = bench.folder.path / "exports"
    folder.mkdir(exist_ok=True)
    exported = to_onnx(compressed, folder / "model.onnx", example=found.example)
    with tempfile.TemporaryDirectory() as scratch:
        to_onnx(found.model, Path(scratch) / "original.onnx", example=found.example)
        before, after = OnnxModel(Path(scratch) / "original.onnx"), OnnxModel(exported.path)
        speed = latency_ab(before, after, found.example)
    figures: dict[str, Any] = {
        "path": f"exports/{exported.path.name}",
        "bytes": exported.bytes,
        "latency_ms": {
            "before": speed.before.median_ms,
            "after": speed.after.median_ms,
            "threads": speed.before.threads,
        },
    }
    if found.task is None or not found.task.has_test:
        return figures, ""
    metrics = {name: estimate.value for name, estimate in quality(after, found.task).items()}
    short = shortfalls(metrics, found.before, bench.budget, found.task)
    return {**figures, "metrics": metrics}, short
