"""A weight predicted from those before it in its row, by what the rows above taught.

Stochastic Gram-Schmidt: each weight is taken apart into what the weights before it predict and the
rest, its innovation. Innovations are next to uncorrelated, so the coefficient of each can be
learned without regard to the others. Kernels come first: a weight is predicted from its own kernel,
by coefficients that all kernels share; what is left is predicted from what was left at the same
place of the kernels before it in the row, by coefficients of its own column. All in integers, and
with none of the rounding of floats.
"""

import numpy as np

from tersor.codec.coders.neighbours import CAP, UNIT, Shape, clamp

MOST_SCALE = 12
_WINDOW, _TAPS, _MOST_TAPS = 768, 24, 64
# A coefficient is held back as by this many rows for each column.
_CAUTION = 3
_USUAL = 160_000  # mean square of scaled weights, before any is known
_MOST_TAP = 1 << 20
_LEAST, _MOST = -32767, 32767


def scale_for(codes: list[int]) -> int:
    """Weights are scaled by 2**scale so that their mean magnitude is about 384."""
    total = sum(2 * min(abs(code), CAP) for code in codes)
    scale = 0
    while scale < MOST_SCALE and total << scale < 256 * len(codes):
        scale += 1
    return scale


class Linear:
    """Predicts the weights of a matrix one by one; all are half steps times 2**scale."""

    def __init__(self, shape: Shape, scale: int) -> None:
        kernel = self._kernel = shape.kernel
        self._scale = scale
        self._taps = min(kernel - 1, _TAPS) if kernel <= _MOST_TAPS else 0
        channels = shape.columns // kernel
        # Few rows teach little, and a small matrix must not ask for a large memory.
        window = min(channels, _WINDOW, 4 * (min(shape.rows, _WINDOW) - 1))
        window = self._window = -(-window // 16) * 16
        self._caution = _CAUTION * min(channels, _WINDOW)
        # Of channel c and the channel c - window + i; before the first channel lie zeros.
        self._by_column = np.zeros((channels, window), np.int64)
        self._innovations = np.zeros((kernel, window + channels), np.int64)
        self._gains = np.zeros((kernel, window + channels), np.int64)
        self._energies = [0] * channels
        self._by_tap = [[0] * kernel for _ in range(kernel if self._taps else 0)]
        self._tap_innovations = [0] * kernel
        self._tap_gains = [0] * kernel
        self._tap_energies = [0] * kernel
        self._energy, self._count, self._usual = 0, 0, _USUAL

    def predict(self, column: int) -> int:
        """The weight at a column, in units of magnitudes."""
        self._channel, self._place = divmod(column, self._kernel)
        if column == 0 and self._count:
            self._usual = self._energy // self._count + 1
        first = max(0, self._place - self._taps)
        self._before = range(first, self._place) if self._taps else range(0)
        taps = sum(self._by_tap[self._place][i] * self._tap_innovations[i] for i in self._before)
        self._from_taps = taps >> 16
        self._known = slice(self._channel, self._channel + self._window)
        known = self._innovations[self._place, self._known]
        total = int(self._by_column[self._channel] @ known)
        # The sum is kept in 32 bits.
        self._from_channels = ((total + 2**31) % 2**32 - 2**31) >> 15
        return ((self._from_taps + self._from_channels) * (UNIT // 2)) >> self._scale

    def add(self, halves: int) -> None:
        """The weight at the column that was predicted."""
        place, channel = self._place, self._channel
        own = clamp((halves << self._scale) - self._from_taps, _LEAST, _MOST)
        rest = clamp(own - self._from_channels, _LEAST, _MOST)
        if self._taps:
            self._learn_taps(own)
        gains = self._gains[place, self._known]
        row = self._by_column[channel]
        np.clip(row + ((gains * rest + (1 << 14)) >> 15), -32768, 32767, out=row)
        self._energies[channel] += rest * rest
        gain = _divided(rest << 30, self._usual * self._caution + self._energies[channel])
        self._innovations[place, self._window + channel] = rest
        self._gains[place, self._window + channel] = clamp(gain, _LEAST, _MOST)
        self._energy += own * own
        self._count += 1

    def _learn_taps(self, own: int) -> None:
        place = self._place
        taps = self._by_tap[place]
        for i in self._before:
            step = (own * self._tap_gains[i] + (1 << 15)) >> 16
            taps[i] = clamp(taps[i] + step, -_MOST_TAP, _MOST_TAP)
        self._tap_innovations[place] = own
        self._tap_energies[place] += own * own
        caution = self._usual * _CAUTION * self._kernel
        self._tap_gains[place] = _divided(own << 32, caution + self._tap_energies[place])


def _divided(value: int, by: int) -> int:
    """Rounded towards zero."""
    return value // by if value >= 0 else -(-value // by)
