"""Coders: matrices of whole numbers to few bytes and back, exactly.

Each profile is a model of the codes and a coder, and holds the same numbers:

fast     rANS with fixed frequencies that depend on the position
small    adaptive binary range coder; what it expects depends on the codes nearby
max      the same with eight such expectations mixed
huffman  one canonical Huffman code
sparse   places and values of the codes that are not zero

Each module says what its streams are. All are readable Python here and, where a compiler was found,
C++ that writes and reads the same bytes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from tersor.codec.coders import adaptive, huffman, rans, sparse
from tersor.codec.coders.adaptive import Array, Data
from tersor.codec.coders.delta import decode_delta, encode_delta
from tersor.codec.coders.floats import decode_floats, encode_floats
from tersor.codec.coders.models import MOST_CODE
from tersor.codec.coders.neighbours import TRELLISES, Shape

__all__ = [
    "PROFILES",
    "Shape",
    "decode",
    "decode_delta",
    "decode_floats",
    "decode_group",
    "encode",
    "encode_delta",
    "encode_floats",
    "encode_group",
]

_Encoder = Callable[[Array, Sequence[Shape]], bytes]
_Decoder = Callable[[Data, Sequence[Shape], Array], None]

_PROFILES: dict[str, tuple[_Encoder, _Decoder]] = {
    "fast": (rans.encode, rans.decode),
    "small": (partial(adaptive.encode, mixed=False), partial(adaptive.decode, mixed=False)),
    "max": (partial(adaptive.encode, mixed=True), partial(adaptive.decode, mixed=True)),
    "huffman": (huffman.encode, huffman.decode),
    "sparse": (sparse.encode, sparse.decode),
}
PROFILES = tuple(_PROFILES)


def encode(codes: Array, *, profile: str, kernel: int = 1, states: int = 1) -> bytes:
    """A matrix of integers as bytes.

    codes: (rows, columns), of any integer type, values from -(2**31 - 1) to 2**31 - 1
    profile: one of PROFILES
    kernel: neighbouring columns that belong to one input channel; 9 for a 3 x 3 convolution
    states: of the trellis along each row, 4, 8, 16, 32 or 64; 1 for codes without one
    """
    return encode_group([codes], profile=profile, kernels=[kernel], states=[states])


def decode(
    data: Data,
    shape: tuple[int, int],
    *,
    profile: str,
    kernel: int = 1,
    states: int = 1,
    dtype: type[np.signedinteger] = np.int32,
) -> Array:
    """The inverse of `encode`. Raises ValueError for bytes that no encoder writes.

    The compiled coders take at most 4 MiB and 40 bytes per code, whatever the bytes say.

    shape: (rows, columns); the bytes do not hold it
    dtype: int8, int16 or int32, large enough for every code
    """
    (found,) = decode_group(data, [Shape(*shape, kernel, states)], profile=profile, dtype=dtype)
    return found


def encode_group(
    codes: Sequence[Array],
    *,
    profile: str,
    kernels: Sequence[int],
    states: Sequence[int] | None = None,
) -> bytes:
    """Several matrices as one stream: what one teaches about the codes serves the next.

    kernels, states: of each matrix, as in `encode`; None for no trellis in any
    """
    all_states = [1] * len(codes) if states is None else states
    shapes = [_shape(*given) for given in zip(codes, kernels, all_states, strict=True)]
    for matrix in codes:
        if matrix.size and not -MOST_CODE <= int(matrix.min()) <= int(matrix.max()) <= MOST_CODE:
            raise ValueError(f"codes must lie from -{MOST_CODE} to {MOST_CODE}")
    flat = [matrix.astype(np.int32, copy=False).reshape(-1) for matrix in codes]
    joined = flat[0] if len(flat) == 1 else np.concatenate([np.empty(0, np.int32), *flat])
    return _PROFILES[profile][0](np.ascontiguousarray(joined), shapes)


def decode_group(
    data: Data,
    shapes: Sequence[Shape],
    *,
    profile: str,
    dtype: type[np.signedinteger] = np.int32,
) -> list[Array]:
    """The inverse of `encode_group`; see `decode`."""
    for shape in shapes:
        _check(shape)
    found = np.empty(sum(shape.size for shape in shapes), dtype)
    _PROFILES[profile][1](data, shapes, found)
    parts = np.split(found, np.cumsum([shape.size for shape in shapes])[:-1])
    return [part.reshape(s.rows, s.columns) for part, s in zip(parts, shapes, strict=False)]


def _shape(matrix: Array, kernel: int, states: int) -> Shape:
    if matrix.ndim != 2 or matrix.dtype.kind not in "iu":
        raise ValueError(f"codes are {matrix.dtype} of shape {matrix.shape}; give integer matrices")
    shape = Shape(matrix.shape[0], matrix.shape[1], kernel, states)
    _check(shape)
    return shape


def _check(shape: Shape) -> None:
    if shape.kernel < 1 or shape.columns % shape.kernel:
        raise ValueError(f"kernel={shape.kernel} does not divide the {shape.columns} columns")
    if shape.states not in TRELLISES:
        raise ValueError(f"states={shape.states}; a trellis has one of {list(TRELLISES)}")
