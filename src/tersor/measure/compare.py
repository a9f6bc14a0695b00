"""Comparison of two models on the same samples: what changed, for whom, and how sure that is.

One pass over the data feeds both models. Intervals of differences are paired: each resample takes
the same samples for both, so what the samples have in common cancels out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import ModelError, TaskError
from tersor.measure.figures import Figures
from tersor.measure.quality import Estimate, note_statistics
from tersor.measure.running import check_outputs, evaluating
from tersor.measure.statistics import bootstrap, interval, mcnemar, wilson

if TYPE_CHECKING:
    from tersor.task import Task

EXAMPLES = 50
_UNLABELLED = (
    "There are no test data: the models were compared on {on} inputs without targets, which shows "
    "how far the outputs moved but not whether they got worse."
)
_UNITS = {"classification": "nats", "language": "nats", "embedding": "1 - cosine"}


@dataclass(frozen=True)
class Change(Figures):
    """One metric before and after.

    delta: after - before; low, high: its paired 95 % bootstrap interval
    """

    before: Estimate
    after: Estimate
    delta: float
    low: float
    high: float
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class Flip(Figures):
    """A sample that is decided otherwise; classes by name, or by number where they have none."""

    index: int
    before: str
    after: str
    target: str | None


@dataclass(frozen=True)
class Flips(Figures):
    """Changed decisions, counted.

    broken: right before, wrong after
    fixed: wrong before, right after
    other: wrong before and after, differently; all are None without targets
    examples: the first 50
    """

    total: int
    broken: int | None
    fixed: int | None
    other: int | None
    examples: tuple[Flip, ...]


@dataclass(frozen=True)
class ClassChange(Figures):
    """Accuracy on the samples of one class, in points; n of them."""

    name: str
    before: float
    after: float
    delta: float
    n: int


@dataclass(frozen=True)
class Comparison(Figures):
    """How `after` behaves beside `before`.

    on: "test", or "holdout" or "calibration" where there is no test data
    n: rows compared: samples, or tokens of a language model
    metrics: the headline first; empty without test data
    divergence: mean over the rows of KL(before || after), 1 - cosine, or relative squared error
    divergence_p95, divergence_max: of the rows
    disagreement: share of rows decided otherwise, 0..1, with Wilson's 95 % interval; None where
        nothing is decided
    mcnemar: exact p-value of "as many broken as fixed"
    cosine: mean cosine between the embeddings of both, for embedding tasks
    notes: what the reader must know
    """

    on: str
    n: int
    metrics: dict[str, Change]
    divergence: float
    divergence_p95: float
    divergence_max: float
    divergence_unit: str
    disagreement: float | None = None
    disagreement_low: float | None = None
    disagreement_high: float | None = None
    flips: Flips | None = None
    mcnemar: float | None = None
    per_class: tuple[ClassChange, ...] = ()
    cosine: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def before(self) -> dict[str, Estimate]:
        """What `quality` would say of the model before."""
        return {name: change.before for name, change in self.metrics.items()}

    @property
    def after(self) -> dict[str, Estimate]:
        """What `quality` would say of the model after."""
        return {name: change.after for name, change in self.metrics.items()}

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; a class is `{"class": name, ...}`."""
        plain = super().as_json()
        plain["per_class"] = [{"class": row.pop("name"), **row} for row in plain["per_class"]]
        return plain


@dataclass
class _Seen:
    """What one pass leaves of each row; the outputs themselves are dropped."""

    before: dict[str, list[Tensor]]
    after: dict[str, list[Tensor]]
    divergence: list[Tensor] = field(default_factory=list)
    labels: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    cosine: list[Tensor] = field(default_factory=list)


def compare(before: nn.Module, after: nn.Module, task: Task, *, seed: int = 0) -> Comparison:
    """Compares two models on the task's test data, or on held-out inputs where it has none.

    Raises ModelError where an output is NaN or the outputs do not match in shape.
    """
    seen = _Seen({name: [] for name in task.metrics}, {name: [] for name in task.metrics})
    on = "test"
    with evaluating(before), evaluating(after):
        if task.has_test:
            for number, (inputs, targets) in enumerate(task.test(), 1):
                rows = _look(before, after, task, inputs, f"test batch {number}", seen)
                targets = task.targets(inputs, targets).cpu()
                note_statistics(seen.before, task, rows[0], targets)
                note_statistics(seen.after, task, rows[1], targets)
                seen.targets.append(targets)
        else:
            on, batches = _unlabelled(task)
            for number, inputs in enumerate(batches, 1):
                _look(before, after, task, inputs, f"{on} batch {number}", seen)
    return _summary(seen, task, on, seed)


def _look(
    before: nn.Module, after: nn.Module, task: Task, inputs: Any, where: str, seen: _Seen
) -> tuple[Tensor, Tensor]:
    first = check_outputs(task.predict(before, inputs).cpu(), before, where)
    second = check_outputs(task.predict(after, inputs).cpu(), after, where)
    if first.shape != second.shape:
        raise ModelError(
            f"on {where} the models give outputs of shape {tuple(first.shape)} and "
            f"{tuple(second.shape)}; compare a model with its own compressed version"
        )
    seen.divergence.append(task.divergence(first, second).double())
    labels = task.labels(first), task.labels(second)
    if labels[0] is not None and labels[1] is not None:
        seen.labels.append((labels[0], labels[1]))
    if task.kind == "embedding":
        seen.cosine.append(
            nn.functional.cosine_similarity(first.double(), second.double(), -1).flatten()
        )
    return first, second


def _unlabelled(task: Task) -> tuple[str, list[Any]]:
    for on, give in (("holdout", task.holdout), ("calibration", task.calibration)):
        batches = list(give())
        if batches:
            return on, batches
    raise TaskError(
        "the task has neither test nor calibration data to compare on; give at least one input"
    )


def _summary(seen: _Seen, task: Task, on: str, seed: int) -> Comparison:
    divergence = torch.cat(seen.divergence)
    notes = () if on == "test" else (_UNLABELLED.format(on=on),)
    decided = _decisions(seen, task) if seen.labels else {}
    return Comparison(
        on=on,
        n=len(divergence),
        metrics=_changes(seen, task, seed) if seen.targets else {},
        divergence=float(divergence.mean()),
        divergence_p95=float(np.percentile(divergence.cpu().numpy(), 95)),
        divergence_max=float(divergence.max()),
        divergence_unit=_UNITS.get(task.kind, "relative squared error"),
        cosine=float(torch.cat(seen.cosine).mean()) if seen.cosine else None,
        notes=notes,
        **decided,
    )


def _changes(seen: _Seen, task: Task, seed: int) -> dict[str, Change]:
    first = {name: torch.cat(parts) for name, parts in seen.before.items()}
    second = {name: torch.cat(parts) for name, parts in seen.after.items()}
    reduces = [task.metrics[name].reduce for name in first]
    drawn = bootstrap([*first.values(), *second.values()], [*reduces, *reduces], seed)
    changes = {}
    for column, (name, metric) in enumerate(task.metrics.items()):
        old, new = drawn[:, column], drawn[:, column + len(reduces)]
        kind = metric.unit, metric.higher_is_better
        values = float(metric.reduce(first[name])), float(metric.reduce(second[name]))
        n = len(first[name])
        changes[name] = Change(
            Estimate(values[0], *interval(old), *kind, n),
            Estimate(values[1], *interval(new), *kind, n),
            values[1] - values[0],
            *interval(new - old),
            *kind,
        )
    return changes


def _decisions(seen: _Seen, task: Task) -> dict[str, Any]:
    first, second = (torch.cat(side) for side in zip(*seen.labels, strict=True))
    targets = torch.cat(seen.targets) if seen.targets else None
    total, n = int((first != second).sum()), len(first)
    low, high = wilson(total, n)
    flips = _flips(first, second, targets, task.classes)
    found: dict[str, Any] = {
        "disagreement": total / n,
        "disagreement_low": low,
        "disagreement_high": high,
        "flips": flips,
    }
    if targets is not None and flips.broken is not None and flips.fixed is not None:
        found["mcnemar"] = mcnemar(flips.broken, flips.fixed)
        if task.kind == "classification":
            found["per_class"] = _per_class(first, second, targets, task.classes)
    return found


def _flips(
    first: Tensor, second: Tensor, targets: Tensor | None, classes: list[str] | None
) -> Flips:
    changed = (first != second).nonzero().flatten()
    examples = tuple(
        Flip(
            i,
            _name(first[i], classes),
            _name(second[i], classes),
            None if targets is None else _name(targets[i], classes),
        )
        for i in changed[:EXAMPLES].tolist()
    )
    if targets is None:
        return Flips(len(changed), None, None, None, examples)
    right, still = first == targets, second == targets
    broken, fixed = int((right & ~still).sum()), int((~right & still).sum())
    return Flips(len(changed), broken, fixed, len(changed) - broken - fixed, examples)


def _per_class(
    first: Tensor, second: Tensor, targets: Tensor, classes: list[str] | None
) -> tuple[ClassChange, ...]:
    rows = []
    for label, n in enumerate(torch.bincount(targets).tolist()):
        if n:
            of_class = targets == label
            before = 100 * int((first[of_class] == label).sum()) / n
            after = 100 * int((second[of_class] == label).sum()) / n
            rows.append(ClassChange(_name(label, classes), before, after, after - before, n))
    return tuple(rows)


def _name(label: Tensor | int, classes: list[str] | None) -> str:
    number = int(label)
    return classes[number] if classes and 0 <= number < len(classes) else str(number)
