"""Rules of what multiplies with weights, and of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor.surgery.coupling.elements import combined
from tersor.surgery.coupling.labels import Labelled, along
from tersor.surgery.coupling.rules import Rule, keep_all, labelled, matched, single
from tersor.surgery.coupling.units import Ids, Units


def _linear(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, weight, bias = (*args, None)[:3]
    last = len(x.shape) - 1
    x, inputs = along(units, x, last)
    weight, own = along(units, weight, 1)
    matched(units, inputs, own, "its inputs are those of the network")
    outputs = single(units, weight, 0)
    if bias is not None:
        matched(units, outputs, single(units, bias, 0), "its bias is computed")
    return labelled(x.without(last), shape, last, outputs)


def _conv(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, weight, bias = (*args, None)[:3]
    groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    return _convolved(units, (x, weight, bias), groups, shape, (0, 1))


def _transposed(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, weight, bias = (*args, None)[:3]
    groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    return _convolved(units, (x, weight, bias), groups, shape, (1, 0))


def _convolved(
    units: Units, operands: Any, groups: int, shape: Sequence[int], axes: tuple[int, int]
) -> Labelled:
    """axes: of the weight's outputs and inputs"""
    x, weight, bias = operands
    channels = len(x.shape) - (len(weight.shape) - 1)
    x, given = along(units, x, channels)
    for dim in range(channels + 1, len(x.shape)):
        x, along_it = along(units, x, dim)
        if along_it is not None:
            units.keep(along_it, "a convolution goes over it")
        x = x.without(dim)
    for dim in range(2, len(weight.shape)):
        kernel = single(units, weight, dim)
        if kernel is not None:
            units.keep(kernel, "it is the size of a kernel")
    outputs, inputs = (single(units, weight, axis) for axis in axes)
    if groups == 1:
        matched(units, given, inputs, "its inputs are those of the network")
    else:
        outputs = _grouped(units, given, inputs, outputs, groups, axes)
    if bias is not None:
        matched(units, outputs, single(units, bias, 0), "its bias is computed")
    return labelled(x.without(channels), shape, channels, outputs)


def _grouped(
    units: Units,
    given: Ids | None,
    inputs: Ids | None,
    outputs: Ids | None,
    groups: int,
    axes: tuple[int, int],
) -> Ids | None:
    """The channels of a group of a convolution go together, so that groups stay alike.

    Of the weight, one dimension counts all groups' channels and the other those of one group.
    """
    whole, part = (outputs, inputs) if axes[0] == 0 else (inputs, outputs)
    if part is not None:
        units.keep(part, "it is the width of a group of a convolution")
    sides = [side.reshape(groups, -1) for side in (whole, given) if side is not None]
    for side in sides:
        units.together(side, 1)
    if len(sides) == 2:
        units.unite(sides[0][:, 0], sides[1][:, 0])
    elif whole is not None:
        units.keep(whole, "its inputs are those of the network")
    if axes[0] == 0 or whole is None:
        return outputs
    # A transposed convolution's outputs: those of a group, once for each.
    return np.repeat(whole.reshape(groups, -1)[:, 0], 1 if part is None else len(part))


def _embedding(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    weight, indices = args[0], args[1]
    rows = single(units, weight, 0)
    if rows is not None:
        units.keep(rows, "its rows are looked up by number")
    return labelled(
        Labelled(indices.shape, indices.blocks), shape, len(shape) - 1, single(units, weight, 1)
    )


def _matmul(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    first, second = args[:2]
    if len(first.shape) == 1 or len(second.shape) == 1:
        keep_all(units, [first, second], "a product with a vector")
        return Labelled(tuple(shape))
    rows, columns = len(first.shape) - 2, len(second.shape) - 2
    first, left = along(units, first, rows + 1)
    second, right = along(units, second, columns)
    matched(units, left, right, "it is multiplied with something of fixed size")
    first, above = along(units, first, rows)
    second, beside = along(units, second, columns + 1)
    batch = [first.without(rows, rows + 1), second.without(columns, columns + 1)]
    found = combined(units, batch, shape, ignore=2)
    rank = len(shape)
    return labelled(labelled(found, shape, rank - 2, above), shape, rank - 1, beside)


def _addmm(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    return combined(units, [args[0], _matmul(units, args[1:3], {}, shape)], shape)


def _attention(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    query, key, value = args[:3]
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    for tensor in (query, key):
        width = single(units, tensor, -1)
        if width is not None:
            units.keep(width, "it is the width of an attention's heads")
    found = Labelled(tuple(shape))
    if len(shape) > 2:
        asked = _heads(units, (query, key, value), mask)
        found = labelled(found, shape, len(shape) - 3, asked)
    if isinstance(mask, Labelled):
        keep_all(units, mask.without(len(mask.shape) - 3), "it masks an attention")
    return labelled(found, shape, len(shape) - 1, single(units, value, -1))


def _heads(units: Units, tensors: Sequence[Labelled], mask: Any) -> Ids | None:
    """Units of the heads that ask; keys and values may have fewer, each for several of them."""
    asked, *others = (single(units, tensor, -3) for tensor in tensors)
    for ids in others:
        if asked is not None and ids is not None and len(asked) != len(ids):
            ids = np.repeat(ids, len(asked) // len(ids))
        matched(units, asked, ids, "its heads meet others of a fixed number")
    if isinstance(mask, Labelled) and len(mask.shape) > 2 and mask.shape[-3] > 1:
        matched(units, asked, single(units, mask, -3), "its heads have masks of their own")
    return asked


def _recurrent(units: Units, args: Sequence[Any], kwargs: Any, shape: Any) -> list[Labelled]:
    x, states, weights, layers, both = args[0], args[1], args[2], args[4], args[7]
    states = states if isinstance(states, list | tuple) else [states]
    keep_all(units, states, "it is a state that is given from outside")
    sides = 2 if both else 1
    each = len(weights) // (layers * sides)
    if each not in (2, 4) or weights[1].shape[1] == 1:
        keep_all(units, [x, *weights], "it has projections, or one unit")
        return [Labelled(tuple(size)) for size in shape]
    given, hidden = single(units, x, -1), []
    for layer in range(layers):
        starts = [(layer * sides + side) * each for side in range(sides)]
        hidden += [_cell(units, given, weights[start : start + each]) for start in starts]
        given = np.concatenate(hidden[-sides:])
    # One number of hidden units for all layers and directions.
    for other in hidden[1:]:
        units.unite(hidden[0], other)
    found = [labelled(Labelled(tuple(shape[0])), shape[0], len(shape[0]) - 1, given)]
    return found + [
        labelled(Labelled(tuple(size)), size, len(size) - 1, hidden[0]) for size in shape[1:]
    ]


def _cell(units: Units, given: Ids | None, weights: Sequence[Labelled]) -> Ids:
    """What one direction of one layer gives: a unit for each hidden number, in all its gates."""
    hidden = single(units, weights[1], 1)
    assert hidden is not None
    matched(units, given, single(units, weights[0], 1), "its inputs are those of the network")
    for weight in weights:
        gates = single(units, weight, 0)
        if gates is not None:
            units.unite(gates.reshape(-1, len(hidden)), hidden[None])
    return hidden


RULES: dict[str, Rule] = {
    "linear": _linear,
    "embedding": _embedding,
    "addmm": _addmm,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot"), _matmul),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}
