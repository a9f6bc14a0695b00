"""Floats (or any words) as what changed since a base, without loss.

A stream is one byte that says what a change is, and a part per byte plane of the changes, lowest
first. A change is the exclusive or with the base (0), or the difference modulo the width, folded
to 0, -1, 1, -2, ... (1). A part is one byte, 0 for a plane as it is and 1 for one coded as by
`fast` with bytes above 127 taken for negative, and the plane. Codes of a quantized weight need
none of this: encode their difference.
"""

import numpy as np

from tersor.codec.coders import rans, static
from tersor.codec.coders.adaptive import Array, Data
from tersor.codec.coders.floats import Bits
from tersor.codec.coders.neighbours import Shape

_XOR, _DIFFERENCE = 0, 1
_RAW, _CODED = b"\0", b"\1"


def encode_delta(bits: Bits, base: Bits) -> bytes:
    """The shorter of both ways.

    bits, base: (rows, columns) of one unsigned type
    """
    if bits.dtype != base.dtype or bits.shape != base.shape or bits.ndim != 2:
        raise ValueError(f"{bits.dtype} {bits.shape} has another type or shape than its base")
    shape = Shape(*bits.shape)
    ways = (_planes(bits ^ base, shape), _planes(_folded(bits - base), shape))
    kind = min((_XOR, _DIFFERENCE), key=lambda i: len(ways[i]))
    return bytes([kind]) + ways[kind]


def decode_delta(data: Data, base: Bits) -> Bits:
    """The inverse of `encode_delta`. Raises ValueError for bytes that no encoder writes."""
    kind, rest = data[:1], data[1:]
    changes = np.zeros(base.size, base.dtype)
    for i in range(base.dtype.itemsize):
        part, rest = static.parted(rest)
        changes |= _plane(part, Shape(*base.shape)).astype(base.dtype) << base.dtype.type(8 * i)
    if rest:
        raise ValueError("goes on after its last symbol")
    found = changes.reshape(base.shape)
    if kind == bytes([_XOR]):
        return found ^ base
    if kind == bytes([_DIFFERENCE]):
        return base + _unfolded(found)
    raise ValueError("changes in an unknown way")


def _folded(change: Array) -> Array:
    one = change.dtype.type(1)
    negative = change >> change.dtype.type(change.dtype.itemsize * 8 - 1)
    found: Array = (change << one) ^ (negative * np.iinfo(change.dtype).max)
    return found


def _unfolded(change: Array) -> Array:
    one = change.dtype.type(1)
    found: Array = (change >> one) ^ ((change & one) * np.iinfo(change.dtype).max)
    return found


def _planes(changes: Array, shape: Shape) -> bytes:
    parts = []
    for i in range(changes.dtype.itemsize):
        plane = (changes >> changes.dtype.type(8 * i)).astype(np.uint8).reshape(-1)
        coded = rans.encode(plane.view(np.int8).astype(np.int32), [shape])
        parts.append(_CODED + coded if len(coded) < plane.size else _RAW + plane.tobytes())
    return b"".join(map(static.part, parts))


def _plane(part: Data, shape: Shape) -> Array:
    if part[:1] == _CODED:
        codes = np.empty(shape.size, np.int8)
        rans.decode(part[1:], [shape], codes)
        return codes.view(np.uint8)
    if part[:1] != _RAW or len(part) != shape.size + 1:
        raise ValueError("has planes of the wrong size")
    return np.frombuffer(part, np.uint8, offset=1)
