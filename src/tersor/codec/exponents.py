"""Few floats, without loss: exponents and signs by the coder of `max`, mantissas as they are.

A stream is two bytes, the most common exponent and a number of mantissas n. Where n is 0 all
mantissas follow, else the n different ones in rising order; first bit first, filled up with zeros
to whole bytes. Then comes a stream of `max`: a row of exponents, counted from the most common
one, a row of signs, and where n is not 0 a row that says which mantissa each float has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.codec import coders
from tersor.codec.coders import Shape

Array = np.ndarray[Any, np.dtype[Any]]
MOST_EXPONENTS = 2**16
"""Floats in a stream: a decoder takes a byte for each bit of them."""
_MOST = 255


def encode_exponents(words: Array, bits: int) -> bytes:
    """The bits of floats (uint16 or uint32, flat) with mantissas of `bits`."""
    width = words.itemsize * 8
    exponents = (words >> bits & (2 ** (width - 1 - bits) - 1)).astype(np.int32)
    mantissas = words & words.dtype.type(2**bits - 1)
    center = int(np.bincount(exponents).argmax())
    rows = [exponents - center, (words >> (width - 1)).astype(np.int32)]
    ways = [bytes([center, 0]) + _packed(mantissas, bits) + _stream(rows)]
    different, index = np.unique(mantissas, return_inverse=True)
    if different.size <= _MOST:
        rows.append(index.astype(np.int32))
        ways.append(bytes([center, different.size]) + _packed(different, bits) + _stream(rows))
    return min(ways, key=len)


def decode_exponents(
    data: bytes | memoryview, count: int, dtype: np.dtype[Any], bits: int
) -> Array:
    """The inverse. Raises ValueError for bytes that no encoder writes."""
    many = data[1] if len(data) > 1 else 0
    size = -(-(many or count) * bits // 8)
    if len(data) < 2 + size:
        raise ValueError("ends too early")
    mantissas = _unpacked(data[2 : 2 + size], many or count, bits)
    shapes = [Shape(1, count)] * (3 if many else 2)
    rows = [row.reshape(-1) for row in coders.decode_group(data[2 + size :], shapes, profile="max")]
    exponents, signs = rows[0] + data[0], rows[1]
    width = dtype.itemsize * 8
    if ((exponents < 0) | (exponents >= 2 ** (width - 1 - bits)) | (signs & ~1 != 0)).any():
        raise ValueError("holds an impossible exponent or sign")
    if many:
        if (mantissas[1:] <= mantissas[:-1]).any() or ((rows[2] < 0) | (rows[2] >= many)).any():
            raise ValueError("holds an impossible mantissa")
        mantissas = mantissas[rows[2]]
    found: Array = mantissas | exponents.astype(np.uint32) << bits
    found |= signs.astype(np.uint32) << (width - 1)
    return found.astype(dtype)


def _stream(rows: list[Array]) -> bytes:
    matrices = [row.reshape(1, -1) for row in rows]
    return coders.encode_group(matrices, profile="max", kernels=[1] * len(rows))


def _packed(mantissas: Array, bits: int) -> bytes:
    flags = np.unpackbits(mantissas.astype(">u4").view(np.uint8)).reshape(-1, 32)
    return np.packbits(flags[:, 32 - bits :]).tobytes()


def _unpacked(data: bytes | memoryview, count: int, bits: int) -> Array:
    flags = np.unpackbits(np.frombuffer(data, np.uint8))
    if flags[count * bits :].any():
        raise ValueError("ends in bits that are no mantissa")
    wide = np.zeros((count, 32), np.uint8)
    wide[:, 32 - bits :] = flags[: count * bits].reshape(count, bits)
    return np.packbits(wide, axis=1).view(">u4").reshape(-1).astype(np.uint32)
