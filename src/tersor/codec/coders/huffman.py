"""The profile `huffman`: a canonical Huffman code of at most 12 bits to a symbol.

A stream is: a part with the lengths of the codes (a matrix of one row, coded by the coder of
`small`), a part with escaped codes, and the codes, most significant bit first. Shorter codes come
first, equally long ones by symbol.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from tersor.codec.coders import adaptive, static
from tersor.codec.coders.adaptive import Array, Data, Side
from tersor.codec.coders.native import native
from tersor.codec.coders.neighbours import Shape
from tersor.codec.coders.static import Alphabet, checked

_LONGEST = 12


def encode(codes: Array, shapes: Sequence[Shape]) -> bytes:
    """All `codes` (int32, flat) by one code; their layout does not matter."""
    if codes.size == 0:
        return b""
    symbols, alphabet, escaped = static.symbols_of(codes)
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet.size).tolist())
    flat = np.array([alphabet.size - 1, alphabet.escapes, *lengths], np.int32)
    side = adaptive.encode(flat, [Shape(1, 2), Shape(1, len(lengths))], mixed=False)
    compiled = native()
    bits = compiled.huffman_bits(symbols, lengths) if compiled else _bits(symbols, lengths)
    return static.part(side) + static.part(escaped) + bits


def decode(data: Data, shapes: Sequence[Shape], codes: Array) -> None:
    """Fills `codes` (flat). Raises ValueError for what no encoder writes."""
    compiled = native()
    if compiled is not None:
        compiled.huffman_decode(np.frombuffer(data, np.uint8), codes)
        return
    if codes.size == 0:
        if data:
            raise ValueError("goes on after its last symbol")
        return
    first, rest = static.parted(data)
    escaped, bits = static.parted(rest)
    side = Side(first)
    header = side.row(2)
    size = checked(header[0], 0, static.MOST_SYMBOLS - 1, "holds too many symbols") + 1
    alphabet = Alphabet(size, bool(checked(header[1], 0, 1, "holds an unknown flag")))
    lengths = [checked(n, 0, _LONGEST, "has a code too long") for n in side.row(size)]
    side.finish()
    wide = static.unfolded(_symbols(bits, lengths, codes.size))
    static.put_escaped(wide, alphabet, escaped)
    limits = np.iinfo(codes.dtype)
    if wide.min() < limits.min or wide.max() > limits.max:
        raise ValueError("holds a code too large for its type")
    codes[:] = wide


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Of a Huffman code; where one would be longer than 12 bits, small counts are raised first."""
    while True:
        lengths = _unlimited(counts)
        if max(lengths) <= _LONGEST:
            return lengths
        counts = [(count + 1) // 2 + (count > 0) for count in counts]


def _unlimited(counts: Sequence[int]) -> list[int]:
    lengths = [0] * len(counts)
    heap = [(count, i, [i]) for i, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
        return lengths
    heapq.heapify(heap)
    while len(heap) > 1:
        one, two = heapq.heappop(heap), heapq.heappop(heap)
        for i in one[2] + two[2]:
            lengths[i] += 1
        heapq.heappush(heap, (one[0] + two[0], min(one[1], two[1]), one[2] + two[2]))
    return lengths


def _canonical(lengths: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Symbol -> (length, code)."""
    codes: dict[int, tuple[int, int]] = {}
    following = used = 0
    for length in range(1, _LONGEST + 1):
        following <<= 1
        for symbol, found in enumerate(lengths):
            if found == length:
                codes[symbol] = (length, following)
                following += 1
                used += 1 << (_LONGEST - length)
    single = list(codes.values()) == [(1, 0)]
    if used != 1 << _LONGEST and not single:
        raise ValueError("holds an incomplete Huffman code")
    return codes


def _bits(symbols: Array, lengths: Sequence[int]) -> bytes:
    codes = {symbol: f"{code:0{n}b}" for symbol, (n, code) in _canonical(lengths).items()}
    text = "".join(codes[symbol] for symbol in symbols.tolist())
    return np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0")).tobytes()


def _symbols(data: Data, lengths: Sequence[int], count: int) -> Array:
    by_code = {pair: symbol for symbol, pair in _canonical(lengths).items()}
    bits = np.unpackbits(np.frombuffer(data, np.uint8)).tolist()
    found, at = [], 0
    for _ in range(count):
        length = code = 0
        while (length, code) not in by_code:
            # Missing bits are zeros until the end shows how many there were.
            code = code << 1 | (bits[at] if at < len(bits) else 0)
            at, length = at + 1, length + 1
            if length > _LONGEST:
                raise ValueError("holds bits that are no code")
        found.append(by_code[length, code])
    if (at + 7) // 8 != len(data):
        raise ValueError("is shorter or longer than its codes")
    if any(bits[at:]):
        raise ValueError("ends in bits that are no code")
    return np.array(found)
