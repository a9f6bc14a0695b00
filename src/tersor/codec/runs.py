"""Encodes a run of chunks with the coder that makes it smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tersor.codec.coders import Shape
from tersor.codec.geometry import pieces
from tersor.codec.header import Run
from tersor.codec.pack import Array, as_one_row, encode_codes, encode_words, word_coders
from tersor.codec.shelf import Planned

PROFILES = {"fast": ("fast",), "small": ("small", "fast"), "max": ("max", "small")}
"""What each profile tries on codes. Of equals the first is taken."""
_QUICK = 2**14
"""Elements that any coder decodes in no time, so that the smallest may be chosen."""
_EVERY = 8
"""Of many chunks this one decides, and the first."""

Part = tuple[list[Array], list[Shape]]


def encoded(run: Planned, profile: str) -> tuple[Run, list[bytes]]:
    """The run and its chunks."""
    parts = _parts(run)
    choices: Sequence[str] = PROFILES[profile]
    if run.sort == "words":
        dtype = run.items[0].dtype
        choices = word_coders(dtype, adaptive=profile != "fast" and run.size <= _QUICK)
        coder, chunks = _smallest(
            choices, parts, lambda part, choice: encode_words(part[0][0], part[1][0], choice, dtype)
        )
    else:
        if run.size <= _QUICK:
            choices = [*choices, *(c for c in ("small",) if c not in choices)]
        coder, chunks = _smallest(choices, parts, lambda part, choice: encode_codes(*part, choice))
    return Run(coder, tuple(map(len, chunks)), run.unit), chunks


def _smallest(
    choices: Sequence[str], parts: Sequence[Part], encode: Callable[[Part, str], bytes]
) -> tuple[str, list[bytes]]:
    """The coder whose sample of the parts is shortest, and all parts by it."""
    sample = range(0, len(parts), _EVERY)
    tried = {choice: {i: encode(parts[i], choice) for i in sample} for choice in choices}
    best = min(choices, key=lambda choice: sum(map(len, tried[choice].values())))
    return best, [
        tried[best][i] if i in tried[best] else encode(part, best) for i, part in enumerate(parts)
    ]


def _parts(run: Planned) -> list[Part]:
    """What each chunk holds."""
    arrays = [
        item.array.astype(np.int32) - item.center if item.center else item.array
        for item in run.items
    ]
    shapes = [item.leaf.matrix for item in run.items]
    if run.unit is not None:
        return [
            ([arrays[0][start : start + shape.size]], [shape])
            for start, shape in pieces(shapes[0], run.unit)
        ]
    row = as_one_row(shapes, words=run.sort == "words")
    return [(arrays if len(row) == len(arrays) else [_joined(arrays)], row)]


def _joined(arrays: Sequence[Array]) -> Array:
    # Of several widths numpy would make floats.
    wide = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
    same = all(array.dtype == wide for array in arrays)
    return np.concatenate([array if same else array.astype(np.int64) for array in arrays])
