"""The model of the `max` profile: eight contexts, mixed by their logits.

Two mixers, chosen by what is coded and by what is expected, learn their weights from the error of
each prediction; a table then corrects their mixture by what came of it before. The scheme is that
of the paq family of compressors, in integers throughout.
"""

from tersor.codec.coders.arithmetic import BitCoder
from tersor.codec.coders.models import MOST_LEAN, MOST_LEVEL, Tail
from tersor.codec.coders.neighbours import CAP, UNIT, Neighbours, clamp, level, magnitude
from tersor.codec.coders.probability import (
    LOGIT,
    SQUASHED,
    Probability,
    codable,
    squash,
    stretch,
)

_FIRST = (0, 64, 1088, 5184, 9280, 10304, 11136, 12160)
_SLOTS = 13184
_MOST_WEIGHT = 65535


class Mixed:
    """Tables of probabilities grow as contexts are met."""

    def __init__(self, coder: BitCoder) -> None:
        self.tail = Tail(coder)
        self._coder = coder
        self._chances: dict[int, Probability] = {}
        self._mixers: dict[int, list[int]] = {}
        self._corrections: dict[int, list[int]] = {}

    def look(self, near: Neighbours) -> None:
        expected = near.expected
        most = self._level = level(expected, 4, MOST_LEVEL)
        row = near.of_row if near.spatial else near.of_rows
        second = near.here(near.kernel) if near.spatial else near.two_above()
        around = magnitude(near.above(-1)) + magnitude(near.above(1))
        place = min(near.position, 24) if near.spatial else level(around, 2, 31)
        corner = magnitude(near.diagonal) + magnitude(near.other)
        further = magnitude(near.here(3)) + magnitude(near.here(4))
        contexts = (
            most,
            level(row, 2, 31) * 32 + level(near.of_column, 2, 31),
            _three(near.previous, near.upward) + level(near.before, 2, 15),
            _three(magnitude(near.above()), magnitude(second)) + min(15, most // 3),
            place * 32 + most // 2,
            abs(near.relative(near.lean, 2, MOST_LEAN)) * 64 + most,
            level(corner, 2, 31) * 32 + level(expected, 2, 31)
            if near.spatial
            else level(further, 2, 15) * 64 + most,
            level(near.of_channel, 2, 31) * 32 + level(near.of_rows, 2, 31),
        )
        start = near.odd * _SLOTS
        self._slots = [(start + first + c) * 16 for first, c in zip(_FIRST, contexts, strict=True)]
        self._correction = (near.odd * 64 + most) * 16
        self._mixer = near.spatial * 128 + min(near.shift, 7)

    def flag(self, i: int, value: int) -> int:
        inputs = [slot + i for slot in self._slots]
        mixers = (self._mixer + i * 8, 256 + self._level * 16 + i)
        return self._mix(value, inputs, mixers, self._correction + i)

    def sign(self, near: Neighbours, value: int, size: int) -> int:
        beyond = min(size, 4) - 1
        lean = near.relative(near.lean, 2, MOST_LEAN) + MOST_LEAN
        if near.spatial:
            contexts = _spatial_signs(near, size, beyond, lean)
        else:
            above = _side(near.above())
            contexts = [
                (_side(near.left) * 3 + above) * 3 + _side(near.two_above()),
                near.column % 1024,
                _side(near.above(-1)) * 3 + _side(near.above(1)),
                *[0] * 5,
            ]
        # Beyond the slots of all flags.
        inputs = [2**20 + j * 1024 + context for j, context in enumerate(contexts)]
        place = near.spatial * 32 + min(near.position, 24)
        mixers = (1280 + near.spatial * 4 + beyond, 1288 + place)
        return self._mix(value, inputs, mixers, 2048 + near.spatial * 32 + lean)

    def _mix(self, bit: int, inputs: list[int], mixers: tuple[int, int], correction: int) -> int:
        chances = [self._chances.setdefault(i, Probability()) for i in inputs]
        logits = [stretch(chance.value()) for chance in chances]
        weights = [self._mixers.setdefault(i, [4096] * 8) for i in mixers]
        each = [_dot(weight, logits) for weight in weights]
        both = sum(each) >> 1
        place = (both + 2048) * 32
        lower, share = place >> 12, place & 4095
        if correction not in self._corrections:
            self._corrections[correction] = [SQUASHED[min(4095, i * 128)] for i in range(33)]
        cells = self._corrections[correction]
        corrected = (cells[lower] * (4096 - share) + cells[lower + 1] * share) >> 12
        bit = self._coder.code(bit, codable((corrected + squash(both)) >> 1))
        target = 65535 if bit else 0
        for weight, logit in zip(weights, each, strict=True):
            _learn(weight, logits, target - squash(logit))
        for chance in chances:
            chance.update(bit)
        nearest = lower + (share >= 2048)
        cells[nearest] += (target - cells[nearest]) >> 7
        return bit


def _three(one: int, two: int) -> int:
    return (level(one, 2, 15) * 16 + level(two, 2, 15)) * 16


def _spatial_signs(near: Neighbours, size: int, beyond: int, lean: int) -> list[int]:
    above, twice, channel = near.above(), near.two_above(), near.here(near.kernel)
    kernels = channel + near.here(2 * near.kernel)

    def third(code: int) -> int:
        return near.relative(code * 3, 1, 3) + 3

    ratio = level(min(size, CAP) * UNIT, 1, 31) - level(near.expected, 1, 31) + 1
    # Towards zero, not down.
    half = (lean - MOST_LEAN) // 2 if lean >= MOST_LEAN else -((MOST_LEAN - lean) // 2)
    sides = (_side(near.left) * 3 + _side(near.up)) * 3 + _side(near.diagonal)
    return [
        lean * 4 + beyond,
        (sides * 3 + _side(near.other)) * 4 + beyond,
        ((_side(above) * 3 + _side(channel)) * 3 + _side(twice)) * 4 + beyond,
        (min(near.position, 24) * 7 + clamp(half, -3, 3) + 3) * 4 + beyond,
        (third(near.left) * 7 + third(near.up)) * 7 + third(near.diagonal),
        (third(near.here(1)) * 7 + third(channel)) * 7 + third(above),
        (lean * 4 + clamp(ratio, 0, 3)) * 4 + near.shift % 4,
        (near.relative(above + twice + kernels, 2, 12) + 12) * 4 + beyond,
    ]


def _side(code: int) -> int:
    return (code > 0) + 2 * (code < 0)


def _dot(weights: list[int], logits: list[int]) -> int:
    total = sum(w * x for w, x in zip(weights, logits, strict=True))
    return clamp(total >> 14, -LOGIT, LOGIT)


def _learn(weights: list[int], logits: list[int], error: int) -> None:
    for j, logit in enumerate(logits):
        step = (logit * error + (1 << 16)) >> 17
        weights[j] = clamp(weights[j] + step, -_MOST_WEIGHT, _MOST_WEIGHT)
