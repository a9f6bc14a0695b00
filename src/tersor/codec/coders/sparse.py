"""The profile `sparse`: which codes are not zero, and what they are.

A stream is one byte that says how the places are stored, a part with them, and the codes that are
not zero, coded as by `fast`. Places are a mask of one bit per code (0), first code in the highest
bit, or the number of zeros before each code that is not zero, coded as by `fast` (1).
"""

from collections.abc import Sequence

import numpy as np

from tersor.codec.coders import rans, static
from tersor.codec.coders.adaptive import Array, Data
from tersor.codec.coders.neighbours import Shape

_MASK, _RUNS = b"\0", b"\1"


def encode(codes: Array, shapes: Sequence[Shape]) -> bytes:
    """All `codes` (int32, flat); their layout does not matter."""
    if codes.size == 0:
        return b""
    places = np.flatnonzero(codes)
    mask = static.part(np.packbits(codes != 0).tobytes())
    gaps = np.diff(places, prepend=-1) - 1
    runs = static.part(static.part(_number(places.size)) + _coded(gaps))
    if len(runs) < len(mask):
        return _RUNS + runs + _coded(codes[places])
    return _MASK + mask + _coded(codes[places])


def decode(data: Data, shapes: Sequence[Shape], codes: Array) -> None:
    """Fills `codes` (flat). Raises ValueError for what no encoder writes."""
    codes[:] = 0
    if codes.size == 0:
        if data:
            raise ValueError("goes on after its last symbol")
        return
    kind, (places, rest) = data[:1], static.parted(data[1:])
    if kind == _MASK:
        where = _from_mask(places, codes.size)
    elif kind == _RUNS:
        where = _from_runs(places, codes.size)
    else:
        raise ValueError("stores places in an unknown way")
    found = np.empty(where.size, codes.dtype)
    rans.decode(rest, [Shape(1, where.size)], found)
    if (found == 0).any():
        raise ValueError("holds a zero among the codes that are not zero")
    codes[where] = found


def _coded(codes: Array) -> bytes:
    return rans.encode(np.ascontiguousarray(codes, np.int32), [Shape(1, codes.size)])


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little").rstrip(b"\0")


def _from_mask(data: Data, count: int) -> Array:
    if len(data) != (count + 7) // 8:
        raise ValueError("has a mask of the wrong size")
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count:].any():
        raise ValueError("ends in bits that are no code")
    return np.flatnonzero(bits)


def _from_runs(data: Data, count: int) -> Array:
    number, rest = static.parted(data)
    size = int.from_bytes(number, "little")
    if len(number) > 8 or size > count or number[-1:] == b"\0":
        raise ValueError("holds more codes than there are places")
    gaps = np.empty(size, np.int32)
    rans.decode(rest, [Shape(1, size)], gaps)
    if (gaps < 0).any():
        raise ValueError("holds a negative run of zeros")
    places = np.cumsum(gaps, dtype=np.int64) + np.arange(size)
    if size and places[-1] >= count:
        raise ValueError("runs beyond the last code")
    return places
