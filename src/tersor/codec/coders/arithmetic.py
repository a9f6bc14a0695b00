"""Binary range coder: 64-bit range, renormalised by 32 bits, 16-bit probabilities of a one.

A stream is the shortest row of bytes that, followed by zeros without end, names a number in the
last range. It holds no length: its reader knows how many bits to expect.
"""

from typing import Protocol

_BITS = 16
_BOTTOM = 1 << 32
_FULL = 2**64 - 1
MOST_PLAIN = 16
"""Bits of equal chance that are coded at once."""


class BitCoder(Protocol):
    """Codes bits; a decoder ignores what it is given and returns what it finds."""

    decodes: bool

    def code(self, bit: int, probability: int) -> int:
        """The bit, whose probability to be one is `probability` of 65536 (1 to 65535)."""
        ...

    def plain(self, value: int, count: int) -> int:
        """The lowest `count` bits of a number, at most 16, all values alike."""
        ...


def _shortest(low: int, width: int) -> int:
    """How far above `low` the number below low + width lies that ends in the most zeros."""
    return next(up for zeros in range(64, -1, -1) if (up := -low & ((1 << zeros) - 1)) < width)


class RangeEncoder:
    """Bits to bytes."""

    decodes = False

    def __init__(self) -> None:
        self._out = bytearray()
        self._low, self._range = 0, _FULL

    def code(self, bit: int, probability: int) -> int:
        bound = (self._range >> _BITS) * probability
        if bit:
            self._range = bound
        else:
            self._raise(bound)
            self._range -= bound
        self._renormalise()
        return bit

    def plain(self, value: int, count: int) -> int:
        value &= (1 << count) - 1
        self._range >>= count
        self._raise(self._range * value)
        self._renormalise()
        return value

    def finish(self) -> bytes:
        """The stream."""
        self._raise(_shortest(self._low, self._range))
        self._shift()
        self._shift()
        return bytes(self._out).rstrip(b"\0")

    def _raise(self, more: int) -> None:
        self._low += more
        if self._low <= _FULL:
            return
        self._low &= _FULL
        i = len(self._out) - 1
        while i >= 0:
            self._out[i] = (self._out[i] + 1) & 255
            if self._out[i]:
                break
            i -= 1

    def _renormalise(self) -> None:
        if self._range < _BOTTOM:
            self._shift()

    def _shift(self) -> None:
        self._out += (self._low >> 32).to_bytes(4, "big")
        self._low = (self._low << 32) & _FULL
        self._range <<= 32


class RangeDecoder:
    """Bytes to bits. After the last byte it reads zeros."""

    decodes = True

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 8
        self._code = int.from_bytes(data[:8].ljust(8, b"\0"), "big")
        self._range = _FULL

    def code(self, bit: int, probability: int) -> int:
        bound = (self._range >> _BITS) * probability
        bit = int(self._code < bound)
        if bit:
            self._range = bound
        else:
            self._code -= bound
            self._range -= bound
        self._renormalise()
        return bit

    def plain(self, value: int, count: int) -> int:
        self._range >>= count
        # No encoder's bytes go beyond the largest value.
        value = min(self._code // self._range, (1 << count) - 1)
        self._code -= value * self._range
        self._renormalise()
        return value

    def finish(self) -> None:
        """Refuses bytes that the encoder would not have written."""
        window = self._data[self._position - 8 : self._position].ljust(8, b"\0")
        low = int.from_bytes(window, "big") - self._code
        ends = self._code == _shortest(low, self._range)
        if self._position < len(self._data) or not ends:
            raise ValueError("goes on after its last symbol")
        if self._data.endswith(b"\0"):
            raise ValueError("ends in a zero byte")

    def _renormalise(self) -> None:
        if self._range < _BOTTOM:
            more = self._data[self._position : self._position + 4].ljust(4, b"\0")
            self._code = ((self._code << 32) | int.from_bytes(more, "big")) & _FULL
            self._range <<= 32
            self._position += 4
