"""Rules of what works element by element, of norms and of sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tersor.surgery.coupling.labels import Block, Labelled, along
from tersor.surgery.coupling.rules import Rule, matched, single
from tersor.surgery.coupling.units import Units

_NORMALIZED = "it normalizes what cannot be cut"


def combined(
    units: Units, operands: Sequence[Labelled], shape: Sequence[int], ignore: int = 0
) -> Labelled:
    """Operands that are broadcast against each other, their labels united place by place.

    ignore: of the last dimensions so many are not looked at
    """
    rank = len(shape)
    shaped = [operand for operand in operands if operand.shape]
    sizes = [(*[1] * (rank - len(o.shape)), *o.shape) for o in shaped]
    alike = _same_blocks(units, [lifted(o, shape) for o in shaped], sizes)
    blocks: dict[tuple[int, ...], Block] = {}
    for operand in alike:
        for block in operand.blocks:
            known = blocks.setdefault(block.dims, block)
            if known is not block:
                units.unite(known.ids, block.ids)
    for dims, block in blocks.items():
        for operand, size in zip(alike, sizes, strict=True):
            fixed = any(size[d] > 1 for d in dims if d < rank - ignore)
            if fixed and all(b.dims != dims for b in operand.blocks):
                units.keep(block.ids, "it meets something of fixed size")
    return Labelled(tuple(shape), tuple(blocks.values()))


def lifted(tensor: Labelled, shape: Sequence[int]) -> Labelled:
    """With the result's dimensions; those of size 1 that are stretched have no labels."""
    ahead = len(shape) - len(tensor.shape)
    stretched = [d for d, size in enumerate(tensor.shape) if size == 1 and shape[d + ahead] != 1]
    places = {d: d + ahead for d in range(len(tensor.shape))}
    return tensor.without(*stretched).moved(shape, places)


def _same_blocks(
    units: Units, operands: list[Labelled], sizes: Sequence[Sequence[int]]
) -> list[Labelled]:
    """Labels of single dimensions instead of several together, where other operands force them.

    They do where blocks of different dimensions overlap, and where one of the dimensions meets an
    unlabelled one of the same size, which would otherwise hold all of them.
    """
    while True:
        every = {b.dims for operand in operands for b in operand.blocks}
        wide = next((dims for dims in every if _is_forced(dims, every, operands, sizes)), None)
        if wide is None:
            return operands
        operands = [
            along(units, o, wide[0])[0] if any(b.dims == wide for b in o.blocks) else o
            for o in operands
        ]


def _is_forced(
    dims: tuple[int, ...],
    every: set[tuple[int, ...]],
    operands: list[Labelled],
    sizes: Sequence[Sequence[int]],
) -> bool:
    if len(dims) == 1:
        return False
    if any(other != dims and {*other} & {*dims} for other in every):
        return True
    return any(
        size[d] > 1 and operand.at(d) is None
        for operand, size in zip(operands, sizes, strict=True)
        for d in dims
    )


def _elementwise(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    return combined(units, [a for a in args if isinstance(a, Labelled)], shape)


def _same(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    return Labelled(tuple(shape), args[0].blocks)


def _prelu(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, weight = args[:2]
    if weight.shape[0] > 1:
        x, ids = along(units, x, 1)
        matched(units, ids, single(units, weight, 0), "it has a slope for each channel")
    return Labelled(tuple(shape), x.blocks)


def _over_one(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, dim = args[0], args[1] % len(shape)
    x, ids = along(units, x, dim)
    if ids is not None:
        units.keep(ids, "a softmax or running sum goes over it")
    return x.without(dim)


def _reduced(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    """Fewer units give another mean: see `Units.mix`."""
    x: Labelled = args[0]
    rank = len(x.shape)
    dims = args[1] if len(args) > 1 and args[1] is not None else kwargs.get("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = sorted({d % rank for d in dims})
    for dim in gone:
        x, ids = along(units, x, dim)
        if ids is not None:
            units.mix(ids)
    x = x.without(*gone)
    if len(shape) == rank:
        return Labelled(tuple(shape), x.blocks)
    left = [d for d in range(rank) if d not in gone]
    return x.moved(shape, {d: n for n, d in enumerate(left)})


def _length(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    """A vector norm, whose order stands before its dimensions."""
    return _reduced(units, [args[0], *args[2:]], kwargs, shape)


def _batch_norm(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x: Labelled = args[0]
    x, ids = along(units, x, 1)
    for vector in args[1:5]:
        if isinstance(vector, Labelled):
            matched(units, ids, single(units, vector, 0), _NORMALIZED)
    return x


def _layer_norm(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x: Labelled = args[0]
    normalized = len(args[1])
    for back in range(1, normalized + 1):
        x, ids = along(units, x, len(x.shape) - back)
        if ids is not None:
            units.mix(ids)
        for vector in args[2:4]:
            if isinstance(vector, Labelled):
                matched(units, ids, single(units, vector, -back), _NORMALIZED)
    return x


def _group_norm(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x: Labelled = args[0]
    groups = args[1]
    x, ids = along(units, x, 1)
    if ids is not None:
        units.together(ids.reshape(groups, -1), 1)
    for vector in args[2:4]:
        if isinstance(vector, Labelled):
            matched(units, ids, single(units, vector, 0), _NORMALIZED)
    return x


_BROADCAST = """
add sub mul div rsub maximum minimum pow where masked_fill eq ne lt le gt ge logical_and logical_or
bitwise_and __and__ addcmul lerp
"""
_ALONE = """
relu relu6 leaky_relu elu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid softplus selu
celu log_sigmoid hardshrink exp log sqrt rsqrt abs neg square reciprocal sin cos erf clamp clamp_min
clamp_max dropout feature_dropout contiguous clone detach alias to _to_copy type_as
logical_not bitwise_not nan_to_num floor round sign zeros_like ones_like full_like lift_fresh_copy
"""
_SUMS = "mean sum amax amin var std all any"
_RUNNING = "softmax log_softmax _softmax _log_softmax cumsum logcumsumexp"
RULES: dict[str, Rule] = {
    **dict.fromkeys(_BROADCAST.split(), _elementwise),
    **dict.fromkeys(_ALONE.split(), _same),
    **dict.fromkeys(_SUMS.split(), _reduced),
    **dict.fromkeys(_RUNNING.split(), _over_one),
    **dict.fromkeys(("batch_norm", "instance_norm"), _batch_norm),
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
    "group_norm": _group_norm,
    "linalg_vector_norm": _length,
    "prelu": _prelu,
}
