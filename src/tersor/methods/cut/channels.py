"""Cutting channels: units of all layers that matter least are removed, and weights get smaller.

A unit is whatever can only go as a whole: a channel with its batch norm, a neuron, an attention
head with its share of keys. The network really computes less, in any runtime. What removed units
gave is merged into those that stay, from a few hundred unlabelled inputs; at half the work a small
network still needs `distill.logits` after it. For bytes alone quantizing costs less; for a network
that is wide because it is deep, compare `cut.depth`.

Source: Fang et al. 2023 (DepGraph), arXiv:2301.12900, for groups; He, Zhang, Sun 2017,
arXiv:1707.06168, for fitting what is left; criteria and ranking as in their modules.
Differs from the papers: units come from operators and not from layers; harm is measured by running
the network without a quarter, a half and three quarters of each group, and compared by what is
saved; batch norms follow at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import BudgetError, OptionError, TaskError
from tersor.measure import reference_outputs
from tersor.measure.channels import channels as seen_by_norms
from tersor.measure.channels import norms_of
from tersor.methods.clock import Of
from tersor.methods.cut import merging
from tersor.methods.cut.criteria import CRITERIA
from tersor.methods.cut.evidence import Evidence
from tersor.methods.cut.prices import prices
from tersor.methods.cut.ranking import chosen
from tersor.methods.cut.removing import Costs, Removable, removable
from tersor.methods.norms import Original, correct, shifted
from tersor.recipe import Outcome, method
from tersor.surgery.cut import cut
from tersor.surgery.hold import bake, held
from tersor.surgery.proving import cuttable
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task

_SAMPLES = 512
_LANES = 8
"""Units that kernels take at a time: where milliseconds count, fewer save nothing."""

Criterion = Literal[
    "reconstruction",
    "fisher",
    "taylor",
    "l1",
    "l2",
    "group_norm",
    "geometric_median",
    "activation",
    "apoz",
    "similarity",
    "random",
]


@method
def channels(
    model: nn.Module,
    task: Task | None = None,
    *,
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.7,
    of: Of = "macs",
    criterion: Criterion = "reconstruction",
    merge: bool = True,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Removes units until the network costs `keep` times what it did, in place.

    keep: share that remains, above 0 and below 1
    of: "macs", "bytes", or "latency" as measured here layer by layer
    criterion: what makes a unit dispensable, see `cut.criteria`; only "taylor" needs labels
    merge: whether weights are fitted to the units that stay, and batch norms follow
    generator: of "random" and "fisher"
    include: patterns, see `walk`; groups of units that these weights write
    exclude: patterns; groups that none of these weights write or read

    The outcome holds what was and is spent, how many units of each group stayed, and why others
    were left. Raises TaskError without inputs, ModelError for a network that cannot be traced,
    OptionError where nothing can be cut, BudgetError where that is not enough.
    """
    if task is None:
        raise TaskError("cut.channels needs inputs to run the network on; pass a task")
    for path, form in held(model):
        raise OptionError(
            f'"{path}" of shape {form.shape} is held as {form.kind}, whose size is fixed; cut '
            "first, then prune and quantize"
        )
    for site in walk(model):
        for layer, attribute in site.uses:
            bake(layer, attribute)
    inputs = task.example(2)
    coupling = cuttable(model, inputs)
    groups, left = removable(model, coupling, include, exclude)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    costs = Costs.of(coupling, shapes, prices(model, inputs, of))
    before = costs.total
    draws = generator or torch.Generator().manual_seed(0)
    evidence = Evidence(model, task, groups, samples=_SAMPLES, generator=draws)
    rankings = [CRITERIA[criterion](group, evidence) for group in groups]
    steps = [_LANES if of == "latency" and len(group) >= 4 * _LANES else 1 for group in groups]
    by_saving = criterion in ("reconstruction", "fisher", "taylor")
    try:
        gone = chosen(groups, rankings, costs, keep * before, steps=steps, by_saving=by_saving)
    except BudgetError:
        raise BudgetError(
            f"keep={keep}: at most {1 - costs.total / before:.0%} of the {of} can be cut, with one "
            f"unit in 16 of each of the {len(groups)} groups left; keep more, or exclude less"
        ) from None
    if merge:
        unseen = _merged(model, task, _columns(groups, gone))
        left |= dict.fromkeys(unseen, "its inputs were not seen, so nothing was merged into it")
    removed = [
        group.group.units[unit] for group, few in zip(groups, gone, strict=True) for unit in few
    ]
    cut(model, inputs, coupling, removed)
    return model, {
        "before": before,
        "after": costs.total,
        "kept": {
            group.name: f"{len(group) - len(few)} of {len(group)}"
            for group, few in zip(groups, gone, strict=True)
        },
        "left": left,
    }


def _merged(model: nn.Module, task: Task, columns: Mapping[str, Tensor]) -> set[str]:
    """Fits weights to the inputs that stay, and batch norms to what they see then."""
    batches, norms = task.calibration(_SAMPLES), norms_of(model)
    held_out = task.holdout(_SAMPLES) or batches
    original = Original(
        seen_by_norms(model, task, batches), reference_outputs(model, task, held_out)
    )
    unseen = merging.merge(model, task, columns, samples=_SAMPLES)
    if norms:
        correct(model, task, batches, held_out, original, shifted, norms)
    return unseen


def _columns(groups: Sequence[Removable], gone: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Of each weight that reads removed units, which of its inputs stay."""
    found: dict[str, Tensor] = {}
    for group, few in zip(groups, gone, strict=True):
        for end in group.readers if few else ():
            site = end.site
            inputs = site.weight.numel() // site.weight.shape[site.axis]
            kept = found.setdefault(site.name, torch.ones(inputs, dtype=torch.bool))
            kept[end.lines[list(few)].flatten()] = False
    return found
