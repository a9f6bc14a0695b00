"""Adaptive probabilities of a bit, and the logistic function in integers."""

from tersor.codec.coders.arithmetic import BitCoder

_LIMIT = 254
_LEAST = 32
LOGIT = 2047
"""The largest logit, in 1/256."""


def _rates(least: int) -> list[int]:
    """Steps towards what was seen, of 65536: 1/2, 1/3, 1/4, ... down to 2**-least."""
    return [max(65536 // (n + 2), 65536 >> least) for n in range(_LIMIT + 1)]


_FAST, _SLOW = _rates(6), _rates(8)


class Probability:
    """Two estimates of the probability of a one, of 65536: one forgets fast, one slowly."""

    __slots__ = ("count", "fast", "slow")

    def __init__(self) -> None:
        self.fast = self.slow = 32768
        self.count = 0

    def value(self) -> int:
        """Their mean."""
        return (self.fast + self.slow) >> 1

    def update(self, bit: int) -> None:
        """Moves both towards `bit`."""
        target = 65535 if bit else 0
        self.fast += ((target - self.fast) * _FAST[self.count]) >> 16
        self.slow += ((target - self.slow) * _SLOW[self.count]) >> 16
        self.count = min(self.count + 1, _LIMIT)


def codable(value: int) -> int:
    """A probability of 65536 as one of 32768 that the range coder accepts."""
    return min(max(value >> 1, _LEAST), 32768 - _LEAST)


def code(coder: BitCoder, bit: int, chance: Probability) -> int:
    """The bit, and `chance` learns from it."""
    bit = coder.code(bit, codable(chance.value()))
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
