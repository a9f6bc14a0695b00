"""The target of a budget: the exported file is held to the same limits as the .tersor file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from tersor.errors import BudgetError, OptionError
from tersor.export import OnnxModel, to_onnx
from tersor.measure import latency_ab, quality
from tersor.plan.search import shortfalls
from tersor.plan.trial import Bench


def check_target(bench: Bench, compressed: nn.Module) -> dict[str, Any]:
    """Exports the result beside it, measures the export, and gives its figures for the report.

    Latency is compared with the original exported the same way, both on the runtime in turn.
    Raises BudgetError where the exported model loses more quality than the budget allows.
    """
    found = bench.study
    if found.example is None:
        raise OptionError(
            f"target={bench.budget.target} needs an example input to export with; give a task or "
            "example="
        )
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
    if found.task is not None and found.task.has_test:
        metrics = {name: estimate.value for name, estimate in quality(after, found.task).items()}
        figures["metrics"] = metrics
        short = shortfalls(metrics, found.before, bench.budget, found.task)
        if short:
            raise BudgetError(
                f"the file meets the budget, but exported to {bench.budget.target} {short}; relax "
                f"that limit, or leave target= out"
            )
    return figures
