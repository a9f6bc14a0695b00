"""Integer codes as bits: a binarisation, and the model of the `small` profile.

A code is a magnitude and a sign. The magnitude is divided by 2**shift, where shift follows the
magnitude expected; the quotient is up to 14 flags ("larger still?") and an Exp-Golomb tail, the
remainder plain bits, of which the upper two are modelled. The sign follows the first flag, or the
remainder of a quotient of zero.
"""

from typing import Protocol

from tersor.codec.coders.arithmetic import MOST_PLAIN, BitCoder
from tersor.codec.coders.neighbours import Neighbours, Shape, level
from tersor.codec.coders.probability import Probability, code

FLAGS = 14
MOST_LEVEL = 63
MOST_LEAN = 12
MOST_CODE = 2**31 - 1
_SETTLED = 4500  # rate of a chance that has seen 24 bits
_TOO_LARGE = "holds a code of more than 32 bits"


class Tail:
    """What every model codes in the same, simple way."""

    def __init__(self, coder: BitCoder) -> None:
        self._coder = coder
        self._lengths = [Probability() for _ in range(33)]
        self._upper = [[Probability() for _ in range(3)] for _ in range(16)]

    def exp_golomb(self, value: int) -> int:
        """A number >= 0 as the length of its binary form and that form."""
        length = (value + 1).bit_length() - 1
        i = 0
        while code(self._coder, int(i < length), self._lengths[i]):
            i += 1
            if i == 32:
                raise ValueError(_TOO_LARGE)
        upper = max(0, i - MOST_PLAIN)
        lower = i - upper
        found = 1 << upper | self._coder.plain((value + 1) >> lower, upper)
        return (found << lower | self._coder.plain(value + 1, lower)) - 1

    def remainder(self, value: int, quotient: int, shift: int) -> int:
        """The lowest `shift` bits of `value`."""
        if shift == 0:
            return 0
        upper = self._upper[min(quotient, 15)]
        found = code(self._coder, value >> (shift - 1) & 1, upper[0])
        if shift == 1:
            return found
        found = found << 1 | code(self._coder, value >> (shift - 2) & 1, upper[1 + found])
        return found << (shift - 2) | self._coder.plain(value, shift - 2)


class Model(Protocol):
    """Codes what depends on the neighbours."""

    tail: Tail
    predicted: int
    """The weight expected, in units of magnitudes."""

    def start(self, codes: list[int], shape: Shape) -> None:
        """Prepares for a matrix."""
        ...

    def look(self, near: Neighbours) -> None:
        """Prepares for the code at the position of `near`."""
        ...

    def flag(self, i: int, value: int) -> int:
        """Whether the quotient is larger than i."""
        ...

    def sign(self, near: Neighbours, value: int) -> int:
        """Whether the code is negative."""
        ...

    def add(self, halves: int) -> None:
        """The weight, in half steps."""
        ...


class Small:
    """The magnitude expected from the neighbours is the context.

    Of small ones, whose codes are far from alike, a second one is the means of the row (in kernels:
    the codes before) and the column.
    """

    predicted = 0

    def __init__(self, coder: BitCoder) -> None:
        self.tail = Tail(coder)
        self._coder = coder
        # Tables grow as contexts are met.
        self._by_level: dict[tuple[int, int, int], Probability] = {}
        self._by_means: dict[tuple[int, int, int, int], Probability] = {}
        self._sign = Probability()
        self._by_column = [Probability() for _ in range(1024)]
        self._by_lean = [Probability() for _ in range(2 * MOST_LEAN + 1)]

    def start(self, codes: list[int], shape: Shape) -> None:
        pass

    def look(self, near: Neighbours) -> None:
        self._level = (near.odd, level(near.expected, 4, MOST_LEVEL))
        means = level(near.recent, 2, 15), level(near.of_column, 2, 15)
        self._means = None if near.shift else (near.odd, *means)

    def flag(self, i: int, value: int) -> int:
        one = self._by_level.setdefault((*self._level, i), Probability())
        if self._means is None:
            return code(self._coder, value, one)
        two = self._by_means.setdefault((*self._means, i), Probability())
        value = self._coder.code(value, (one.value + two.value) >> 1)
        one.update(value)
        two.update(value)
        return value

    def sign(self, near: Neighbours, value: int) -> int:
        if not near.spatial:
            return self._sign_of_column(near.column % 1024, value)
        lean = near.relative(near.lean, 2, MOST_LEAN) + MOST_LEAN
        return code(self._coder, value, self._by_lean[lean])

    def add(self, halves: int) -> None:
        pass

    def _sign_of_column(self, column: int, value: int) -> int:
        """By the chance of all columns, until a column has seen 24."""
        own = self._by_column[column]
        value = self._coder.code(value, (own if own.rate < _SETTLED else self._sign).value)
        self._sign.update(value)
        own.update(value)
        return value


def code_matrix(coder: BitCoder, model: Model, codes: list[int], shape: Shape) -> list[int]:
    """The codes of a matrix, row by row; a decoder ignores the `codes` it is given."""
    found: list[int] = []
    if not shape.size:
        return found
    model.start(codes, shape)
    near = Neighbours(shape)
    for row in range(shape.rows):
        near.start_row(row)
        for column in range(shape.columns):
            near.look(column)
            model.look(near)
            known = 0 if coder.decodes else codes[len(found)]
            found.append(_code(model, near, known))
            near.add(found[-1], model.predicted)
            model.add(near.halves)
    return found


def _code(model: Model, near: Neighbours, known: int) -> int:
    quotient = abs(known) >> near.shift
    size = negative = 0
    if model.flag(0, int(quotient > 0)):
        negative = model.sign(near, int(known < 0))
        size = 1
        while size < FLAGS and model.flag(size, int(quotient > size)):
            size += 1
        if size == FLAGS:
            size += model.tail.exp_golomb(quotient - FLAGS)
    inner = size == 0
    size = size << near.shift | model.tail.remainder(abs(known), size, near.shift)
    if size > MOST_CODE:
        raise ValueError(_TOO_LARGE)
    if inner and size:
        negative = model.sign(near, int(known < 0))
    return -size if negative else size
