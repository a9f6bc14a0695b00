"""Reads one weight of a file, or some of its rows, without the rest."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from torch import Tensor

from tersor.codec.chunks import read_leaves
from tersor.codec.container import read_text
from tersor.codec.contents import rebuilt
from tersor.codec.decoding import Window
from tersor.codec.errors import about
from tersor.codec.header import Formed, Header, Plain, leaves
from tersor.codec.header_reader import parse
from tersor.codec.pack import as_tensor
from tersor.codec.source import Place, name_of, opened
from tersor.errors import OptionError
from tersor.forms import Form

_BY_ROW = {
    "affine": ("codes", "scale", "zero"),
    "bit_planes": ("codes", "scale"),
    "block_float": ("codes", "scale"),
    "trellis": ("codes", "step"),
    "codebook": ("codes", "scale"),
    "product_codebook": ("codes",),
    "dense": ("stored", "scale"),
}
"""Parts of forms that have something for each output channel."""


def read_tensor(
    path: Place,
    name: str,
    rows: slice | None = None,
    *,
    base: Place | None = None,
    threads: int = 1,
) -> Tensor:
    """A weight or buffer, decoded from the chunks that hold it; nothing else is read or checked.

    path: as in `load`; of a `Ranges` or an `Http`, the header and those chunks alone are fetched
    name: one of its names in the model, "encoder.0.weight"
    rows: of its first dimension, None for all; most forms then read fewer chunks
    base, threads: as in `load`
    """
    with about(name_of(path)), opened(path) as source:
        header = parse(read_text(source))
        first, tensor = _entry(header, name)
        span = (0, 0) if rows is None else _span(rows, tensor.shape, name)
        cut = None if rows is None else _cut(tensor, span)
        part, windows = cut or (tensor, [None] * len(list(leaves(tensor))))
        wanted = {first + i: window for i, window in enumerate(windows)}
        arrays = read_leaves(source, header, wanted, threads, base)
        plain_tensors = (
            as_tensor(array, header.dtype(plain), plain.shape)
            for array, plain in zip(arrays.values(), leaves(part), strict=True)
        )
        item = rebuilt(part, name, plain_tensors)
    weight = item.dense() if isinstance(item, Form) else item
    return weight if rows is None or cut else weight[slice(*span)].clone()


def _entry(header: Header, name: str) -> tuple[int, Plain | Formed]:
    """What is stored under a name, and the index of its first leaf."""
    first = 0
    for entry in header.entries:
        if name in entry.names:
            return first, entry.tensor
        first += len(list(leaves(entry.tensor)))
    known = [entry.names[0] for entry in header.entries]
    raise OptionError(f"there is no tensor {name!r}; there are {known[:5]} and so on")


def _span(rows: slice, shape: tuple[int, ...], name: str) -> tuple[int, int]:
    """The first row that is wanted, and the one after the last."""
    # Whole numbers of any library are taken; a slice itself knows which are.
    with suppress(TypeError):
        if isinstance(rows, slice) and rows.step in (None, 1) and shape:
            start, stop, _ = rows.indices(shape[0])
            return start, max(start, stop)
    raise OptionError(
        f'rows={rows!r} of "{name}" of shape {shape}; give slice(start, stop) for a tensor that '
        "has rows, or None"
    )


def _cut(
    tensor: Plain | Formed, span: tuple[int, int]
) -> tuple[Plain | Formed, list[Window | None]] | None:
    """The description of some rows, and where they lie in each leaf; None if all must be read."""
    if span[0] == span[1]:
        return None
    if isinstance(tensor, Plain):
        plain, window = _plain_cut(tensor, tensor.shape[0], span)
        return plain, [window]
    if not _has_rows(tensor):
        return None
    parts: list[tuple[str, Plain | Formed]] = []
    windows: list[Window | None] = []
    for name, part in tensor.parts:
        if not isinstance(part, Plain):
            return None
        own = name in _BY_ROW[tensor.form] and part.count > 1
        if own and not _divisible(part, tensor.shape[0]):
            return None
        found = _plain_cut(part, tensor.shape[0], span) if own else (part, None)
        parts.append((name, found[0]))
        windows.append(found[1])
    shape = (span[1] - span[0], *tensor.shape[1:])
    return replace(tensor, shape=shape, parts=tuple(parts)), windows


def _has_rows(tensor: Formed) -> bool:
    """Whether rows of the weight are stretches of its parts, in their order."""
    config = tensor.config
    if tensor.form not in _BY_ROW or len(tensor.shape) < 1 or tensor.shape[0] < 2:
        return False
    if config.get("axis", 0) is None:
        # One row of everything: it can be cut where nothing runs along it.
        return config.get("group_size") is None and config.get("states", 1) == 1
    return bool(config.get("axis", 0) == 0)


def _divisible(part: Plain, rows: int) -> bool:
    """Whether it has as much of everything for each of so many rows; a file may say otherwise."""
    return part.shape[0] == rows or (part.shape[0] == 1 and part.count % rows == 0)


def _plain_cut(plain: Plain, rows: int, span: tuple[int, int]) -> tuple[Plain, Window]:
    each, many = plain.count // rows, span[1] - span[0]
    shape = (many, *plain.shape[1:]) if plain.shape[0] == rows else (1, many * each)
    return replace(plain, shape=shape), (span[0] * each, span[1] * each)
