"""What a form takes in a file, without writing one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from tersor.codec.coders import Shape
from tersor.codec.contents import described
from tersor.codec.leaves import leaves_of
from tersor.codec.runs import QUICKLY, encoded
from tersor.codec.shelf import Item, Planned, Shelf
from tersor.forms import Form

_SAMPLED = {"matrix": 2**18, "vector": 2**18, "words": 2**16}
"""Elements of a larger tensor by which it is judged."""
_STRETCHES = 32


def coded_bytes(form: Form) -> int:
    """Bytes that the tensors of `form` take in a file of profile small, within about 1 %.

    Each is coded by itself; in a file a small one gains from those before it.
    """
    tensors: list[Tensor] = []
    leaves = list(leaves_of(described(form, "", tensors), ""))
    total = 0.0
    for run in Shelf(leaves, tensors).runs:
        part = Planned(run.sort, [_sample(item) for item in run.items])
        # A short vector stays one in a file, where a small matrix joins others.
        found, _ = encoded(part, QUICKLY, short=("max",) if run.sort == "vector" else ())
        total += sum(found.lengths) * run.size / part.size
    return round(total)


def _sample(item: Item) -> Item:
    """Stretches of rows, or of a single row, evenly spaced, that make one smaller tensor."""
    matrix, most = item.leaf.matrix, _SAMPLED[item.sort]
    across = 1 if matrix.rows == 1 else matrix.columns
    along = matrix.size // across
    each = most // across // _STRETCHES
    if matrix.size <= most or each < 1 or (matrix.rows == 1 and matrix.states > 1):
        return item
    starts = np.linspace(0, along - each, _STRETCHES).astype(int)
    rows = item.array.reshape(along, across)
    array = np.concatenate([rows[start : start + each] for start in starts]).reshape(-1)
    many = each * _STRETCHES
    shape = Shape(1, many) if matrix.rows == 1 else matrix._replace(rows=many)
    return replace(item, leaf=replace(item.leaf, matrix=shape), array=array)
