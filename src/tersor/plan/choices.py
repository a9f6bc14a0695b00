"""Choices: what could be done to one weight, and the form that each would leave.

A choice is a short list of steps (methods with options), applied to that weight alone. Every
technique in the table that needs no data can appear in one, so a new technique needs a line in
`LADDER` and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.errors import BudgetError
from tersor.forms import Dense
from tersor.forms.form import Form
from tersor.methods.table import TABLE
from tersor.recipe import Step
from tersor.surgery.hold import form_of
from tersor.surgery.walk import Site


@dataclass(frozen=True)
class Choice:
    """Steps to take on one weight; none of them leaves it as it is."""

    label: str
    steps: tuple[Step, ...] = ()


def _rtn(bits: int, group_size: int | None = None) -> Choice:
    label = f"int{bits}" + (f" group {group_size}" if group_size else "")
    return Choice(label, (Step("quantize.rtn", {"bits": bits, "group_size": group_size}),))


KEEP = Choice("unchanged")
LADDER = (
    KEEP,
    *(_rtn(bits) for bits in (8, 7, 6, 5, 4, 3, 2)),
    *(_rtn(bits, 64) for bits in (4, 3, 2)),
    Choice("16 shared values", (Step("share.kmeans", {"values": 16, "samples": 0}),)),
    Choice(
        "half pruned, int5",
        (
            Step("prune.magnitude", {"sparsity": 0.5, "scope": "layer"}),
            Step("quantize.rtn", {"bits": 5}),
        ),
    ),
)
# Below this a weight costs less than the search for its best form.
SMALL = 512


def choices_for(site: Site) -> list[Choice]:
    """The ladder's choices that make sense for this weight."""
    numel = site.weight.numel()
    inputs = numel // max(1, site.weight.shape[site.axis])
    if numel < SMALL:
        return [KEEP, _rtn(8)]
    return [
        choice
        for choice in LADDER
        if all((step.options.get("group_size") or 0) < inputs for step in choice.steps)
    ]


def form_for(site: Site, choice: Choice) -> Form:
    """The form that `choice` gives the weight of `site`; the model is not touched."""
    weight = site.weight
    if not choice.steps:
        return Dense(weight, weight.dtype)
    alone = _Alone(site.kind, weight)
    for step in choice.steps:
        TABLE[step.method](alone, **step.options)
    form = form_of(alone, "weight")
    if form is None:
        raise BudgetError(
            f"{choice.label} left the weight {site.name!r} of shape {tuple(weight.shape)} as it was"
        )
    return form


def recipe_for(taken: Iterable[tuple[Site, Choice]]) -> list[dict[str, Any]]:
    """One recipe for all: equal steps joined, each naming its weights, earlier steps first."""
    grouped: dict[tuple[int, str], dict[str, Any]] = {}
    for site, choice in taken:
        for place, step in enumerate(choice.steps, -len(choice.steps)):
            key = (place, repr((step.method, sorted(step.options.items(), key=str))))
            entry = grouped.setdefault(
                key, {"method": step.method, "options": {**step.options, "include": []}}
            )
            entry["options"]["include"].append(site.name)
    return [grouped[key] for key in sorted(grouped, key=lambda k: (k[0], k[1]))]


class _Alone(nn.Module):
    """One weight by itself, in a layer of its original kind."""

    def __init__(self, kind: str, weight: Any) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(weight, requires_grad=False)
