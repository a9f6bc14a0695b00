"""What the codes already known say about the next one."""

from typing import NamedTuple

CAP = 4095
"""Magnitudes above are taken for this one."""
UNIT = 16
"""Of expected magnitudes."""
_START = 4 * UNIT
_WIDTHS = {9: 3, 25: 5, 49: 7}
TRELLISES = {
    1: (0, 0),
    4: (0b10, 0b01),
    8: (0b101, 0b010),
    16: (0b1001, 0b0010),
    32: (0b10010, 0b00100),
    64: (0b100001, 0b001010),
}
"""Of each number of states: what is added to a halved state whose lowest bit was set, and what for
an odd code."""


class Shape(NamedTuple):
    """Of a matrix of codes; `kernel` neighbouring columns belong to one input channel.

    states: of the trellis that runs along each row from state 0; 1 for none. The lowest bit of the
        state says which weight, in steps of the union, a code k stands for: 2k, or 2k - sign(k)
    """

    rows: int
    columns: int
    kernel: int = 1
    states: int = 1

    @property
    def size(self) -> int:
        """Number of codes."""
        return self.rows * self.columns


def clamp(value: int, low: int, high: int) -> int:
    """The nearest number from low to high."""
    return min(max(value, low), high)


def level(magnitude: int, resolution: int, most: int) -> int:
    """Logarithm of a magnitude, `resolution` to an octave."""
    e = magnitude + 2
    octave = e.bit_length() - 1
    fraction = ((e << 5) >> octave) & 31
    return clamp(octave * resolution + ((fraction * resolution) >> 5) - resolution, 0, most)


def magnitude(halves: int) -> int:
    """Of a weight in half steps, as rows are kept, in units of expected magnitudes."""
    return abs(halves) * (UNIT // 2)


class Mean:
    """A running mean of magnitudes, with four more bits."""

    __slots__ = ("_sum",)

    def __init__(self, total: int = _START * 16) -> None:
        self._sum = total

    def copy(self) -> "Mean":
        """One that goes on from here."""
        return Mean(self._sum)

    def now(self) -> int:
        """Rounded down."""
        return self._sum >> 4

    def add(self, value: int, rate: int) -> None:
        """Moves it towards `value` by `rate` of 256."""
        self._sum += ((value * 16 - self._sum) * rate) >> 8


class Neighbours:
    """A walk over a matrix, row by row.

    expected: the magnitude that running means of the row and the column, and the codes nearby, let
        expect
    missed_row, missed_column: running means of how far predictions were from the weights
    lean: which sign and how large the codes beside it in the kernel let expect
    shift: how many low bits of the magnitude carry next to no information
    odd: which of the trellis's two quantizers the code at this column belongs to
    halves: the weight added last, in half steps
    """

    def __init__(self, shape: Shape) -> None:
        self.kernel = shape.kernel
        self.spatial = self.kernel > 1
        self._width = _WIDTHS.get(self.kernel, 0)
        self._pad = 2 * self.kernel + 4
        self._rows = [[0] * (shape.columns + self._pad + 1) for _ in range(2)]
        self._row = self.column = self._at = self._early = self.halves = 0
        self._row_mean, self._recent, self._missed = Mean(), Mean(), Mean()
        self._columns = [(Mean(), Mean()) for _ in range(shape.columns)]
        self._carried, self._fed = TRELLISES[shape.states]
        self._state = self.odd = 0

    def start_row(self, row: int) -> None:
        """Moves before a row, all rows above being known."""
        self._row, self._early = row, 256 // (row + 2)
        self._rows = [[0] * len(self._rows[0]), self._rows[0]]
        self._state = self.odd = 0

    def look(self, column: int) -> None:
        """Moves to a column of the row, all columns before it being known."""
        self.column, self._at = column, self._pad + column
        if self._row == 0:
            self._columns[column] = (self._row_mean.copy(), self._missed.copy())
        seen, missed = self._columns[column]
        self.of_row, self.of_column = self._row_mean.now(), seen.now()
        self.missed_row, self.missed_column = self._missed.now(), missed.now()
        self.previous = magnitude(self.here(1)) if column else self.of_row
        self.position = column % self.kernel
        self.recent, self.upward = self.of_row, self.previous
        if self.spatial:
            self.recent = self._recent.now()
            self._look_around()
            running = 9 * self.of_row + 9 * self.of_column
            self.expected = (running + 6 * self.previous + 7 * self.upward) >> 5
        else:
            running = 15 * self.of_row + 12 * self.of_column
            self.expected = (running + magnitude(self.above(0))) >> 4
        self.inverse = (1 << 20) // (self.expected + UNIT)
        self.shift = max(0, max(1, self.expected // UNIT).bit_length() - 2)

    def _look_around(self) -> None:
        width = self._width
        beside = width > 0 and self.position % width > 0
        below = width > 0 and self.position >= width
        self.left = self.here(1) if beside else 0
        self.up = self.here(width) if below else 0
        self.diagonal = self.here(width + 1) if beside and below else 0
        self.other = self.here(width - 1) if below and self.position % width < width - 1 else 0
        upper = self.here(2 * width) if width and self.position >= 2 * width else 0
        self.lean = 4 * self.left + 4 * self.up - 2 * self.diagonal - upper
        self.upward = magnitude(self.up) if below else self.previous

    def add(self, code: int, predicted: int = 0) -> None:
        """The code at the column looked at, whose weight was predicted in units of magnitudes."""
        # The weight that the code stands for: k, or with `odd` half a step nearer to zero.
        halves = 2 * clamp(code, -CAP, CAP)
        halves += self.odd * ((code < 0) - (code > 0))
        self.halves = self._rows[0][self._at] = halves
        self._state = self._state >> 1 ^ self.odd * self._carried ^ (code & 1) * self._fed
        self.odd = self._state & 1
        self._row_mean.add(magnitude(halves), 6)
        self._recent.add(magnitude(halves), 120)
        gap = min(abs(halves * (UNIT // 2) - predicted), 2 * CAP * UNIT)
        self._missed.add(gap, 13)
        seen, missed = self._columns[self.column]
        seen.add(magnitude(halves), max(self._early, 6))
        missed.add(gap, max(self._early, 4))

    def here(self, back: int) -> int:
        """The weight in half steps `back` columns before in this row, 0 before its start."""
        return self._rows[0][self._at - back]

    def above(self, right: int) -> int:
        """The weight in the row above, `right` columns to the right."""
        return self._rows[1][self._at + right]

    def relative(self, value: int, scale: int, most: int) -> int:
        """A number against the magnitude expected, rounded, of at most `most`.

        One step is (expected + UNIT) / (8 * scale).
        """
        steps = min((abs(value) * self.inverse * scale + (1 << 16)) >> 17, most)
        return -steps if value < 0 else steps
