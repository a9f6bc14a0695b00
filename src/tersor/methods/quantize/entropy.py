"""Entropy-constrained quantization: codes that an entropy coder makes small, not short ones.

For the smallest .tersor file at equal behaviour: steps by sensitivity, error feedback along the
inputs, trellis-coded quantization and the coder's rate, all in one search. Needs a few hundred
unlabelled inputs and no training; without data steps are equal and errors stay where they are. For
a runtime that computes with short codes use `quantize.rtn`: these have no fixed length.

Source: Fischer, Wang 1992, "Entropy-constrained trellis-coded quantization", IEEE Trans.
Information Theory 38(2); Frantar et al. 2022 (GPTQ), arXiv:2210.17323, eq. 2 and 3, and Tseng et
al. 2025 (YAQA), arXiv:2505.22988, for errors fed along inputs and across outputs; Wiegand, Schwarz
2011, "Source coding: part I", section 4.3, for one Lagrangian over all weights.
Differs from the papers: each survivor of the trellis feeds its own errors forward. Batch norms are
reduced to a scale and a shift first, and one-dimensional tensors are quantized too.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import nn

from tersor.errors import OptionError
from tersor.forms.trellis import TAPS
from tersor.methods import rates
from tersor.methods.effects import Known
from tersor.methods.survey import Weight, survey
from tersor.recipe import Outcome, method
from tersor.surgery.fold import absorb_statistics
from tersor.surgery.walk import Patterns, vectors, walk
from tersor.task import Task

Array = np.ndarray[Any, np.dtype[Any]]

_PASSES, _NEAR = 4, 0.005
_SAMPLE = 2**21
"""Weights from which a first step is estimated."""


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
    samples: calibration inputs to use, at most; a network that answers new inputs less surely than
        those it was trained on needs a few thousand
    include, exclude: patterns on names and types, see `walk`

    The step's outcome holds the estimated bits, the finest and coarsest step, and the number of
    weights that gradients say nothing of, if there are such. Raises OptionError for a weight that
    is quantized already, TaskError for a task without inputs.
    """
    if states not in TAPS:
        raise OptionError(f"states={states}; choose one of {list(TAPS)}")
    sites = walk(model, include, exclude)
    absorb_statistics(model)
    found = survey(model, task, sites, vectors(model, include, exclude), samples, known)
    step, reached, codes = _fitted(found.weights, bits, states, thrift)
    for weight, chosen in zip(found.weights, codes, strict=True):
        weight.site.hold(weight.form(chosen, step * weight.step, states=states))
    for vector in found.vectors:
        vector.site.hold(vector.form(step, bits))
    steps = [step * weight.step for weight in found.weights]
    blind = {site.name for site in sites} & {*(found.known.blind if found.known else ())}
    outcome = {"bits": reached, "finest": min(steps), "coarsest": max(steps)}
    return model, outcome | ({"without_gradients": len(blind)} if blind else {})


def look(model: nn.Module, task: Task, samples: int = 512) -> Known:
    """What `entropy` finds out about a network before it chooses codes, the same for all `bits`."""
    copied = copy.deepcopy(model)
    sites = walk(copied)
    absorb_statistics(copied)
    known = survey(copied, task, sites, vectors(copied), samples).known
    assert known is not None
    return known


def _fitted(
    weights: list[Weight], bits: float, states: int, thrift: float
) -> tuple[float, float, list[Array]]:
    """The step that takes about `bits` bits a weight, the bits, and the codes."""
    step, tables = _first_guess(weights, bits, states)
    rate = thrift * (1 / 12 if states == 1 else 1 / 4)
    size = sum(weight.matrix.size for weight in weights)
    best: tuple[float, float, list[Array]] | None = None
    for _ in range(_PASSES):
        found = [
            weight.codes(step * weight.step, states=states, bits=tables, rate=rate)
            for weight in weights
        ]
        counts = rates.count(found, states)
        reached = rates.estimate(found, counts) / size
        if best is None or abs(reached - bits) < abs(best[1] - bits):
            best = step, reached, [codes for codes, _ in found]
        if abs(reached - bits) <= _NEAR * bits:
            break
        tables = rates.bits_of(counts)
        # A bit more halves the step where codes are large; where most are 0 it takes more.
        step *= 2 ** ((reached - bits) * max(1.0, 1.5 / max(bits, 0.5)))
    assert best is not None
    return best


def _first_guess(weights: list[Weight], bits: float, states: int) -> tuple[float, Array]:
    """A step at which rounding alone takes `bits`, by bisection, and the bits of its codes."""
    every = max(1, sum(weight.matrix.size for weight in weights) // _SAMPLE)
    samples = [(weight.matrix[::every], weight.step) for weight in weights]
    spacing = 1 if states == 1 else 2
    size = sum(matrix.size for matrix, _ in samples)
    largest = max(float(np.abs(matrix).max()) / step for matrix, step in samples)
    low, high = np.log(max(largest, 1e-30)) - 16, np.log(max(largest, 1e-30))
    counts = np.zeros((2 * rates.CLASSES, rates.MAGNITUDES))
    for _ in range(12):
        middle = (low + high) / 2
        found = []
        for matrix, step in samples:
            levels = matrix / np.float32(step * np.exp(middle))
            found.append(
                (np.rint(levels / spacing).astype(np.int32), rates.classes_of(levels, states))
            )
        counts = rates.count(found, 1)
        low, high = (middle, high) if rates.estimate(found, counts) > bits * size else (low, middle)
    counts[1::2] = counts[::2]
    return float(np.exp(high)), rates.bits_of(counts)
