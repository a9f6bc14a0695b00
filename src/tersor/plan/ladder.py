"""The ladder: a choice for each weight, from a list that was measured on that weight alone.

For files whose codes a runtime computes with: short, of fixed length, and in groups that it knows.
For each weight and each choice there are the bytes it will take in the file, and the loss it
causes; an allocation of both then plans for any number of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.codec import coded_bytes
from tersor.errors import ModelError
from tersor.methods.allocate import allocate
from tersor.plan.choices import Choice, choices_for, form_for, recipe_for
from tersor.plan.route import Plan, Route, Rows
from tersor.plan.study import Loss, Study, probe, samples_for
from tersor.plan.trial import TRIALS, Bench
from tersor.progress import Bar
from tersor.surgery.walk import Site


@dataclass(frozen=True)
class Rungs:
    """The choices of one weight, the first of them to leave it as it is, and what each costs."""

    site: Site
    choices: list[Choice]
    sizes: list[int]
    losses: list[float]

    def options(self) -> list[tuple[int, float]]:
        """(bytes, loss) of every choice, as `allocate` takes them."""
        return list(zip(self.sizes, self.losses, strict=True))


def ladder(bench: Bench) -> Route:
    """Measures every choice for every weight, each from the journal where it was before."""
    rungs = measure(bench.study, bench.bar)
    # Its best choice below the unchanged one: 8-bit codes, usually.
    ample = [min(r.options()[1:] or r.options(), key=lambda option: option[1])[0] for r in rungs]
    return Route(
        propose=partial(_allocated, rungs, _corrects_norms(bench.study)),
        least=sum(min(r.sizes) for r in rungs),
        ample=sum(ample),
        most=sum(r.sizes[0] for r in rungs),
        sensitivity=partial(_rows, rungs),
    )


def measure(found: Study, bar: Bar) -> list[Rungs]:
    """What each choice costs each weight; what makes an output infinite or NaN is left out.

    Raises ModelError where nothing is left. The notes of the study count what was left out.
    """
    offered = [choices_for(site) for site in found.sites]
    tried = sum(len(choices) for choices in offered)
    bar.plan(tried + TRIALS)
    samples = samples_for(found, tried)
    rungs = []
    with ExitStack() as stack:
        # Only a measurement that is really missing pays for the passes of the original model.
        loss = cache(lambda: stack.enter_context(probe(found, samples)))
        for site, choices in zip(found.sites, offered, strict=True):
            bar.doing(f"measuring {site.name}")
            rows = []
            for choice in choices:
                steps = [[step.method, step.options] for step in choice.steps]
                what = {"what": "choice", **found.key, "site": site.name, "samples": samples}
                measured = partial(_measure, site, choice, loss)
                rows.append(found.journal.recall({**what, "steps": steps}, measured))
                bar.advance()
            usable = [at for at, (_, loss_of) in enumerate(rows) if loss_of < float("inf")]
            rungs.append(
                Rungs(
                    site,
                    [choices[at] for at in usable],
                    [int(rows[at][0]) for at in usable],
                    [float(rows[at][1]) for at in usable],
                )
            )
    left = sum(len(r.choices) for r in rungs)
    if tried > left == len(found.sites):
        raise ModelError(
            f"{type(found.model).__name__} gives infinite or NaN outputs whichever weight is "
            "stored another way; check its outputs for the calibration data"
        )
    if tried > left:
        found.notes.append(
            f"{tried - left} of {tried} choices made an output infinite or NaN and were left out."
        )
    return rungs


def _measure(site: Site, choice: Choice, loss: Callable[[], Loss]) -> list[float]:
    form = form_for(site, choice)
    return [coded_bytes(form), max(0.0, loss()(site, form)) if choice.steps else 0.0]


def _allocated(rungs: list[Rungs], corrects_norms: bool, payload: int) -> Plan:
    """The allocation of least loss within `payload` bytes."""
    taken = allocate([r.options() for r in rungs], payload)
    picked = list(zip(rungs, taken, strict=True))
    recipe = recipe_for((r.site, r.choices[t]) for r, t in picked)
    if recipe and corrects_norms:
        recipe.append({"method": "recover.batchnorm", "options": {}})
    return Plan(
        recipe,
        spent=sum(r.sizes[t] for r, t in picked),
        expected=sum(r.losses[t] for r, t in picked),
        labels={r.site.name: r.choices[t].label for r, t in picked},
    )


def _corrects_norms(found: Study) -> bool:
    """Whether there are statistics to correct, and held-out inputs to judge that on."""
    norms = (m for m in found.model.modules() if isinstance(m, _BatchNorm))
    if found.task is None or all(norm.running_mean is None for norm in norms):
        return False
    if not found.task.holdout(1):
        found.notes.append(
            "Batch-norm statistics were not corrected, because the task keeps no inputs apart "
            "to judge that on: give more samples, or holdout=."
        )
        return False
    return True


def _rows(rungs: list[Rungs], _: nn.Module) -> Rows:
    return [
        {"layer": r.site.name, "option": choice.label, "bytes": size, "divergence": loss}
        for r in rungs
        for choice, size, loss in zip(r.choices, r.sizes, r.losses, strict=True)
    ]
