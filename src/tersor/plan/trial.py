"""Trials: a recipe applied, written to a file, and judged by that file alone."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.codec import load, save
from tersor.errors import ExportError, ModelError
from tersor.measure import quality
from tersor.methods import run
from tersor.methods.effects import Known
from tersor.plan.budget import Budget
from tersor.plan.folder import RunFolder
from tersor.plan.route import Plan, Rows
from tersor.plan.study import Study, divergence
from tersor.program import Program, program_of
from tersor.program.inputs import Arguments
from tersor.program.of_model import call_arguments
from tersor.progress import Bar
from tersor.task import device_of
from tersor.train import TrainingLog
from tersor.version import VERSION

TRIALS = 60
"""What the trials of a search take, in units of one measured choice; fewer end it sooner."""


@dataclass(frozen=True)
class Point:
    """One plan that was tried.

    bytes: of the file it gave
    divergence: of that file's model on held-out inputs; None where there are none
    metrics: measured on the reloaded file; empty where only its size was needed
    """

    plan: Plan
    bytes: int
    divergence: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Bench:
    """Where recipes are tried: the study, the folder, and what every written file carries.

    known: what was found out about the model before, for recipes that would find it out again
    points: all that were tried
    log: of the recipe that was applied last
    """

    study: Study
    folder: RunFolder
    budget: Budget
    profile: str
    seed: int
    bar: Bar
    known: Known | None = None
    program: Any = None
    traceable: bool = True
    points: list[Point] = field(default_factory=list)
    log: TrainingLog | None = None
    _applied: tuple[Rows, nn.Module] | None = None

    def attempt(self, plan: Plan) -> Point:
        """Writes the plan's file, and measures its size and how far the answers moved."""
        recipe, recall = plan.recipe, self.study.journal.recall
        key = self._trial_key(recipe)
        size = recall({"what": "size", **key}, lambda: self._trial(recipe).stat().st_size)

        def measure() -> float | None:
            self.bar.doing(f"measuring a file of {size:,} bytes")
            return divergence(self.study, self._reloaded(recipe))

        point = Point(plan, int(size), recall({"what": "divergence", **key}, measure))
        self.points.append(point)
        self.bar.advance(5)
        return point

    def judge(self, point: Point) -> Point:
        """Measures the metrics of the point's file, reloaded from disk."""
        task = self.study.task
        if task is None or not task.has_test:
            return point

        def measure() -> dict[str, float]:
            model = self._reloaded(point.plan.recipe)
            try:
                return {name: estimate.value for name, estimate in quality(model, task).items()}
            except ModelError:
                # Of so few bytes that answers are no numbers: it keeps no quality.
                metrics = task.metrics.items()
                return {n: -inf if metric.higher_is_better else inf for n, metric in metrics}

        self.bar.doing(f"measuring a file of {point.bytes:,} bytes")
        key = {"what": "quality", **self._trial_key(point.plan.recipe)}
        judged = replace(point, metrics=self.study.journal.recall(key, measure))
        self.points = [judged if other == point else other for other in self.points]
        self.bar.advance(5)
        return judged

    def _trial_key(self, recipe: Rows) -> dict[str, Any]:
        """All that the bytes of a trial's file depend on."""
        settings = {"budget": str(self.budget), "profile": self.profile, "seed": self.seed}
        return {"tersor": VERSION, **self.study.key, **settings, "recipe": recipe}

    def _trial(self, recipe: Rows) -> Path:
        """The file of a recipe that is being tried, written again if a killed run lost it."""
        path = self.folder.trial(_digest(self._trial_key(recipe)))
        if path.exists():
            return path
        self.bar.doing("writing a trial file")
        # Placeholders of the final length, so that the size of the trial is the size of the result.
        return self.write(recipe, path, self.file_metrics(self.study.before))

    def _reloaded(self, recipe: Rows) -> nn.Module:
        return self.reload(self._trial(recipe))

    def reload(self, path: Path) -> nn.Module:
        """The model as a user will get it: from the file."""
        if self.program is None and self.traceable:
            self.trace()
        if self.traceable:
            return load(path).to(device_of(self.study.model))
        return load(path, into=deepcopy(self.study.model))

    def apply(self, recipe: Rows) -> nn.Module:
        """The model after the recipe, in memory; the last one is kept, for it is often the best."""
        if self._applied is None or self._applied[0] != recipe:
            model, task = self.study.model, self.study.task
            # A row in the bar of the run says how far a training is.
            self.log = TrainingLog(self.folder.training(_digest(recipe)))
            known, log = self.known, self.log
            done = run(model, recipe, task, known=known, log=log) if recipe else deepcopy(model)
            self._applied = recipe, done
        return self._applied[1]

    def write(self, recipe: Rows, path: Path, metrics: dict[str, Any]) -> Path:
        """Writes the recipe's file with the metrics in it."""
        if self.program is None and self.traceable:
            self.trace()
        provenance = {
            "tersor": VERSION,
            "torch": torch.__version__,
            "model": self.study.fingerprint,
            "task": self.study.key["task"],
            "budget": str(self.budget),
            "seed": self.seed,
        }
        return save(
            self.apply(recipe),
            path,
            graph=self.program if self.traceable else False,
            metrics=metrics,
            provenance=provenance,
            profile=self.profile,
        )

    def trace(self) -> None:
        """Traces the model once for all files; where that fails they hold weights alone."""
        self.bar.doing("tracing the model")
        if self.study.example is None:
            self.traceable = False
            self.study.notes.append(
                "No example input was given, so the file holds weights alone: "
                "load it with load(path, into=your_model)."
            )
            return
        try:
            program = program_of(self.study.model, self.study.example)
            self._check_sizes(program)
            self.program = program
        except ExportError as error:
            self.traceable = False
            self.study.notes.append(
                f"The file holds weights alone and needs the model's code to load: {error}"
            )

    def _check_sizes(self, program: Program) -> None:
        """Raises ExportError where the data have sizes that the program does not take."""
        task = self.study.task
        if task is None:
            return
        test = (inputs for inputs, _ in task.test()) if task.has_test else ()
        arguments = Arguments(program)
        for inputs in chain(task.calibration(), test):
            try:
                arguments.flatten(*call_arguments(inputs))
            except ModelError as error:
                raise ExportError(f"its graph would not take all of the data ({error})") from error

    def file_metrics(self, after: dict[str, float]) -> dict[str, dict[str, float]]:
        """What the file says about itself: the metrics before and after, to six digits."""
        return (
            {"before": _rounded(self.study.before), "after": _rounded(after)}
            if self.study.before
            else {}
        )


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in metrics.items()}


def _digest(value: Any) -> str:
    """Twelve digits, the same in every run."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
