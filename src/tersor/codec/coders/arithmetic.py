"""Binary range coder: 32-bit range, bytewise renormalisation, 15-bit probabilities of a one.

A stream is the shortest row of bytes that, followed by zeros without end, names a number in the
last range. It holds no length: its reader knows how many bits to expect.
"""

from typing import Protocol

HALF = 1 << 14
_BITS = 15
_BOTTOM = 1 << 24
_FULL = 2**32 - 1


class BitCoder(Protocol):
    """Codes bits; the decoder ignores the bit it is given and returns the one it finds."""

    decodes: bool

    def code(self, bit: int, probability: int) -> int:
        """The bit, whose probability to be one is `probability` of 32768 (1 to 32767)."""
        ...


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
            self._low += bound
            self._range -= bound
            self._carry()
        while self._range < _BOTTOM:
            self._shift()
        return bit

    def finish(self) -> bytes:
        """The stream."""
        for zeros in range(32, -1, -1):
            mask = (1 << zeros) - 1
            value = (self._low + mask) & ~mask
            if value < self._low + self._range:
                self._low = value
                break
        self._carry()
        for _ in range(4):
            self._shift()
        return bytes(self._out).rstrip(b"\0")

    def _carry(self) -> None:
        if self._low <= _FULL:
            return
        self._low &= _FULL
        i = len(self._out) - 1
        while i >= 0:
            self._out[i] = (self._out[i] + 1) & 255
            if self._out[i]:
                break
            i -= 1

    def _shift(self) -> None:
        self._out.append(self._low >> 24)
        self._low = (self._low << 8) & _FULL
        self._range <<= 8


class RangeDecoder:
    """Bytes to bits. After the last byte it reads zeros."""

    decodes = True

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 4
        self._code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self._range = _FULL

    def code(self, bit: int, probability: int) -> int:
        bound = (self._range >> _BITS) * probability
        bit = int(self._code < bound)
        if bit:
            self._range = bound
        else:
            self._code -= bound
            self._range -= bound
        while self._range < _BOTTOM:
            more = self._data[self._position] if self._position < len(self._data) else 0
            self._code = ((self._code << 8) | more) & _FULL
            self._range <<= 8
            self._position += 1
        return bit

    def finish(self) -> None:
        """Refuses bytes that the encoder would not have written."""
        if self._position < len(self._data):
            raise ValueError("goes on after its last symbol")
        if self._data.endswith(b"\0"):
            raise ValueError("ends in a zero byte")
