"""Entropy-constrained quantization: codes that an entropy coder makes small, not short ones.

For the smallest .tersor file at equal behaviour: steps by sensitivity, error feedback along the
inputs, trellis-coded quantization and the coder's rate, all in one search. Needs a few hundred
unlabelled inputs and no training; without data steps are equal and errors stay where they are. For
a runtime that computes with short codes use `quantize.rtn`: these have no fixed length.

Source: Fischer, Wang 1992, "Entropy-constrained trellis-coded quantization", IEEE Trans.
Information Theory 38(2); Frantar et al. 2022 (GPTQ), arXiv:2210.17323, eq. 2 and 3, and Tseng et
al. 2025 (YAQA), arXiv:2505.22988, for errors fed along inputs and across outputs; Wiegand, Schwarz
2011, "Source coding: part I", section 4.3, for one Lagrangian over all weights; Sun et al. 2019,
arXiv:1909.01532, section 3.3, for batch norms that follow.
Differs from the papers: each survivor of the trellis feeds its own errors forward. Batch norms are
reduced to a scale and a shift first, and one-dimensional tensors are quantized too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import nn

from tersor.errors import OptionError
from tersor.forms.trellis import TAPS
from tersor.measure.channels import Norms, norms_of
from tersor.methods.effects import Known
from tersor.methods.fitting import fit, missed
from tersor.methods.norms import correct, matched
from tersor.methods.survey import survey
from tersor.recipe import Outcome, method
from tersor.surgery.fold import absorb_statistics
from tersor.surgery.walk import Patterns, Site, vectors, walk
from tersor.task import Task


@method
def entropy(
    model: nn.Module,
    task: Task | None = None,
    *,
    known: Known | None = None,
    bits: Annotated[float, Field(gt=0, le=16)] = 3.0,
    states: int = 8,
    thrift: Annotated[float, Field(ge=0, le=4)] = 0.2,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Stores every weight as a `Trellis` form, in place, at about `bits` bits each once coded.

    known: what `look` found out about this network and task; by default it is found out now
    bits: mean bits per weight of two or more dimensions, as an adaptive coder will need them
    states: of the trellis, 1 (none), 4, 8, 16, 32 or 64: the more, the smaller and the slower to
        find; reading takes the same time for all
    thrift: how much error may be taken on to save a bit; 0 takes the least error
    samples: calibration inputs to use, at most; best are those that leave the network unsure
    include, exclude: patterns on names and types, see `walk`; batch norms are left alone unless
        scale and shift are both included

    The step's outcome holds the estimated bits, those that were asked for where they are more than
    5 % off, the finest and coarsest step, whether batch norms were corrected, and the number of
    weights that gradients say nothing of, if there are such. Raises OptionError for a weight that
    is quantized already, TaskError for a task without inputs.
    """
    if states not in TAPS:
        raise OptionError(f"states={states}; choose one of {list(TAPS)}")
    sites, others = walk(model, include, exclude), vectors(model, include, exclude)
    norms = _norms(model, others)
    absorb_statistics(model, norms.values())
    found = survey(model, task, sites, others, samples, known)
    best = fit(found.weights, bits, states, thrift)
    for weight, codes in zip(found.weights, best.codes, strict=True):
        weight.site.hold(weight.form(codes, best.step * weight.step, states=states))
    corrected = _correct(model, task, found.known, samples, norms)
    for vector in found.vectors:
        vector.site.hold(vector.form(best.step, bits))
    steps = [best.step * weight.step for weight in found.weights]
    blind = {site.name for site in sites} & {*(found.known.blind if found.known else ())}
    outcome = {"bits": best.reached, "finest": min(steps), "coarsest": max(steps)}
    if missed(best.reached, bits):
        outcome["asked"] = bits
    if corrected is not None:
        outcome["corrected"] = corrected
    return model, outcome | ({"without_gradients": len(blind)} if blind else {})


def _norms(model: nn.Module, chosen: Sequence[Site]) -> Norms:
    """Batch norms of which both scale and shift may be changed."""
    free = Counter(id(layer) for site in chosen for layer, _ in site.uses)
    return {name: norm for name, norm in norms_of(model).items() if free[id(norm)] == 2}


def _correct(
    model: nn.Module, task: Task | None, known: Known | None, samples: int, norms: Norms
) -> bool | None:
    """Moves scale and shift of batch norms, if that helps; None where there are none to move."""
    if task is None or known is None or not norms:
        return None
    if known.original is None:  # Without held-out inputs nobody could say whether it helps.
        return False
    batches, held_out = task.calibration(samples), task.holdout(samples)
    kept = correct(model, task, batches, held_out, known.original, matched, norms).kept
    if kept:
        absorb_statistics(model, norms.values())
    return kept


def look(model: nn.Module, task: Task, samples: int = 512) -> Known:
    """What `entropy` finds out about a network before it chooses codes, the same for all `bits`."""
    copied = copy.deepcopy(model)
    sites = walk(copied)
    absorb_statistics(copied)
    known = survey(copied, task, sites, vectors(copied), samples).known
    assert known is not None
    return known
