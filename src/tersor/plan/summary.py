"""The summary of a run: every figure of the report, measured on the reloaded file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.measure import batch_of, compare, latency_ab, macs, peak_memory, size
from tersor.plan.budget import Budget
from tersor.plan.search import front
from tersor.plan.study import Study
from tersor.plan.trial import Bench, Point
from tersor.recipe import recipe_of
from tersor.version import VERSION


def summary(bench: Bench, point: Point, compressed: nn.Module, path: Path) -> dict[str, Any]:
    """The report as data; see docs/guide/report.md for its keys."""
    found = bench.study
    after = path.stat().st_size
    report: dict[str, Any] = {
        "tersor": VERSION,
        "command": _command(),
        "model": {
            "name": type(found.model).__name__,
            "parameters": size(found.model).parameters,
            "bytes": found.size_before,
            "macs": found.macs_per_sample or None,
        },
        "budget": bench.budget.as_json(),
        "met": True,
        "file": {
            "path": path.name,
            "bytes": after,
            "ratio": after / found.size_before,
            "graph": bench.traceable,
        },
        "before": {"bytes": found.size_before, "metrics": found.before},
        "after": {"bytes": after, "metrics": point.metrics},
        "layers": _layers(found, point, compressed),
        "sensitivity": [
            {"layer": site.name, "option": choice.label, "bytes": nbytes, "divergence": loss}
            for site, choices, sizes, losses in zip(
                found.sites, found.choices, found.sizes, found.losses, strict=False
            )
            for choice, nbytes, loss in zip(choices, sizes, losses, strict=True)
        ],
        "points": _points(bench, point),
        "recipe": recipe_of(compressed).as_json(),
        # The task adds notes of its own while it looks at the model's answers.
        "notes": list(dict.fromkeys([*(found.task.notes if found.task else ()), *found.notes])),
        "environment": environment(),
    }
    if found.task is not None:
        compared = compare(found.model, compressed, found.task, seed=bench.seed)
        report["comparison"] = compared.as_json()
    report["costs"] = _costs(found, compressed)
    return report


def overruns(budget: Budget, report: dict[str, Any]) -> str:
    """A sentence on every limit on size, latency, memory or MACs that the result does not keep."""
    costs = report["costs"]
    measured = {"size": (report["file"]["bytes"], report["before"]["bytes"], "bytes")}
    for name, unit in (("memory", "bytes of activations"), ("macs", "MACs"), ("latency_ms", "ms")):
        cost = report.get("exports", {}).get(budget.target, {}).get(name) or costs.get(name)
        if cost:
            measured[name] = (cost["after"], cost["before"], unit)
    said = []
    for name, (after, before, unit) in measured.items():
        limit = getattr(budget, name)
        if limit is not None and after > limit.resolve(before):
            said.append(
                f"{name}={limit} allows {limit.resolve(before):,.6g} {unit} and the result has "
                f"{after:,.6g} (the original {before:,.6g}), so the {name} limit binds"
            )
    return "; ".join(said)


def environment() -> dict[str, Any]:
    """Where the figures were measured."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "system": sys.platform,
    }


def _costs(found: Study, compressed: nn.Module) -> dict[str, Any]:
    """Latency and activation memory for the example batch, MACs for a sample, before and after."""
    if found.example is None:
        return {}
    example = found.example
    speed = latency_ab(found.model, compressed, example, repeats=10)
    return {
        "batch": batch_of(example),
        "latency_ms": {
            "before": speed.before.median_ms,
            "after": speed.after.median_ms,
            "p95_before": speed.before.p95_ms,
            "p95_after": speed.after.p95_ms,
            "threads": speed.before.threads,
        },
        "memory": {
            "before": peak_memory(found.model, example).activations,
            "after": peak_memory(compressed, example).activations,
        },
        "macs": {
            "before": found.macs_per_sample,
            "after": macs(compressed, example).total // batch_of(example),
        },
    }


def _layers(found: Study, point: Point, compressed: nn.Module) -> list[dict[str, Any]]:
    """One row a weight: what it was and what it is stored as."""
    stored = {t.name: t for t in size(compressed).tensors}
    rows = []
    for site in found.sites:
        tensor = stored.get(site.name)
        rows.append(
            {
                "name": site.name,
                "kind": site.kind,
                "shape": list(site.weight.shape),
                "parameters": site.weight.numel(),
                "bytes_before": site.weight.numel() * site.weight.element_size(),
                "bytes_after": -(-tensor.bits // 8) if tensor else None,
                "form": tensor.form if tensor else None,
                "option": point.labels.get(site.name),
            }
        )
    return rows


def _points(bench: Bench, chosen: Point) -> list[dict[str, Any]]:
    """Files that were written, and where the allocation expects the front between them."""
    tried = {json.dumps(p.recipe): p for p in [*bench.written, *bench.points, chosen]}
    rows = [
        {
            "bytes": p.bytes,
            "divergence": p.loss,
            "metrics": p.metrics,
            "chosen": p == chosen,
            "note": "",
        }
        for p in tried.values()
    ]
    if bench.study.losses:
        rows += [
            {
                "bytes": nbytes,
                "divergence": loss,
                "metrics": {},
                "chosen": False,
                "note": "expected",
            }
            for nbytes, loss in front(bench, chosen)
        ]
    return rows


def _command() -> str | None:
    """The command line that started this run; None inside an interactive session."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    if program in ("", "-c", "-m"):
        return None
    start = ["tersor"] if program in ("tersor", "__main__.py") else ["python", program]
    return shlex.join([*start, *sys.argv[1:]])
