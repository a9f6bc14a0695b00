"""The profiles `small` and `max`: an adaptive model of each bit and a binary range coder."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tersor.codec.coders.arithmetic import BitCoder, RangeDecoder, RangeEncoder
from tersor.codec.coders.mixing import Mixed
from tersor.codec.coders.models import Model, Small, code_matrix
from tersor.codec.coders.native import native
from tersor.codec.coders.neighbours import Shape

Array = np.ndarray[Any, np.dtype[Any]]
Data = bytes | memoryview


def encode(codes: Array, shapes: Sequence[Shape], *, mixed: bool) -> bytes:
    """Matrices one after another in `codes` (int32, flat); the model goes on learning."""
    compiled = native()
    if compiled is not None:
        found: bytes = compiled.adaptive_encode(codes, as_array(shapes), mixed)
        return found
    coder = RangeEncoder()
    model = _model(coder, mixed)
    start = 0
    for shape in shapes:
        code_matrix(coder, model, codes[start : start + shape.size].tolist(), shape)
        start += shape.size
    return coder.finish()


def decode(data: Data, shapes: Sequence[Shape], codes: Array, *, mixed: bool) -> None:
    """Fills `codes` (flat). Raises ValueError for what no encoder writes."""
    compiled = native()
    if compiled is not None:
        compiled.adaptive_decode(np.frombuffer(data, np.uint8), as_array(shapes), codes, mixed)
        return
    side = Side(data, mixed=mixed)
    limits = np.iinfo(codes.dtype)
    start = 0
    for shape in shapes:
        found = side.matrix(shape)
        if found and not limits.min <= min(found) <= max(found) <= limits.max:
            raise ValueError("holds a code too large for its type")
        codes[start : start + shape.size] = found
        start += shape.size
    side.finish()


class Side:
    """A stream read matrix by matrix, where the first say how large the next are."""

    def __init__(self, data: Data, *, mixed: bool = False) -> None:
        self._coder = RangeDecoder(bytes(data))
        self._model = _model(self._coder, mixed)

    def matrix(self, shape: Shape) -> list[int]:
        """The next codes."""
        return code_matrix(self._coder, self._model, [], shape)

    def row(self, count: int) -> list[int]:
        """The next codes, as a matrix of one row."""
        return self.matrix(Shape(1, count))

    def finish(self) -> None:
        """Refuses what follows the last code."""
        self._coder.finish()


def as_array(shapes: Sequence[Shape]) -> Array:
    """(matrices, 4), for the compiled coders."""
    return np.array(shapes, np.uint32).reshape(-1, 4)


def _model(coder: BitCoder, mixed: bool) -> Model:
    return Mixed(coder) if mixed else Small(coder)
