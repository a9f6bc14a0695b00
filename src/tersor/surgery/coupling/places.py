"""Rules of what moves, joins and picks places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor.surgery.coupling.elements import combined, lifted
from tersor.surgery.coupling.labels import Block, Labelled, along, reshaped
from tersor.surgery.coupling.rules import Rule, keep_all, labelled
from tersor.surgery.coupling.units import Units


def _spatial(units: Units, args: Sequence[Any], kwargs: Any, shape: Any) -> Any:
    """What happens to places leaves channels alone; padded or pooled places have no labels."""
    x = args[0]
    several, size = isinstance(shape, list), shape[0] if isinstance(shape, list) else shape
    last = len(size) - 1
    changed = [d for d in range(len(size)) if d > 1 or d == last or x.shape[d] != size[d]]
    for dim in changed:
        x, ids = along(units, x, dim)
        if ids is not None:
            units.keep(ids, "places are pooled or padded")
    found = Labelled(tuple(size), x.without(*changed).blocks)
    # With the numbers of the places that were chosen.
    return [found, *(Labelled(tuple(other)) for other in shape[1:])] if several else found


def _pad(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    """What is added has units that stay."""
    x, amounts = args[0], args[1]
    for back in range(len(amounts) // 2):
        dim, before, after = len(shape) - 1 - back, amounts[2 * back], amounts[2 * back + 1]
        if before == after == 0:
            continue
        x, ids = along(units, x, dim)
        if ids is None:
            continue
        if before < 0 or after < 0:
            ids = ids[max(0, -before) : len(ids) - max(0, -after)]
        added = [units.new(max(0, count)) for count in (before, after)]
        for new in added:
            units.keep(new, "it was padded with it")
        x = labelled(x.without(dim), x.shape, dim, np.concatenate([added[0], ids, added[1]]))
    return Labelled(tuple(shape), x.blocks)


def _turned(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x: Labelled = args[0]
    for dim in args[-1]:
        x, ids = along(units, x, dim % len(shape))
        if ids is not None:
            units.keep(ids, "its places are turned round")
    return x


def _index(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, indices = args
    given = [d for d, index in enumerate(indices) if index is not None]
    if len(given) != 1 or not isinstance(indices[given[0]], Labelled):
        keep_all(units, [x, *indices], "it is indexed along several dimensions")
        return Labelled(tuple(shape))
    dim, more = given[0], len(indices[given[0]].shape) - 1
    x, ids = along(units, x, dim)
    if ids is not None:
        units.keep(ids, "its rows are looked up by number")
    left = {d: d + (more if d > dim else 0) for d in range(len(x.shape)) if d != dim}
    return x.without(dim).moved(shape, left)


def _index_select(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, dim = args[0], args[1] % len(shape)
    x, ids = along(units, x, dim)
    if ids is not None:
        units.keep(ids, "its rows are looked up by number")
    return Labelled(tuple(shape), x.without(dim).blocks)


def _reshape(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    return reshaped(units, args[0], shape)


def _permute(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    order = [d % len(shape) for d in args[1]]
    x: Labelled = args[0]
    return x.moved(shape, {d: n for n, d in enumerate(order)})


def _transpose(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    rank = len(shape)
    a, b = (d % rank for d in args[1:3]) if len(args) > 1 else (rank - 2, rank - 1)
    places = {d: d for d in range(rank)} | {a: b, b: a}
    x: Labelled = args[0]
    return x.moved(shape, places)


def _expand(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    return lifted(args[0], shape)


def _repeat(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x = reshaped(units, args[0], (*[1] * (len(shape) - len(args[0].shape)), *args[0].shape))
    blocks = []
    for block in x.blocks:
        times = [shape[d] // x.shape[d] for d in block.dims]
        blocks.append(Block(block.dims, np.tile(block.ids, times)))
    return Labelled(tuple(shape), tuple(blocks))


def _interleaved(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, times = args[:2]
    dim = (args[2] if len(args) > 2 else kwargs["dim"]) % len(shape)
    x, ids = along(units, x, dim)
    return labelled(x.without(dim), shape, dim, None if ids is None else np.repeat(ids, times))


def _cat(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    parts, found = [], []
    for part in args[0]:
        if len(part.shape) != len(shape):
            continue
        part, ids = along(units, part, dim)
        found.append((part.shape[dim], ids))
        parts.append(part.without(dim))
    rest = _joined(units, parts, dim, shape)
    if all(ids is None for _, ids in found):
        return rest
    whole = []
    for size, ids in found:
        if ids is None:
            ids = units.new(size)
            units.keep(ids, "it is joined with something that has no units")
        whole.append(ids)
    return labelled(rest, shape, dim, np.concatenate(whole))


def _joined(units: Units, parts: list[Labelled], dim: int, shape: Sequence[int]) -> Labelled:
    """Labels of the other dimensions of tensors that are put side by side along `dim`."""
    flat = [
        Labelled(tuple(1 if d == dim else s for d, s in enumerate(p.shape)), p.blocks)
        for p in parts
    ]
    sizes = tuple(1 if d == dim else s for d, s in enumerate(shape))
    return Labelled(tuple(shape), combined(units, flat, sizes).blocks)


def _stack(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    lifted = []
    for part in args[0]:
        size = (*part.shape[:dim], 1, *part.shape[dim:])
        lifted.append(part.moved(size, {d: d + (d >= dim) for d in range(len(part.shape))}))
    return _joined(units, lifted, dim, shape)


def _slice(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    given = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    x, dim, start, end, step = given
    return _taken(x, dim % len(shape), slice(start, end, step or 1), shape)


def _narrow(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, dim, start, length = args
    return _taken(x, dim % len(shape), slice(start, start + length), shape)


def _taken(x: Labelled, dim: int, part: slice, shape: Sequence[int]) -> Labelled:
    blocks: list[Block] = []
    for block in x.blocks:
        if dim not in block.dims:
            blocks.append(block)
            continue
        where: list[slice] = [slice(None)] * len(block.dims)
        where[block.dims.index(dim)] = part
        blocks.append(Block(block.dims, block.ids[tuple(where)]))
    return Labelled(tuple(shape), tuple(blocks))


def _select(units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]) -> Labelled:
    x, dim = args[0], args[1] % len(args[0].shape)
    x, ids = along(units, x, dim)
    if ids is not None:
        units.keep(ids, "one of its places is picked by number")
    x = x.without(dim)
    return x.moved(shape, {d: d - (d > dim) for d in range(len(x.shape)) if d != dim})


def _split(units: Units, args: Sequence[Any], kwargs: Any, shape: Any) -> list[Labelled]:
    x = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(x.shape)
    found, start = [], 0
    for size in shape:
        found.append(_taken(x, dim, slice(start, start + size[dim]), size))
        start += size[dim]
    if len({size[dim] for size in shape}) == 1:
        # Equal parts are mostly shares of what there is, so they must stay equal.
        parts = [along(units, part, dim)[1] for part in found]
        for part in parts[1:]:
            if part is not None and parts[0] is not None:
                units.unite(parts[0], part)
    return found


def _unbind(units: Units, args: Sequence[Any], kwargs: Any, shape: Any) -> list[Labelled]:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return [_select(units, (args[0], dim, n), {}, size) for n, size in enumerate(shape)]


def _pixel_shuffle(
    units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]
) -> Labelled:
    x, times = args
    channels = len(x.shape) - 3
    x, ids = along(units, x, channels)
    if ids is None:
        return Labelled(tuple(shape))
    together = ids.reshape(-1, times**2)
    units.together(together, 1)
    return labelled(Labelled(tuple(shape)), shape, channels, together[:, 0])


def _channel_shuffle(
    units: Units, args: Sequence[Any], kwargs: Any, shape: Sequence[int]
) -> Labelled:
    x, groups = args
    x, ids = along(units, x, 1)
    if ids is None:
        return x
    # Every group must keep as many, so what stands at the same place in all of them goes together.
    grid = ids.reshape(groups, -1)
    units.together(grid, 0)
    return labelled(x.without(1), shape, 1, grid.T.reshape(-1))


_SPATIAL = """
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d
upsample_bilinear2d upsample_bicubic2d upsample_linear1d _upsample_nearest_exact2d reflection_pad1d
reflection_pad2d replication_pad2d
"""
_RESHAPES = "view reshape flatten unflatten _unsafe_view squeeze unsqueeze view_as reshape_as"
RULES: dict[str, Rule] = {
    **dict.fromkeys(_SPATIAL.split(), _spatial),
    **dict.fromkeys(_RESHAPES.split(), _reshape),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("roll", "flip"), _turned),
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "t", "numpy_T", "mT"), _transpose),
    **dict.fromkeys(("expand", "broadcast_to", "expand_as"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("split", "chunk", "split_with_sizes", "tensor_split"), _split),
    "repeat_interleave": _interleaved,
    "index": _index,
    "index_select": _index_select,
    "stack": _stack,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "unbind": _unbind,
    "pixel_shuffle": _pixel_shuffle,
    "channel_shuffle": _channel_shuffle,
}
