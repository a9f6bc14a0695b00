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


class Neighbours:
    """A walk over a matrix, row by row.

    expected: the magnitude that running means of the row, the column and the place in the kernel,
        and the codes nearby, let expect
    lean: which sign and how large the codes beside it in the kernel let expect
    shift: how many low bits of the magnitude carry next to no information
    odd: which of the trellis's two quantizers the code at this column belongs to
    """

    def __init__(self, shape: Shape) -> None:
        self.kernel = max(1, shape.kernel)
        self.spatial = self.kernel > 1
        self._width = _WIDTHS.get(self.kernel, 0)
        self._columns = shape.columns
        self._pad = 2 * self.kernel + 4
        self._rows = [[0] * (shape.columns + self._pad + 1) for _ in range(3)]
        self._row = self.column = self._at = 0
        self._near = self._far = _START
        self._column = [0] * shape.columns
        self._channel = [_START] * self.kernel
        self._carried, self._fed = TRELLISES[shape.states]
        self._state = self.odd = 0

    def start_row(self, row: int) -> None:
        """Moves before a row, all rows above being known."""
        self._row = row
        self._rows = [[0] * len(self._rows[0]), *self._rows[:2]]
        self._near = self._far
        self._channel = [self._near] * self.kernel
        self._state = self.odd = 0

    def look(self, column: int) -> None:
        """Moves to a column of the row, all columns before it being known."""
        self.column, self._at = column, self._pad + column
        width = self._width
        self.position = column % self.kernel
        beside = self.position % width > 0 if width else self.kernel == 1 and column > 0
        below = width > 0 and self.position >= width
        self.previous = magnitude(self.here(1)) if column else self._near
        self.before = magnitude(self.here(2)) if column > 1 else self._near
        self.left = self.here(1) if beside else 0
        self.up = self.here(width) if below else 0
        self.diagonal = self.here(width + 1) if beside and below else 0
        self.other = self.here(width - 1) if below and self.position % width < width - 1 else 0
        upper = self.here(2 * width) if width and self.position >= 2 * width else 0
        self.lean = 4 * self.left + 4 * self.up - 2 * self.diagonal - upper
        self.upward = magnitude(self.up) if below else self.previous
        self.of_row, self.of_rows = self._near, self._far
        self.of_column = self._column[column] if self._row else self._near
        self.of_channel = self._channel[self.position] if self.spatial else self.of_column
        self.expected = self._expected()
        self._inverse = (1 << 20) // (self.expected + UNIT)
        self.shift = max(0, max(1, self.expected // UNIT).bit_length() - 2)

    def _expected(self) -> int:
        if not self.spatial:
            return (6 * self.of_rows + 8 * self.of_column + self.previous + self.before) >> 4
        running = 2 * self.of_row + 5 * self.of_column + self.of_channel
        return (running + 3 * self.previous + self.before + 4 * self.upward) >> 4

    def add(self, code: int) -> None:
        """The code at the column looked at."""
        # The weight that the code stands for: k, or with `odd` half a step nearer to zero.
        halves = 2 * clamp(code, -CAP, CAP)
        halves += self.odd * ((code < 0) - (code > 0))
        seen = magnitude(halves)
        self._rows[0][self._at] = halves
        self._state = self._state >> 1 ^ self.odd * self._carried ^ (code & 1) * self._fed
        self.odd = self._state & 1
        self._near += ((seen - self._near) * 26) >> 8
        self._far += ((seen - self._far) * 8) >> 8
        if self._row == 0:
            self._column[self.column] = (self.of_column + seen) >> 1
        else:
            rate = max(24 if self.spatial else 8, 256 // (self._row + 1))
            self._column[self.column] += ((seen - self.of_column) * rate) >> 8
        running = self._channel[self.position]
        self._channel[self.position] += ((seen - running) * 40) >> 8

    def here(self, back: int) -> int:
        """The weight in half steps `back` columns before in this row, 0 before its start."""
        return self._rows[0][self._at - back]

    def above(self, right: int = 0) -> int:
        """The weight in the row above, `right` columns to the right."""
        return self._rows[1][self._at + right]

    def two_above(self) -> int:
        """The weight two rows above."""
        return self._rows[2][self._at]

    def relative(self, total: int, scale: int, most: int) -> int:
        """A sum of weights against the magnitude expected, times `scale`, of at most `most`.

        One step is (expected + UNIT) / (8 * scale).
        """
        steps = min((abs(total) * scale * self._inverse) >> 17, most)
        return -steps if total < 0 else steps
