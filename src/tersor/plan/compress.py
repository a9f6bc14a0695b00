"""compress: from a model, data and a budget to one small file, measured after it was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.errors import BudgetError
from tersor.measure import quality
from tersor.methods.sparse import release_codes
from tersor.plan.budget import Budget
from tersor.plan.checks import check_job, check_reach
from tersor.plan.coded import coded
from tersor.plan.folder import RunFolder, run_folder
from tersor.plan.journal import Journal, example_hash, model_hash
from tersor.plan.ladder import ladder
from tersor.plan.route import Plan
from tersor.plan.search import search, shortfalls
from tersor.plan.study import study
from tersor.plan.summary import overruns, summary
from tersor.plan.target import check_target
from tersor.plan.trial import Bench, Point
from tersor.progress import Bar
from tersor.recipe import Recipe
from tersor.report import finish
from tersor.surgery import plain_copy
from tersor.task import Task
from tersor.version import VERSION


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    model: reloaded from `path`, as a user of the file will get it
    path: the .tersor file
    folder: the run's folder, with report.json
    report: the same figures as report.json
    """

    model: nn.Module
    path: Path
    folder: Path
    report: dict[str, Any]


def compress(
    model: nn.Module,
    task: Task | None = None,
    budget: Budget | str | Mapping[str, Any] = "size=0.25x",
    *,
    run: str | Path | None = None,
    example: Any = None,
    recipe: Recipe | list[dict[str, Any]] | None = None,
    profile: str = "small",
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Makes `model` meet `budget`, checks it on the written file, and reports.

    model: a trained network; it is not changed
    task: how to feed and judge it; without one the choice of forms is blind and nothing is proven
    budget: `Budget`, or a line like "size=0.15x, drop=0.5"
    run: folder for the file, the report and the journal; the same job in it again resumes. By
        default runs/<model>-<hash of the job>
    example: inputs to trace the model with when there is no task
    recipe: steps to apply instead of searching for them
    profile: how the file is coded, as in `save`: "fast", "small" or "max"
    seed: of the bootstrap intervals; recorded in the file

    Raises BudgetError when the budget cannot be met (saying how near it came and which limit
    binds), ModelError, TaskError, OptionError, OutputError for inputs that cannot be used.
    """
    limits = Budget.of(budget)
    steps = recipe.as_json() if isinstance(recipe, Recipe) else recipe
    # Before the folder is made: what cannot be used leaves nothing behind.
    check_job(model, task, limits, example=example, recipe=steps, profile=profile, seed=seed)
    original = plain_copy(model)
    if steps is None and limits.target is None:
        # Codes are chosen anew, from the values that the old ones stand for.
        release_codes(original)
    job = {
        "tersor": VERSION,
        "model": model_hash(original),
        "task": task.fingerprint() if task else None,
        "example": example_hash(example),
        "budget": limits.as_json(),
        "recipe": steps,
        "profile": profile,
        "seed": seed,
    }
    place = run or _default_folder(original, job)
    with (
        run_folder(place, job) as (folder, journal),
        Bar("reading the model", shown=progress) as bar,
    ):
        bench = _bench(original, task, example, limits, folder, journal, profile, seed, bar)
        return _finish(bench, steps)


def _bench(
    model: nn.Module,
    task: Task | None,
    example: Any,
    budget: Budget,
    folder: RunFolder,
    journal: Journal,
    profile: str,
    seed: int,
    bar: Bar,
) -> Bench:
    found = study(model, task, task.example() if task and example is None else example, journal)
    bench = Bench(found, folder, budget, profile, seed, bar)
    if task is not None and task.has_test:
        bar.doing("measuring the original")
        found.before = journal.recall(
            {"what": "before", **found.key},
            lambda: {n: e.value for n, e in quality(model, task).items()},
        )
    check_reach(budget, found.before, task)
    return bench


def _finish(bench: Bench, recipe: list[dict[str, Any]] | None) -> Result:
    target, route = bench.budget.target, None
    if recipe is None:
        # A runtime computes with short codes of fixed length, a file alone need not have them.
        route = coded(bench) if target is None else ladder(bench)
        point = search(bench, route)
    else:
        point = _given(bench, recipe)
    bench.bar.doing("checking the written file")
    path = bench.write(point.plan.recipe, bench.folder.model, bench.file_metrics(point.metrics))
    compressed = bench.reload(path)
    report = summary(bench, route, point, compressed, path)
    short = ""
    if target is not None:
        figures, short = check_target(bench, compressed)
        report["exports"] = {target: figures}
    over = overruns(bench.budget, report)
    report["met"] = not (over or short)
    report["training"] = bench.log.report() if bench.log else []
    bench.folder.tidy()
    finish(report, bench.folder.path, bench.study.task)
    bench.folder.forget_trainings()
    kept = f"the file and its report are kept in {bench.folder.path}"
    if over:
        raise BudgetError(
            f"{over}. The methods here change how weights are stored, which steers size and "
            f"quality alone; {kept}"
        )
    if short:
        raise BudgetError(
            f"the file meets the budget, but exported to {target} {short}; relax that limit, or "
            f"leave target= out; {kept}"
        )
    return Result(compressed, path, bench.folder.path, report)


def _given(bench: Bench, recipe: list[dict[str, Any]]) -> Point:
    """The point of a recipe that the caller chose; the budget is still checked."""
    point = bench.judge(bench.attempt(Plan(recipe)))
    size, limit = bench.study.size_before, bench.budget.size
    short = shortfalls(point.metrics, bench.study.before, bench.budget, bench.study.task)
    if limit is not None and point.bytes > limit.resolve(size):
        short = f"the file has {point.bytes:,} bytes and may have {int(limit.resolve(size)):,}"
    if short:
        raise BudgetError(
            f"the given recipe does not meet the budget {bench.budget}: {short}; leave the recipe "
            "out to have one searched for, or relax the limit"
        )
    return point


def _default_folder(model: nn.Module, job: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"{type(model).__name__.lower()}-{digest[:8]}"
