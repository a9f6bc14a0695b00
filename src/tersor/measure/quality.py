"""Quality: every metric of a task on its test data, with a 95 % bootstrap interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tersor.measure.figures import Figures
from tersor.measure.running import check_outputs, evaluating
from tersor.measure.statistics import bootstrap, interval

if TYPE_CHECKING:
    from tersor.task import Task


@dataclass(frozen=True)
class Estimate(Figures):
    """One metric.

    low, high: 95 % bootstrap interval (percentiles of 1000 resamples of the rows)
    unit: "points", or the target's own
    n: rows judged: samples, or tokens of a language model
    """

    value: float
    low: float
    high: float
    unit: str
    higher_is_better: bool
    n: int


def quality(model: nn.Module, task: Task, *, seed: int = 0) -> dict[str, Estimate]:
    """Judges `model` on the task's test data, one pass. The first metric is the headline.

    Raises TaskError where the task has no test data, ModelError where an output is NaN.
    """
    statistics: dict[str, list[Tensor]] = {name: [] for name in task.metrics}
    with evaluating(model):
        for number, (inputs, targets) in enumerate(task.test(), 1):
            outputs = task.predict(model, inputs).cpu()
            check_outputs(outputs, model, f"test batch {number}")
            note_statistics(statistics, task, outputs, task.targets(inputs, targets).cpu())
    return estimates({name: torch.cat(parts) for name, parts in statistics.items()}, task, seed)


def note_statistics(
    statistics: dict[str, list[Tensor]], task: Task, outputs: Tensor, targets: Tensor
) -> None:
    """Appends what each metric needs to know of these rows."""
    for name, metric in task.metrics.items():
        statistics[name].append(metric.sample(outputs, targets))


def estimates(statistics: dict[str, Tensor], task: Task, seed: int) -> dict[str, Estimate]:
    """Value and interval of every metric from its per-row statistics."""
    metrics = {name: task.metrics[name] for name in statistics}
    drawn = bootstrap(list(statistics.values()), [m.reduce for m in metrics.values()], seed)
    return {
        name: Estimate(
            float(metric.reduce(statistics[name])),
            *interval(drawn[:, column]),
            metric.unit,
            metric.higher_is_better,
            len(statistics[name]),
        )
        for column, (name, metric) in enumerate(metrics.items())
    }
