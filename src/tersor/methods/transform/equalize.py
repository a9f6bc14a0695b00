"""Cross-layer equalization: neighbouring layers share out the ranges of their channels evenly.

A ReLU lets a positive factor pass, so what one layer's channel is divided by, the next layer's
weights are multiplied by, and the network computes the same. For convolutional networks before
weights get one scale per tensor, or before `quantize.static`, where one scale serves all channels
of an activation. Depthwise networks gain most. Nothing to gain for weights with a scale per channel
alone, nor behind ReLU6 or GELU, which let no factor pass; for transformers use `transform.smooth`.

Source: Nagel et al. 2019 (DFQ), arXiv:1906.04721, section 4.1, eq. 8-11.
Differs from the paper: pairs are found in a watched run, not by names; ReLU6 is left as it is
instead of being replaced; factors stay within 1/1000..1000.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.measure.flow import Flow, Value, watch
from tersor.methods.rescaling import (
    Unchanged,
    by_inputs,
    by_outputs,
    is_layer,
    movable,
    multiply_inputs,
    multiply_outputs,
)
from tersor.recipe import Outcome, method
from tersor.surgery.fold import fold
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task

HOMOGENEOUS = frozenset(
    {"relu", "leaky_relu", "max_pool1d_with_indices", "max_pool2d_with_indices"}
    | {"avg_pool1d", "avg_pool2d", "_adaptive_avg_pool2d", "clone", "detach", "alias", "contiguous"}
)
"""Operators that give a multiple where they are given one, channel by channel."""

_MOST = 1000.0
_EVEN = 1e-3
"""Logarithm of a factor that is not worth a change: what is even already stays bit for bit."""
Pair = tuple[nn.Module, nn.Module]


@method
def equalize(
    model: nn.Module,
    task: Task | None = None,
    *,
    rounds: Annotated[int, Field(ge=1)] = 20,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Equalizes the ranges of channels between neighbouring layers, in place; outputs stay.

    rounds: over all pairs, at most; a layer in two pairs needs several until both are even
    include, exclude: patterns on names and types, see `walk`; both layers of a pair must be chosen

    Batch norms are folded into the layers before them first. The step's outcome holds the number of
    pairs and of folded norms, the mean ratio of the largest to the median channel of their weights
    before and after, and the relative change of the outputs. Raises OptionError where there is no
    pair, TaskError without a task.
    """
    if task is None:
        raise TaskError("transform.equalize watches one run of the network; pass a task")
    layers = {layer for site in walk(model, include, exclude) for layer, _ in site.uses}
    unchanged, example = Unchanged(model, task), task.example(2)
    folded = fold(model, example, only=layers).pairs
    flow = watch(model, lambda: task.predict(model, example))
    pairs = find_pairs(flow, movable(model, layers))
    if not pairs:
        raise OptionError(
            f"{type(model).__name__} has no two layers with only a ReLU or pooling between them, "
            "so there is nothing to equalize; leave this step out"
        )
    before = _unevenness(pairs)
    for _ in range(rounds):
        if max(_even_out(pair) for pair in pairs) < _EVEN:
            break
    outcome = {"pairs": len(pairs), "folded": len(folded), "uneven_before": before}
    error = unchanged.check("transform.equalize")
    return model, {**outcome, "uneven_after": _unevenness(pairs), "error": error}


def find_pairs(flow: Flow, layers: set[nn.Module]) -> list[Pair]:
    """Layers of which the second alone reads the first, but for what lets factors pass."""
    pairs = []
    for first in flow.calls:
        if first in layers and is_layer(first) and flow.once(first):
            second = _reader(flow, flow.calls[first][0][1])
            if second in layers and is_layer(second) and _channels_match(first, second):
                pairs.append((first, second))
    return pairs


def _reader(flow: Flow, value: Value | None) -> nn.Module:
    """The module that alone reads a value; the root of nothing where there is none."""
    nobody = nn.Module()
    while value is not None and value.uses:
        last = value.uses[0][1][-1] if value.uses[0][1] else nobody
        alone = all(inside and inside[-1] is last for _, inside, _ in value.uses)
        if alone and is_layer(last):
            return last if flow.calls[last] == [(value, flow.calls[last][0][1])] else nobody
        if len(value.uses) > 1 or value.uses[0][0] not in HOMOGENEOUS or not value.uses[0][2]:
            return nobody
        value = value.uses[0][2][0]
    return nobody


def _channels_match(first: nn.Module, second: nn.Module) -> bool:
    inputs = by_inputs(second)
    return by_outputs(first).shape[0] == inputs.shape[0] * inputs.shape[2]


def _ranges(pair: Pair) -> tuple[Tensor, Tensor]:
    """(channels,) largest |weight| that makes each channel, and that reads it."""
    return by_outputs(pair[0]).abs().amax(1), by_inputs(pair[1]).abs().amax((1, 3)).flatten()


def _even_out(pair: Pair) -> float:
    """Gives both sides of each channel the same range; returns the largest factor's logarithm."""
    made, read = (side.double() for side in _ranges(pair))
    # A channel that nobody makes or reads has no range to share.
    alive = (made > 0) & (read > 0)
    factor = torch.where(alive, (read / made).sqrt(), 1.0).clamp(1 / _MOST, _MOST)
    factor = torch.where(alive, factor, 1.0).to(pair[0].get_parameter("weight").dtype)
    largest = float(factor.log().abs().max())
    if largest >= _EVEN:
        multiply_outputs(pair[0], factor)
        multiply_inputs(pair[1], 1 / factor)
    return largest


def _unevenness(pairs: list[Pair]) -> float:
    """Mean over all layers of pairs of the largest channel's range over the median's."""
    sides = [side for pair in pairs for side in _ranges(pair)]
    return sum(float(side.max() / side.median().clamp(min=1e-30)) for side in sides) / len(sides)
