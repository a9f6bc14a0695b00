"""Adaptive probabilities of a bit, and the logistic function in integers."""

from tersor.codec.coders.arithmetic import BitCoder

LOGIT = 2047
"""The largest logit, in 1/256."""


class Probability:
    """The probability of a one, of 65536: 1 to 65534.

    Each bit seen moves it towards that bit by `rate` of 65536, which falls from 1/2 to 1/181.
    """

    __slots__ = ("rate", "value")

    def __init__(self) -> None:
        self.value = self.rate = 32768

    def update(self, bit: int) -> None:
        """Moves it towards `bit`."""
        gap = self.value ^ (65535 if bit else 0)
        gap -= (gap * self.rate) >> 16
        self.value = gap ^ (65535 if bit else 0)
        self.rate -= (self.rate * self.rate) >> 17


def code(coder: BitCoder, bit: int, chance: Probability) -> int:
    """The bit, and `chance` learns from it."""
    bit = coder.code(bit, chance.value)
    chance.update(bit)
    return bit


def _logistic() -> tuple[list[int], list[int]]:
    one, decay = 1 << 32, 4278222846  # exp(-1 / 256) of 2**32
    power = [one]
    for _ in range(2048):
        power.append((power[-1] * decay) >> 32)
    squashed = []
    for x in range(-2048, 2048):
        p = (65536 << 32) // (one + power[abs(x)])
        squashed.append(65536 - p if x < 0 else p)
    stretched, i = [], 0
    for p in range(4096):
        while i < 4095 and squashed[i] < p * 16 + 8:
            i += 1
        stretched.append(min(max(i - 2048, -LOGIT), LOGIT))
    return squashed, stretched


SQUASHED, _STRETCHED = _logistic()


def squash(logit: int) -> int:
    """65536 / (1 + exp(-logit / 256)); |logit| <= 2047."""
    return SQUASHED[logit + 2048]


def stretch(probability: int) -> int:
    """The inverse of `squash`."""
    return _STRETCHED[probability >> 4]
