"""The study of a model: what is known of it before anything is decided, and how to ask for more.

The loss that a stored weight causes is the mean divergence of the outputs from the original's on
calibration data. Without data it is the relative squared error of the weight, which knows nothing
of what the network does with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tersor.forms.form import Form
from tersor.measure import (
    batch_of,
    divergence_of,
    evaluating,
    macs,
    probing,
    reference_outputs,
    safetensors_bytes,
)
from tersor.plan.journal import Journal, example_hash, model_hash
from tersor.surgery.walk import Site, walk
from tersor.task import Task

Loss = Callable[[Site, Form], float]

# Multiply-accumulates that a series of measurements may take, a minute or two on two cores.
# Fixed, not timed, so that two runs measure on the same samples and write the same file.
_WORK = 2e12
_FEWEST, _MOST = 32, 256
# Elements of the original's outputs that are kept for comparison (a language model has many each).
_KEPT = 64 * 2**20
# Decisions that settle a mean: one sample of a language model makes hundreds of them.
_DECISIONS = 4096


@dataclass
class Study:
    """What is known of a model.

    size_before: bytes of the model's safetensors file
    before: metric -> value of the original
    notes: what the report must say
    """

    model: nn.Module
    task: Task | None
    example: Any
    journal: Journal
    fingerprint: str
    sites: list[Site]
    size_before: int
    macs_per_sample: int = 0
    before: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def key(self) -> dict[str, Any]:
        """What every measurement of this study depends on."""
        task = self.task.fingerprint() if self.task else None
        return {"model": self.fingerprint, "task": task, "example": example_hash(self.example)}


def study(model: nn.Module, task: Task | None, example: Any, journal: Journal) -> Study:
    """Looks at the model. Raises ModelError for an unusable one."""
    sites, hashed = walk(model), model_hash(model)
    found = Study(model, task, example, journal, hashed, sites, safetensors_bytes(model))
    if task is None:
        found.notes.append(
            "No data was given: bytes were spent by the error of the weights alone, and nothing "
            "about the model's answers was measured. Give data to have the bytes spent where the "
            "answers need them and the result proven."
        )
    if example is not None:
        found.macs_per_sample = journal.recall(
            {"what": "macs per sample", **found.key},
            lambda: macs(model, example).total // batch_of(example),
        )
    return found


def probe(found: Study, samples: int) -> AbstractContextManager[Loss]:
    """Yields the loss that a form causes when it alone holds a weight."""
    if found.task is None:
        return nullcontext(_relative_error)
    return probing(found.model, found.task, found.task.calibration(samples))


def samples_for(found: Study, runs: int) -> int:
    """Samples for measuring `runs` times: as many as the work and the memory allow."""
    if found.task is None:
        return 0
    batch = found.task.example()
    with evaluating(found.model):
        outputs = found.task.predict(found.model, batch)
        rows, kept = len(outputs) / batch_of(batch), outputs.numel() / batch_of(batch)
    affordable = _WORK / (max(1, found.macs_per_sample) * max(1, runs))
    most = min(_MOST, _KEPT / max(1, kept), _DECISIONS / max(1, rows))
    return int(max(1, min(most, max(_FEWEST, affordable))))


def divergence(found: Study, compressed: nn.Module) -> float | None:
    """Mean divergence on held-out inputs, infinite for outputs that are not finite.

    None where the task has no such inputs.
    """
    inputs = found.task.holdout(samples_for(found, 1)) if found.task else []
    if found.task is None or not inputs:
        return None
    wanted = reference_outputs(found.model, found.task, inputs)
    return divergence_of(compressed, found.task, inputs, wanted)


def _relative_error(site: Site, form: Form) -> float:
    weight = site.weight.double()
    return float(
        (form.dense().double() - weight).square().sum() / weight.square().sum().clamp(min=1e-300)
    )
