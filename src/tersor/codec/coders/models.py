"""Integer codes as bits: a binarisation, and the model of the `small` profile.

A code is a magnitude and a sign. The magnitude is divided by 2**shift, where shift follows the
magnitude expected; the quotient is up to 14 flags ("larger still?") and an Exp-Golomb tail, the
remainder plain bits, of which the upper two are modelled. Zero is the first flag, clear.
"""

from typing import Protocol

from tersor.codec.coders.arithmetic import HALF, BitCoder
from tersor.codec.coders.neighbours import Neighbours, Shape, level
from tersor.codec.coders.probability import Probability, code

FLAGS = 14
MOST_LEVEL = 63
MOST_LEAN = 12
MOST_CODE = 2**31 - 1
_TOO_LARGE = "holds a code of more than 32 bits"


class Tail:
    """What every model codes in the same, simple way."""

    def __init__(self, coder: BitCoder) -> None:
        self._coder = coder
        self._lengths = [Probability() for _ in range(33)]
        self._upper = [[Probability(), Probability()] for _ in range(16)]

    def exp_golomb(self, value: int) -> int:
        """A number >= 0 as the length of its binary form and that form."""
        length = (value + 1).bit_length() - 1
        i = 0
        while code(self._coder, int(i < length), self._lengths[i]):
            i += 1
            if i == 32:
                raise ValueError(_TOO_LARGE)
        found = 1
        for j in range(i - 1, -1, -1):
            found = found << 1 | self._coder.code((value + 1) >> j & 1, HALF)
        return found - 1

    def remainder(self, value: int, quotient: int, shift: int) -> int:
        """The lowest `shift` bits of `value`."""
        found = 0
        for rank in range(shift):
            known = value >> (shift - 1 - rank) & 1
            if rank < 2:
                bit = code(self._coder, known, self._upper[min(quotient, 15)][rank])
            else:
                bit = self._coder.code(known, HALF)
            found = found << 1 | bit
        return found


class Model(Protocol):
    """Codes what depends on the neighbours."""

    tail: Tail

    def look(self, near: Neighbours) -> None:
        """Prepares for the code at the position of `near`."""
        ...

    def flag(self, i: int, value: int) -> int:
        """Whether the quotient is larger than i."""
        ...

    def sign(self, near: Neighbours, value: int, size: int) -> int:
        """Whether the code of magnitude `size` > 0 is negative."""
        ...


class Small:
    """One context: the magnitude expected from the neighbours, and the trellis's quantizer."""

    def __init__(self, coder: BitCoder) -> None:
        self.tail = Tail(coder)
        self._coder = coder
        self._chances = [
            [[Probability() for _ in range(16)] for _ in range(MOST_LEVEL + 1)] for _ in range(2)
        ]
        self._signs = [Probability() for _ in range(101)]

    def look(self, near: Neighbours) -> None:
        self._flags = self._chances[near.odd][level(near.expected, 4, MOST_LEVEL)]

    def flag(self, i: int, value: int) -> int:
        return code(self._coder, value, self._flags[i])

    def sign(self, near: Neighbours, value: int, size: int) -> int:
        lean = near.relative(near.lean, 2, MOST_LEAN) + MOST_LEAN
        context = lean * 4 + min(size, 4) - 1 if near.spatial else 100
        return code(self._coder, value, self._signs[context])


def code_matrix(coder: BitCoder, model: Model, codes: list[int], shape: Shape) -> list[int]:
    """The codes of a matrix, row by row; a decoder ignores the `codes` it is given."""
    near = Neighbours(shape)
    found: list[int] = []
    for row in range(shape.rows):
        near.start_row(row)
        for column in range(shape.columns):
            near.look(column)
            model.look(near)
            known = 0 if coder.decodes else codes[len(found)]
            found.append(_code(model, near, known))
            near.add(found[-1])
    return found


def _code(model: Model, near: Neighbours, known: int) -> int:
    quotient = abs(known) >> near.shift
    size = 0
    while size < FLAGS and model.flag(size, int(quotient > size)):
        size += 1
    if size == FLAGS:
        size += model.tail.exp_golomb(quotient - FLAGS)
    size = size << near.shift | model.tail.remainder(abs(known), size, near.shift)
    if size > MOST_CODE:
        raise ValueError(_TOO_LARGE)
    negative = size > 0 and model.sign(near, int(known < 0), size)
    return -size if negative else size
