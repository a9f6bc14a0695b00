"""Floats without loss: exponents are coded, signs and mantissas are noise and stored as they are.

A stream is one byte (the most common exponent), a part with the exponents relative to it, coded as
by `fast` with tables by row where rows differ, and the other bits as byte planes, lowest first;
the sign is the top bit of the last. Of float16 the upper byte is coded in place of the exponent.
"""

from typing import Any

import numpy as np

from tersor.codec.coders import rans, static
from tersor.codec.coders.adaptive import Array, Data, as_array
from tersor.codec.coders.native import native
from tersor.codec.coders.neighbours import Shape

WIDTHS = {"float32": 32, "bfloat16": 16, "float16": 16}

Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


def encode_floats(bits: Bits, *, kind: str) -> bytes:
    """Floats given as their bits.

    bits: (rows, columns) uint16 or uint32; left as they are
    kind: "float32", "bfloat16" or "float16"
    """
    width = WIDTHS[kind]
    if bits.dtype.itemsize * 8 != width or bits.ndim != 2:
        raise ValueError(f"{kind} needs a matrix of {width} bits, not {bits.dtype} {bits.shape}")
    if not bits.size:
        return b""
    coded, planes = _split(bits.reshape(-1), kind, width)
    center = int(np.bincount(coded, minlength=256).argmax()) if kind != "float16" else 0
    codes = (coded - np.uint8(center)).view(np.int8).astype(np.int32)
    return bytes([center]) + static.part(rans.encode(codes, [_shape(bits.shape)])) + planes


def decode_floats(data: Data, shape: tuple[int, int], *, kind: str) -> Bits:
    """The inverse of `encode_floats`. Raises ValueError for bytes that no encoder writes."""
    width = WIDTHS[kind]
    size = shape[0] * shape[1]
    out: Bits = np.empty(size, np.uint16 if width == 16 else np.uint32)
    if size == 0:
        if data:
            raise ValueError("goes on after its last symbol")
        return out.reshape(shape)
    coded, planes = static.parted(memoryview(data)[1:])
    if len(planes) != size * (width // 8 - 1):
        raise ValueError("has planes of the wrong size")
    rest = np.frombuffer(planes, np.uint8)
    compiled = native()
    if compiled is not None:
        joined = getattr(compiled, f"{kind}_decode")
        shapes = as_array([_shape(shape)])
        joined(np.frombuffer(coded, np.uint8), shapes, rest, data[0], out)
        return out.reshape(shape)
    codes = np.empty(size, np.int8)
    rans.decode(coded, [_shape(shape)], codes)
    out[:] = _joined(codes.view(np.uint8) + np.uint8(data[0]), rest.reshape(-1, size), kind)
    return out.reshape(shape)


def _shape(shape: tuple[int, ...]) -> Shape:
    return Shape(shape[0], shape[1])


def _split(bits: Array, kind: str, width: int) -> tuple[Array, bytes]:
    """What is coded (uint8), and the planes of the rest."""
    if kind == "float16":
        return (bits >> 8).astype(np.uint8), (bits & 255).astype(np.uint8).tobytes()
    mantissa = width - 9
    coded = (bits >> mantissa & 255).astype(np.uint8)
    rest = (bits >> (width - 1) << mantissa) | (bits & ((1 << mantissa) - 1))
    planes = [(rest >> (8 * i) & 255).astype(np.uint8).tobytes() for i in range(width // 8 - 1)]
    return coded, b"".join(planes)


def _joined(coded: Array, planes: Array, kind: str) -> Array:
    wide = coded.astype(np.uint32)
    rest = np.zeros(coded.size, np.uint32)
    for i, plane in enumerate(planes):
        rest |= plane.astype(np.uint32) << (8 * i)
    if kind == "float16":
        return wide << 8 | rest
    mantissa = WIDTHS[kind] - 9
    return (rest >> mantissa << (mantissa + 8)) | wide << mantissa | (rest & ((1 << mantissa) - 1))
