"""Symbols with fixed frequencies: alphabets, frequency tables, and how a stream holds them.

A symbol is a code folded to 0, -1, 1, -2, 2, ...; codes too rare or too large for a symbol of
their own become the last one, "escape", and are stored apart by the coder of `small`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.codec.coders import adaptive
from tersor.codec.coders.adaptive import Array, Data, Side
from tersor.codec.coders.neighbours import Shape

MOST_TABLES, MOST_SYMBOLS, MOST_WEIGHT = 16, 256, 64
_QUARTERS = (65536, 77936, 92682, 110218)  # 2**(i / 4) of 65536

Counts = np.ndarray[Any, np.dtype[np.int64]]


def table_weight(code: int) -> int:
    """2**((code - 1) / 4), times 16; code 0 is no weight at all."""
    return (_QUARTERS[(code - 1) % 4] << ((code - 1) // 4)) >> 12 if code else 0


_WEIGHTS = np.array([table_weight(code) for code in range(MOST_WEIGHT + 1)], np.int64)


def frequencies(weights: Counts, total: int) -> Counts:
    """Whole numbers that sum to `total`, in proportion and at least 1 where there is a weight."""
    found = np.zeros(len(weights), np.int64)
    if not weights.any():
        found[0] = total
        return found
    found = np.where(weights > 0, np.maximum(1, weights * total // weights.sum()), 0)
    missing = int(total - found.sum())
    while missing:
        largest = int(found.argmax())
        change = max(missing, 1 - int(found[largest]))
        found[largest] += change
        missing -= change
    return found


def weight_codes(counts: Counts) -> Counts:
    """The nearest weight for each count, as a share of its table's 2**14; (tables, symbols)."""
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    # Times 16, as the weights are; halfway between two weights the larger is taken.
    shares = (counts << 18) // total
    codes = np.searchsorted((_WEIGHTS[1:-1] + _WEIGHTS[2:]) // 2, shares, side="right") + 1
    found: Counts = np.where(counts > 0, codes, 0)
    return found


def weights_of(codes: Counts) -> Counts:
    """The weights that `codes` stand for."""
    return _WEIGHTS[codes]


def side_of_weights(codes: Counts) -> Counts:
    """Each code against that of the next symbol of the same sign, the first against a table's."""
    found = codes.copy()
    found[:, 2:] -= codes[:, :-2]
    found[:, 1:2] -= codes[:, :1]
    found[1:, 0] -= codes[:-1, 0]
    return found


def read_weights(side: Side, tables: int, symbols: int) -> Counts:
    """The inverse of `side_of_weights`, as weights; (tables, symbols)."""
    flat = side.matrix(Shape(tables, symbols))
    for i in range(len(flat)):
        symbol = i % symbols
        back = 2 if symbol >= 2 else 1 if symbol == 1 else symbols
        flat[i] += flat[i - back] if i >= back else 0
        if not 0 <= flat[i] <= MOST_WEIGHT:
            raise ValueError("holds an impossible frequency")
    return weights_of(np.array(flat)).reshape(tables, symbols)


@dataclass(frozen=True, slots=True)
class Alphabet:
    """size: symbols with the escape; escapes: whether there is one."""

    size: int
    escapes: bool

    @property
    def escape(self) -> int:
        """The code that stands for an escape."""
        return int(unfolded(np.array([self.size - 1]))[0])


def folded(codes: Array) -> Array:
    """0, -1, 1, -2, 2, ... (int32) as 0, 1, 2, 3, 4, ... (uint32)."""
    found: Array = ((codes << 1) ^ (codes >> 31)).view(np.uint32)
    return found


def unfolded(symbols: Array) -> Array:
    """The inverse of `folded`."""
    return np.where(symbols & 1, -(symbols + 1) // 2, symbols // 2)


def alphabet_of(counts: Counts, beyond: int) -> Alphabet:
    """The smallest that leaves at most 1 code in 2048 without a symbol.

    counts: of the 256 first folded codes; beyond: how many are larger
    """
    # above[i]: codes folded to i or more. The escape needs a symbol of its own.
    above = np.append(counts[::-1].cumsum()[::-1], 0) + beyond
    rare = above <= above[0] // 2048
    own = int(rare.argmax()) if rare[:MOST_SYMBOLS].any() else MOST_SYMBOLS - 1
    all_of_them = int((above == 0).argmax())
    if above[-1] == 0 and all_of_them <= own + 1:
        return Alphabet(max(1, all_of_them), False)
    return Alphabet(own + 1, True)


def symbols_of(codes: Array) -> tuple[Array, Alphabet, bytes]:
    """Symbols (uint8), their alphabet, and the escaped codes as a stream."""
    wide = folded(codes)
    counts = np.bincount(np.minimum(wide, np.uint32(MOST_SYMBOLS)), minlength=MOST_SYMBOLS + 1)
    alphabet = alphabet_of(counts[:-1], int(counts[-1]))
    if not alphabet.escapes:
        return wide.astype(np.uint8), alphabet, b""
    escaped = codes[wide >= alphabet.size - 1]
    stream = adaptive.encode(
        np.ascontiguousarray(escaped, np.int32), [Shape(1, escaped.size)], mixed=False
    )
    return np.minimum(wide, np.uint32(alphabet.size - 1)).astype(np.uint8), alphabet, stream


def put_escaped(codes: Array, alphabet: Alphabet, stream: Data) -> None:
    """Replaces the escapes among `codes`."""
    if not alphabet.escapes:
        if stream:
            raise ValueError("holds escaped codes without need")
        return
    places = np.flatnonzero(codes == alphabet.escape)
    escaped = np.empty(places.size, np.int32)
    adaptive.decode(stream, [Shape(1, places.size)], escaped, mixed=False)
    codes[places] = escaped


def part(data: bytes) -> bytes:
    """Bytes after their number, which is written seven bits to a byte, lowest first."""
    size, out = len(data), bytearray()
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out) + data


def parted(data: Data) -> tuple[Data, Data]:
    """The first part and what follows it."""
    size = 0
    for i in range(6):
        if i >= len(data):
            raise ValueError("ends too early")
        size |= (data[i] & 127) << (7 * i)
        if data[i] < 128:
            if size > len(data) - i - 1:
                raise ValueError("ends too early")
            return data[i + 1 : i + 1 + size], data[i + 1 + size :]
    raise ValueError("holds an impossible length")


def checked(value: int, low: int, high: int, what: str) -> int:
    """The value, if it lies from low to high."""
    if not low <= value <= high:
        raise ValueError(what)
    return value
