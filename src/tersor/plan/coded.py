"""The coded route: one number, bits per weight, for the smallest file at equal behaviour.

`quantize.entropy` shares the bits out by itself, so nothing is measured beforehand but what inputs
and gradients tell of the network, once for all rates.
"""

from __future__ import annotations

from functools import partial
from math import ceil

from torch import nn

from tersor.codec import coded_bytes
from tersor.methods.effects import Known
from tersor.methods.quantize.entropy import look
from tersor.plan.route import Plan, Route, Rows
from tersor.plan.study import probe, samples_for
from tersor.plan.trial import TRIALS, Bench
from tersor.surgery.walk import walk

# Bits per weight. Below the least no network says anything, and the method ends at the most.
_LEAST, _AMPLE, _MOST = 0.1, 8.0, 16.0
# Sensitivity is for the report alone: a quarter of what a search by it would take.
_THRIFT = 4


def coded(bench: Bench) -> Route:
    """Looks at the network once. Bits have four digits, so that a recipe can be read."""
    found = bench.study
    weights = sum(site.weight.numel() for site in found.sites)
    unchanged = sum(site.weight.numel() * site.weight.element_size() for site in found.sites)
    bench.bar.plan(1 + TRIALS)
    if found.task is not None:
        bench.bar.doing("looking at inputs and gradients")
        bench.known = look(found.model, found.task)
        found.notes += _notes(bench.known)
    bench.bar.advance()

    def propose(payload: int) -> Plan:
        if payload >= unchanged:
            return Plan([], unchanged)
        bits = float(f"{min(max(8 * payload / weights, _LEAST), _MOST):.4g}")
        recipe = [{"method": "quantize.entropy", "options": {"bits": bits}}]
        return Plan(recipe, round(bits * weights / 8))

    return Route(
        propose,
        least=ceil(_LEAST * weights / 8),
        ample=min(ceil(_AMPLE * weights / 8), unchanged),
        most=unchanged,
        sensitivity=partial(_sensitivity, bench),
    )


def _notes(known: Known) -> list[str]:
    if known.reason:
        return [
            f"Steps were chosen by what each layer gives, because {known.reason}; what the answers "
            "need of each layer is not known, so the file may be larger than it could be."
        ]
    if known.blind:
        named = ", ".join(known.blind[:3]) + (", ..." if len(known.blind) > 3 else "")
        return [
            f"Gradients do not reach {len(known.blind)} of {len(known.effects)} weights ({named}); "
            "their steps were chosen by what these layers give."
        ]
    return []


def _sensitivity(bench: Bench, compressed: nn.Module) -> Rows:
    """What each weight costs as it is stored now, and how far it alone moves the outputs."""
    found = bench.study
    forms = {site.name: site.form for site in walk(compressed)}
    stored = [(site, form) for site in found.sites if (form := forms.get(site.name)) is not None]
    samples = samples_for(found, _THRIFT * len(found.sites))
    rows = []
    with probe(found, samples) as loss:
        for site, form in stored:
            bench.bar.doing(f"measuring {site.name}")
            row = {"layer": site.name, "option": "as stored", "bytes": coded_bytes(form)}
            rows.append({**row, "divergence": max(0.0, loss(site, form))})
    return rows
