"""Trials: a recipe applied, written to a file, and judged by that file alone."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.codec import load, save
from tersor.errors import ExportError, ModelError
from tersor.measure import quality
from tersor.methods import run
from tersor.plan.budget import Budget
from tersor.plan.folder import RunFolder
from tersor.plan.progress import Bar
from tersor.plan.study import Study
from tersor.program import Program, program_of
from tersor.program.inputs import Arguments
from tersor.program.of_model import call_arguments
from tersor.version import VERSION


@dataclass(frozen=True)
class Point:
    """One recipe that was tried.

    bytes: of the file it gave
    loss: what the allocation promised, the sum of the measured divergences
    labels: weight -> the choice it got
    metrics: measured on the reloaded file; empty where only its size was needed
    """

    recipe: list[dict[str, Any]]
    bytes: int
    loss: float
    labels: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Bench:
    """Where recipes are tried: the study, the folder, and what every written file carries."""

    study: Study
    folder: RunFolder
    budget: Budget
    profile: str
    seed: int
    bar: Bar
    program: Any = None
    traceable: bool = True
    written: list[Point] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def size(
        self, recipe: list[dict[str, Any]], loss: float, labels: dict[str, str] | None = None
    ) -> Point:
        """Writes the recipe's file and says how large it is."""
        size = self.study.journal.recall(
            {"what": "size", **self._trial_key(recipe)},
            lambda: self._write(recipe, self.trial(recipe)).stat().st_size,
        )
        point = Point(recipe, int(size), loss, labels or {})
        self.written.append(point)
        return point

    def judge(self, point: Point) -> Point:
        """Measures the metrics of the point's file, reloaded from disk."""
        task = self.study.task
        if task is None or not task.has_test:
            return point

        def measure() -> dict[str, float]:
            model = self.reload(self.trial(point.recipe), point.recipe)
            return {name: estimate.value for name, estimate in quality(model, task).items()}

        self.bar.doing(f"measuring a file of {point.bytes:,} bytes")
        key = {"what": "quality", **self._trial_key(point.recipe)}
        judged = replace(point, metrics=self.study.journal.recall(key, measure))
        self.points.append(judged)
        self.bar.advance(10)
        return judged

    def trial(self, recipe: list[dict[str, Any]]) -> Path:
        """The file of a recipe that is being tried."""
        text = json.dumps(self._trial_key(recipe), sort_keys=True)
        return self.folder.trial(hashlib.sha256(text.encode()).hexdigest()[:12])

    def _trial_key(self, recipe: list[dict[str, Any]]) -> dict[str, Any]:
        """All that the bytes of a trial's file depend on."""
        settings = {"budget": str(self.budget), "profile": self.profile, "seed": self.seed}
        return {**self.study.key, **settings, "recipe": recipe}

    def reload(self, path: Path, recipe: list[dict[str, Any]]) -> nn.Module:
        """The model as a user will get it: from the file, written again if a killed run lost it."""
        if not path.exists():
            self._write(recipe, path)
        if self.program is None and self.traceable:
            self.trace()
        return load(path) if self.traceable else load(path, into=deepcopy(self.study.model))

    def apply(self, recipe: list[dict[str, Any]]) -> nn.Module:
        """The model after the recipe, in memory."""
        model = self.study.model
        return run(model, recipe, self.study.task) if recipe else deepcopy(model)

    def write(self, recipe: list[dict[str, Any]], path: Path, metrics: dict[str, Any]) -> Path:
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

    def _write(self, recipe: list[dict[str, Any]], path: Path) -> Path:
        self.bar.doing("writing a trial file")
        # Placeholders of the final length, so that the size of the trial is the size of the result.
        return self.write(recipe, path, self.file_metrics(self.study.before))

    def file_metrics(self, after: dict[str, float]) -> dict[str, dict[str, float]]:
        """What the file says about itself: the metrics before and after, to six digits."""
        return (
            {"before": _rounded(self.study.before), "after": _rounded(after)}
            if self.study.before
            else {}
        )


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in metrics.items()}
