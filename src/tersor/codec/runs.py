"""Encodes a run of chunks with the coder that makes it smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tersor.codec.coders import Shape
from tersor.codec.geometry import as_coded, pieces
from tersor.codec.header import Run
from tersor.codec.pack import Array, as_one_row, encode_codes, encode_words, word_coders
from tersor.codec.shelf import Item, Planned
from tersor.errors import OptionError

PROFILES = {"fast": ("fast",), "small": ("small", "fast"), "max": ("max", "small")}
"""What each profile tries on codes. Of equals the first is taken."""
QUICKLY = ("small",)
"""What is tried where only the size is wanted."""
_QUICK = 2**14
"""Elements that any coder decodes in no time, so that the smallest may be chosen."""
_EVERY = 8
"""Of many chunks this one decides, and the first."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a chunk holds: elements of each tensor, their layouts, and words of the base."""

    arrays: list[Array]
    shapes: list[Shape]
    base: Array | None = None


def check_profile(profile: str) -> None:
    """Raises OptionError unless there is such a profile."""
    if not isinstance(profile, str) or profile not in PROFILES:
        raise OptionError(f"profile={profile!r:.40} is none of {', '.join(PROFILES)}")


def encoded(
    run: Planned, tried: Sequence[str], short: Sequence[str] = ("small", "max")
) -> tuple[Run, list[bytes]]:
    """The run and its chunks.

    tried: coders for codes, those of a profile; short: more of them, for short runs
    """
    parts = _parts(run)
    dtype = run.items[0].dtype
    if run.sort == "words":
        few = "small" in tried and run.size <= _QUICK
        choices = ["planes"] if run.changed else word_coders(dtype, few=few)
    else:
        choices = list(tried)
        if run.size <= _QUICK:
            choices += [coder for coder in short if coder not in tried]

    def encode(part: Part, coder: str) -> bytes:
        if run.sort == "words":
            return encode_words(part.arrays[0], part.shapes[0], coder, dtype, part.base)
        return encode_codes(part.arrays, part.shapes, coder)

    coder, chunks = _smallest(choices, parts, encode)
    return Run(coder, tuple(map(len, chunks)), run.unit, run.changed), chunks


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
    words = run.sort == "words"
    arrays = [item.array if words else differences(item) for item in run.items]
    bases = [item.base for item in run.items if words and item.base is not None]
    shapes = [as_coded(item.leaf.matrix, changed=run.changed) for item in run.items]
    if run.unit is not None:
        return [
            Part(
                [arrays[0][start : start + shape.size]],
                [shape],
                bases[0][start : start + shape.size] if bases else None,
            )
            for start, shape in pieces(shapes[0], run.unit)
        ]
    row = as_one_row(shapes, words=words)
    arrays = arrays if len(row) == len(arrays) else [_joined(arrays)]
    return [Part(arrays, row, _joined(bases) if bases else None)]


def differences(item: Item) -> Array:
    """The codes of a tensor as they are coded: from the base's, or from their center."""
    if item.base is not None:
        found: Array = item.array.astype(np.int64) - item.base
        return found
    return item.array.astype(np.int32) - item.center if item.center else item.array


def _joined(arrays: Sequence[Array]) -> Array:
    # Of several widths numpy would make floats.
    wide = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)
    same = all(array.dtype == wide for array in arrays)
    return np.concatenate([array if same else array.astype(np.int64) for array in arrays])
