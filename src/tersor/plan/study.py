"""The study of a model: everything that is measured before anything is decided.

For each weight and each choice: the bytes it will take in the file, and the loss it causes, which
is the mean divergence of the outputs from the original's on calibration data. Without data the loss
is the relative squared error of the weight, which knows nothing of what the network does with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.codec import coded_bytes
from tersor.errors import ModelError
from tersor.forms.form import Form
from tersor.measure import batch_of, evaluating, macs, probing, safetensors_bytes
from tersor.plan.choices import Choice, choices_for, form_for
from tersor.plan.journal import Journal, model_hash
from tersor.plan.progress import Bar
from tersor.surgery.walk import Site, walk
from tersor.task import Task

Loss = Callable[[Site, Form], float]

# Multiply-accumulates that the measurement of all choices may take, a minute or two on two cores.
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

    choices: for each weight; those that break the network are dropped when they are measured
    sizes, losses: for each weight, one entry a choice
    corrects_norms: whether there are statistics to correct, and held-out inputs to judge that on
    size_before: bytes of the model's safetensors file
    before: metric -> value of the original
    """

    model: nn.Module
    task: Task | None
    example: Any
    journal: Journal
    fingerprint: str
    sites: list[Site]
    choices: list[list[Choice]]
    size_before: int
    macs_per_sample: int = 0
    sizes: list[list[int]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    corrects_norms: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """What every measurement of this study depends on."""
        return {"model": self.fingerprint, "task": self.task.fingerprint() if self.task else None}

    def options(self) -> list[list[tuple[int, float]]]:
        """(bytes, loss) of every choice, as `allocate` takes them."""
        return [
            list(zip(sizes, losses, strict=True))
            for sizes, losses in zip(self.sizes, self.losses, strict=True)
        ]


def study(model: nn.Module, task: Task | None, example: Any, journal: Journal) -> Study:
    """Looks at the model, measuring no choice yet. Raises ModelError for an unusable one."""
    sites = walk(model)
    found = Study(
        model,
        task,
        example,
        journal,
        model_hash(model),
        sites,
        [choices_for(s) for s in sites],
        safetensors_bytes(model),
    )
    norms = any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())
    if task is None:
        found.notes.append(
            "No data was given: the choices were weighed by the error of the weights alone, "
            "nothing about the model's answers was measured, and batch-norm statistics were not "
            "corrected. Give data to have the bytes spent where the answers need them and the "
            "result proven."
        )
    else:
        found.corrects_norms = norms and bool(task.holdout(1))
        if norms and not found.corrects_norms:
            found.notes.append(
                "Batch-norm statistics were not corrected, because the task keeps no inputs apart "
                "to judge that on: give more samples, or holdout=."
            )
    if example is not None:
        found.macs_per_sample = journal.recall(
            {"what": "macs per sample", **found.key},
            lambda: macs(model, example).total // batch_of(example),
        )
    return found


def measure_choices(found: Study, bar: Bar) -> None:
    """Fills `sizes` and `losses`, each from the journal where it was measured before.

    A choice that makes an output infinite or NaN is dropped, which the notes count.
    """
    tried = sum(len(choices) for choices in found.choices)
    samples = _samples(found)
    with ExitStack() as stack:
        # Only a measurement that is really missing pays for the passes of the original model.
        probe = cache(lambda: stack.enter_context(_probe(found, samples)))
        for place, (site, choices) in enumerate(zip(found.sites, found.choices, strict=True)):
            bar.doing(f"measuring {site.name}")
            rows = []
            for choice in choices:
                steps = [[step.method, step.options] for step in choice.steps]
                what = {"what": "choice", **found.key, "site": site.name, "samples": samples}
                measure = partial(_measure, site, choice, probe)
                rows.append(found.journal.recall({**what, "steps": steps}, measure))
                bar.advance()
            usable = [at for at, (_, loss) in enumerate(rows) if loss < float("inf")]
            found.choices[place] = [choices[at] for at in usable]
            found.sizes.append([int(rows[at][0]) for at in usable])
            found.losses.append([float(rows[at][1]) for at in usable])
    left = sum(len(choices) for choices in found.choices)
    if tried > left == len(found.sites):
        raise ModelError(
            f"{type(found.model).__name__} gives infinite or NaN outputs whichever weight is "
            "stored another way; check its outputs for the calibration data"
        )
    if tried > left:
        found.notes.append(
            f"{tried - left} of {tried} choices made an output infinite or NaN and were left out."
        )


def _measure(site: Site, choice: Choice, probe: Callable[[], Loss]) -> list[float]:
    form = form_for(site, choice)
    size = coded_bytes(form)
    loss = probe()(site, form) if choice.steps else 0.0
    return [size, max(0.0, loss)]


def _probe(found: Study, samples: int) -> AbstractContextManager[Loss]:
    if found.task is None:
        return nullcontext(_relative_error)
    return probing(found.model, found.task, found.task.calibration(samples))


def _relative_error(site: Site, form: Form) -> float:
    weight = site.weight.double()
    return float(
        (form.dense().double() - weight).square().sum() / weight.square().sum().clamp(min=1e-300)
    )


def _samples(found: Study) -> int:
    """Calibration samples for measuring choices: as many as the work and the memory allow."""
    if found.task is None:
        return 0
    batch = found.task.example()
    with evaluating(found.model):
        outputs = found.task.predict(found.model, batch)
        rows, kept = len(outputs) / batch_of(batch), outputs.numel() / batch_of(batch)
    runs = max(1, sum(len(choices) for choices in found.choices))
    affordable = _WORK / (max(1, found.macs_per_sample) * runs)
    most = min(_MOST, _KEPT / max(1, kept), _DECISIONS / max(1, rows))
    return int(max(1, min(most, max(_FEWEST, affordable))))
