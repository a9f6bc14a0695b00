"""The summary of a run: every figure of the report, measured on the reloaded file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.codec import Header, coded_bytes, read_header
from tersor.forms import Dense, Trellis
from tersor.forms.form import Form
from tersor.measure import batch_of, compare, latency_ab, macs, peak_memory, size
from tersor.plan.budget import Budget
from tersor.plan.route import Route
from tersor.plan.search import front
from tersor.plan.study import Study
from tersor.plan.trial import Bench, Point
from tersor.recipe import recipe_of
from tersor.surgery.walk import Site, walk
from tersor.version import VERSION


def summary(
    bench: Bench, route: Route | None, point: Point, compressed: nn.Module, path: Path
) -> dict[str, Any]:
    """The report as data; see docs/guide/report.md for its keys.

    route: that the search took; None for a given recipe
    """
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
        "layers": _layers(found, point, compressed, path),
        "sensitivity": route.sensitivity(compressed) if route else [],
        "points": _points(bench, route, point),
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


def _layers(found: Study, point: Point, compressed: nn.Module, path: Path) -> list[dict[str, Any]]:
    """One row a weight: what it was, what it is stored as, and its bytes in the file."""
    stored = {site.name: site for site in walk(compressed)}
    taken = _bytes_of(stored.values(), read_header(path))
    rows = []
    for site in found.sites:
        form = stored[site.name].form if site.name in stored else None
        rows.append(
            {
                "name": site.name,
                "kind": site.kind,
                "shape": list(site.weight.shape),
                "parameters": site.weight.numel(),
                "bytes_before": site.weight.numel() * site.weight.element_size(),
                "bytes_after": taken.get(site.name),
                "form": form.kind if form else str(site.weight.dtype).removeprefix("torch."),
                "option": point.plan.labels.get(site.name) or _step(form),
            }
        )
    return rows


def _bytes_of(sites: Iterable[Site], header: Header) -> dict[str, int]:
    """Bytes of each weight in the file.

    Small weights share a chunk; their part of all is what each would take by itself.
    """
    entries = {name: entry for entry in header.entries for name in entry.names}
    alone = {
        site.name: coded_bytes(site.form or Dense(site.weight, site.weight.dtype))
        for site in sites
        if site.name in entries
    }
    together = sum(header.stored_bytes(entries[name]) for name in alone)
    share = together / max(1, sum(alone.values()))
    return {name: round(share * size) for name, size in alone.items()}


def _step(form: Form | None) -> str | None:
    """ "0.031 step", for a form that has one."""
    return f"{float(form.step.mean()):.2g} step" if isinstance(form, Trellis) else None


def _points(bench: Bench, route: Route | None, chosen: Point) -> list[dict[str, Any]]:
    """Files that were written, and where the route expects the front between them."""
    tried = {json.dumps(point.plan.recipe): point for point in [*bench.points, chosen]}
    rows = [
        {
            "bytes": point.bytes,
            "divergence": point.divergence,
            "metrics": point.metrics,
            "chosen": point == chosen,
            "note": "",
        }
        for point in tried.values()
    ]
    expected = front(route, chosen) if route else []
    return rows + [
        {"bytes": size, "divergence": loss, "metrics": {}, "chosen": False, "note": "expected"}
        for size, loss in expected
    ]


def _command() -> str | None:
    """The command line that started this run; None inside an interactive session."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    if program in ("", "-c", "-m"):
        return None
    start = ["tersor"] if program in ("tersor", "__main__.py") else ["python", program]
    return shlex.join([*start, *sys.argv[1:]])
