"""The profile `fast`: interleaved rANS with up to 16 frequency tables, chosen by position.

A stream is: a part with what is known beforehand (layout of the tables and the tables themselves,
coded as matrices by the coder of `small`), a part with escaped codes, the lanes' states (32 bits
each, little-endian) and 16-bit words. Symbol i belongs to lane i % lanes; the lanes take words in
the order of their symbols. The decoder ends in the states that the encoder began with.
"""

from collections.abc import Sequence

import numpy as np

from tersor.codec.coders import adaptive, static
from tersor.codec.coders.adaptive import Array, Data, Side
from tersor.codec.coders.native import native
from tersor.codec.coders.neighbours import Shape
from tersor.codec.coders.planning import Layout, Plan, plan, positions
from tersor.codec.coders.static import Alphabet, checked

_BOTTOM = 1 << 16
_FEW, _MANY, _MANY_SYMBOLS = 8, 32, 1 << 16
_LEAST_BITS, _MOST_BITS = 10, 14


def encode(codes: Array, shapes: Sequence[Shape]) -> bytes:
    """Matrices one after another in `codes` (int32, flat)."""
    if codes.size == 0:
        return b""
    symbols, alphabet, escaped = static.symbols_of(codes)
    best = plan(codes, symbols, alphabet.size, shapes)
    bits = 14 if len(best.counts) == 1 else 12
    weights = static.weight_codes(best.counts)
    side = _side(best, alphabet, bits, weights)
    frequency = _frequencies(static.weights_of(weights), bits)
    tables = best.tables
    compiled = native()
    if compiled is not None:
        words: bytes = compiled.rans_encode(symbols, tables, frequency.astype(np.uint32), bits)
    else:
        words = _words(symbols, tables, frequency, bits)
    return static.part(side) + static.part(escaped) + words


def decode(data: Data, shapes: Sequence[Shape], codes: Array) -> None:
    """Fills `codes` (flat). Raises ValueError for what no encoder writes."""
    compiled = native()
    if compiled is not None:
        compiled.fast_decode(np.frombuffer(data, np.uint8), adaptive.as_array(shapes), codes)
        return
    if codes.size == 0:
        if data:
            raise ValueError("goes on after its last symbol")
        return
    first, rest = static.parted(data)
    escaped, words = static.parted(rest)
    side = Side(first)
    alphabet, bits, layouts, weights = _read_side(side, shapes)
    tables = positions(layouts, len(weights))
    wide = static.unfolded(_symbols(words, tables, _frequencies(weights, bits), bits))
    static.put_escaped(wide, alphabet, escaped)
    limits = np.iinfo(codes.dtype)
    if wide.min() < limits.min or wide.max() > limits.max:
        raise ValueError("holds a code too large for its type")
    codes[:] = wide


def _side(best: Plan, alphabet: Alphabet, bits: int, weights: Array) -> bytes:
    tables = len(weights)
    header = [tables - 1, bits - _LEAST_BITS, alphabet.size - 1, int(alphabet.escapes)]
    rows = [np.array(header)]
    if tables > 1:
        rows += [row for layout in best.layouts if layout.shape.size for row in layout.rows()]
    shapes = [Shape(1, row.size) for row in rows] + [Shape(tables, alphabet.size)]
    flat = np.concatenate([*rows, static.side_of_weights(weights).reshape(-1)])
    return adaptive.encode(flat.astype(np.int32), shapes, mixed=False)


def _read_side(
    side: Side, shapes: Sequence[Shape]
) -> tuple[Alphabet, int, list[Layout], static.Counts]:
    header = side.row(4)
    tables = checked(header[0], 0, static.MOST_TABLES - 1, "holds too many tables") + 1
    bits = checked(header[1], 0, _MOST_BITS - _LEAST_BITS, "has tables too large") + _LEAST_BITS
    size = checked(header[2], 0, static.MOST_SYMBOLS - 1, "holds too many symbols") + 1
    alphabet = Alphabet(size, bool(checked(header[3], 0, 1, "holds an unknown flag")))
    layouts = [
        Layout.read(side, shape) if tables > 1 and shape.size else Layout(shape) for shape in shapes
    ]
    weights = static.read_weights(side, tables, size)
    side.finish()
    return alphabet, bits, layouts, weights


def _frequencies(weights: Array, bits: int) -> Array:
    return np.stack([static.frequencies(row, 1 << bits) for row in weights])


def _starts(frequency: Array) -> Array:
    found: Array = frequency.cumsum(1) - frequency
    return found


def _lanes(count: int) -> int:
    return _FEW if count < _MANY_SYMBOLS else _MANY


def _words(symbols: Array, tables: Array, frequency: Array, bits: int) -> bytes:
    many = frequency[tables, symbols].tolist()
    start = _starts(frequency)[tables, symbols].tolist()
    states = [_BOTTOM] * _lanes(len(many))
    words = []
    for i in range(len(many) - 1, -1, -1):
        x, f = states[i % len(states)], many[i]
        if x >= f << (32 - bits):
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % len(states)] = (x // f << bits) + x % f + start[i]
    return np.array(states, "<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


def _symbols(data: Data, tables: Array, frequency: Array, bits: int) -> Array:
    """All lanes at once: they depend on each other only by the words that they take."""
    lanes = _lanes(tables.size)
    if len(data) < 4 * lanes or len(data) % 2:
        raise ValueError("ends too early")
    states = np.frombuffer(data, "<u4", lanes).astype(np.int64)
    if (states < _BOTTOM).any():
        raise ValueError("starts in an impossible state")
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.int64)
    by_slot = np.stack([np.repeat(np.arange(len(row)), row) for row in frequency])
    start = _starts(frequency)
    found = np.empty(tables.size, np.int64)
    taken = 0
    for first in range(0, tables.size, lanes):
        table = tables[first : first + lanes]
        x = states[: table.size]
        slot = x & ((1 << bits) - 1)
        symbol = by_slot[table, slot]
        x = frequency[table, symbol] * (x >> bits) + slot - start[table, symbol]
        low = np.flatnonzero(x < _BOTTOM)
        if taken + low.size > words.size:
            raise ValueError("ends too early")
        x[low] = (x[low] << 16) | words[taken : taken + low.size]
        taken += low.size
        states[: table.size] = x
        found[first : first + lanes] = symbol
    if taken < words.size:
        raise ValueError("goes on after its last symbol")
    if (states != _BOTTOM).any():
        raise ValueError("ends in an impossible state")
    return found
