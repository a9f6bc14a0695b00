"""Elements as bytes: what a chunk of a file holds, by coder.

Codes (whole numbers) go through the coders of `tersor.codec.coders`, under the names they have
there. Words (all other elements, as unsigned integers of their width) have five: `floats`,
`exponents` (for few floats: exponents and signs by `max`), `planes` (a byte at a time), `zstd`
and `raw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from tersor.codec import coders
from tersor.codec.coders import Shape
from tersor.codec.errors import Unreadable
from tersor.codec.exponents import decode_exponents, encode_exponents
from tersor.errors import ModelError
from tersor.program.program import DTYPE_NAMES, DTYPES

Array = np.ndarray[Any, np.dtype[Any]]
Data = bytes | memoryview

INTEGERS = {
    torch.bool: np.uint8,
    torch.uint8: np.uint8,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float8_e4m3fn: np.int8,
    torch.float8_e5m2: np.int8,
}
"""Types whose elements are codes. Floats of one byte are numbers in the order of their values."""
FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_BYTE_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
MANTISSAS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
CODERS = ("fast", "small", "max")
MOST_CODE = 2**31 - 1

# zstd finds hardly any repeats among floats; a high level pays where there are few of them.
_LEVEL, _FAST_LEVEL, _SMALL = 19, 3, 2**16


def checked_dtype(tensor: Tensor) -> torch.dtype:
    """Its type. Raises ModelError for one that a file cannot hold."""
    if tensor.dtype not in DTYPE_NAMES:
        raise ModelError(
            f"a tensor of shape {tuple(tensor.shape)} has type {tensor.dtype}, which a file cannot "
            f"hold; convert it to one of {sorted(DTYPES)}"
        )
    return tensor.dtype


def elements(tensor: Tensor) -> Array:
    """Flat: codes as integers, other elements as unsigned integers of their width."""
    # A conjugate or a negative may only be noted on the tensor.
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = plain.cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    found = raw.view(numpy_type(tensor.dtype))
    return _in_order(found) if tensor.dtype in _BYTE_FLOATS else found


def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    """What `elements` gives."""
    if dtype in INTEGERS:
        return np.dtype(INTEGERS[dtype])
    # complex128 is wider than any integer.
    return np.dtype(f"<u{dtype.itemsize}") if dtype.itemsize <= 8 else np.dtype("V16")


def _in_order(bits: Array) -> Array:
    """Sign and magnitude as a number, which is 0 and up or -1 and down. Undoes itself."""
    return np.where(bits < 0, bits ^ np.int8(127), bits)


def as_tensor(array: Array, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The inverse of `elements`, mostly without a copy."""
    array = _in_order(array) if dtype in _BYTE_FLOATS else array
    raw = (
        torch.from_numpy(array.view(np.uint8)) if array.size else torch.empty(0, dtype=torch.uint8)
    )
    return raw.view(dtype).reshape(tuple(shape))


def encode_codes(codes: Sequence[Array], shapes: Sequence[Shape], coder: str) -> bytes:
    """Matrices of codes (any integers up to 31 bits), one after another."""
    return coders.encode_group(
        [c.reshape(s.rows, s.columns) for c, s in zip(codes, shapes, strict=True)],
        profile=coder,
        kernels=[shape.kernel for shape in shapes],
        states=[shape.states for shape in shapes],
    )


def decode_codes(data: Data, shapes: Sequence[Shape], coder: str, dtype: Any) -> list[Array]:
    """The inverse, flat, as int8, int16 or int32."""
    try:
        found = coders.decode_group(data, shapes, profile=coder, dtype=dtype)
    except ValueError as error:
        raise Unreadable(str(error)) from None
    return [matrix.reshape(-1) for matrix in found]


def encode_words(
    words: Array, shape: Shape, coder: str, dtype: torch.dtype, base: Array | None = None
) -> bytes:
    """One matrix of words by one coder. base: words that `planes` counts changes from"""
    match coder:
        case "floats":
            matrix = words.reshape(shape.rows, shape.columns)
            return coders.encode_floats(matrix, kind=FLOATS[dtype])
        case "exponents":
            return encode_exponents(words, MANTISSAS[dtype])
        case "planes":
            matrix = words.reshape(shape.rows, shape.columns)
            base = np.zeros(words.size, words.dtype) if base is None else base
            return coders.encode_delta(matrix, base.reshape(shape.rows, shape.columns))
        case "zstd":
            level = _LEVEL if words.nbytes <= _SMALL else _FAST_LEVEL
            return zstandard.ZstdCompressor(level=level).compress(words.tobytes())
    return words.tobytes()


def decode_words(
    data: Data, shape: Shape, coder: str, dtype: torch.dtype, base: Array | None = None
) -> Array:
    """The inverse, flat."""
    width, size = numpy_type(dtype), (shape.rows, shape.columns)
    try:
        match coder:
            case "floats":
                return coders.decode_floats(data, size, kind=FLOATS[dtype]).reshape(-1)
            case "exponents":
                return decode_exponents(data, shape.size, width, MANTISSAS[dtype])
            case "planes":
                base = np.zeros(shape.size, width) if base is None else base
                return coders.decode_delta(data, base.reshape(size)).reshape(-1)
            case "zstd":
                return np.frombuffer(bytearray(expand(data, shape.size * width.itemsize)), width)
    except ValueError as error:
        raise Unreadable(str(error)) from None
    if len(data) != shape.size * width.itemsize:
        raise Unreadable(
            f"holds {len(data)} bytes where its tensors need {shape.size * width.itemsize}"
        )
    return np.frombuffer(data, width).copy()


def word_coders(dtype: torch.dtype, *, few: bool = True) -> list[str]:
    """Those that can hold a type. few: with those that take too long for many"""
    found = ["zstd", "raw"]
    if numpy_type(dtype).kind == "u" and (few or dtype not in FLOATS):
        found.insert(0, "planes")
    if dtype in FLOATS:
        found[:0] = ["exponents", "floats"] if few else ["floats"]
    return found


def as_one_row(shapes: Sequence[Shape], *, words: bool = False) -> list[Shape]:
    """Vectors are coded as one long one, so that each starts where the one before has led.

    words: of matrices too, for words are coded as one matrix
    """
    if len(shapes) > 1 and (words or all(s.rows == 1 and s.states == 1 for s in shapes)):
        return [Shape(1, sum(shape.size for shape in shapes))]
    return list(shapes)


def expand(
    stream: Data, size: int, vocabulary: zstandard.ZstdCompressionDict | None = None
) -> bytes:
    """Undoes zstd where the frame itself says that it holds `size` bytes."""
    try:
        stated = zstandard.frame_content_size(stream)
        if stated != size:
            raise Unreadable(f"holds {stated} bytes where its tensors need {size}")
        return zstandard.ZstdDecompressor(dict_data=vocabulary).decompress(
            stream, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise Unreadable(f"cannot be decompressed ({error})") from None
