"""The model of the `max` profile: six contexts and a linear prediction, mixed by their logits.

Two sets of weights, chosen by what is coded and by what is expected, learn from the error of each
prediction; a table then corrects their mixture by what came of it before. The scheme is that of the
paq family of compressors, in integers throughout.
"""

from tersor.codec.coders.arithmetic import BitCoder
from tersor.codec.coders.linear import MOST_SCALE, Linear, scale_for
from tersor.codec.coders.models import MOST_LEVEL, Tail
from tersor.codec.coders.neighbours import CAP, UNIT, Neighbours, Shape, clamp, level, magnitude
from tersor.codec.coders.probability import LOGIT, SQUASHED, Probability, squash, stretch

_SLOTS = 10752
_AIMS = 15
_LEAST = 16  # of 65536: no bit is taken for more certain than this


class Mixed:
    """Tables of probabilities grow as contexts are met."""

    def __init__(self, coder: BitCoder) -> None:
        self.tail = Tail(coder)
        self.predicted = 0
        self._coder = coder
        self._chances: dict[int, Probability] = {}
        self._mixers: dict[int, list[int]] = {}
        self._corrections: dict[int, list[int]] = {}

    def start(self, codes: list[int], shape: Shape) -> None:
        """A matrix begins with the scale of its weights, in four bits."""
        scale = self._coder.plain(0 if self._coder.decodes else scale_for(codes), 4)
        if scale > MOST_SCALE:
            raise ValueError("scales its weights too much")
        self._linear = Linear(shape, scale)

    def look(self, near: Neighbours) -> None:
        most = self._level = level(near.expected, 4, MOST_LEVEL)
        predicted = self._linear.predict(near.column)
        self.predicted = clamp(predicted, -2 * CAP * UNIT, 2 * CAP * UNIT)
        # The weight predicted, against the magnitude expected.
        self._aim = near.relative(self.predicted, 1, _AIMS)
        self._finely = near.relative(self.predicted, 2, 2 * _AIMS)
        around = magnitude(near.above(-1)) + magnitude(near.above(1))
        self._place = min(near.position, 24) if near.spatial else level(around, 2, 31)
        three = level(near.previous, 2, 15) * 16 + level(near.upward, 2, 15)
        self._contexts = [
            most,
            64 + level(near.missed_row, 2, 31) * 32 + level(near.missed_column, 2, 31),
            1088 + three * 16 + level(magnitude(near.here(2)), 2, 15),
            5184 + self._place * 32 + most // 2,
            6208 + abs(self._aim) * 64 + most,
            9216 + abs(self._finely) * 16 + min(15, most // 3),
        ]
        self._odd = near.odd
        self._mixer = near.spatial * 128 + min(near.shift, 7)
        self._correction = (near.odd * 64 + abs(self._aim)) * 16

    def flag(self, i: int, value: int) -> int:
        inputs = [(self._odd * _SLOTS + context) * 16 + i for context in self._contexts]
        mixers = (self._mixer + i * 8, 256 + self._level * 16 + i)
        return self._mix(value, inputs, mixers, self._correction + i)

    def sign(self, near: Neighbours, value: int) -> int:
        aim = self._aim + _AIMS
        around = near.column % 1024
        if near.spatial:
            around = (_side(near.left) * 3 + _side(near.up)) * 3 + _side(near.diagonal)
            around = around * 3 + _side(near.other)
        fine = (self._finely + 2 * _AIMS) * 16 + min(15, self._level // 4)
        contexts = (around, self._odd * 32 + aim, fine, self._place * 32 + aim)
        # Beyond the slots of all flags.
        inputs = [2**20 + j * 1024 + context for j, context in enumerate(contexts)]
        mixers = (1280 + near.spatial, 1282 + near.spatial * 32 + self._place)
        value = self._mix(value, inputs, mixers, 2048 + near.spatial * 32 + aim)
        # From here on it says on which side of the prediction larger codes lie.
        size = (-self._aim if value else self._aim) + _AIMS
        finely = (-self._finely if value else self._finely) + 2 * _AIMS
        self._contexts[4] = 6208 + (16 + size) * 64 + self._level
        self._contexts[5] = 9216 + (31 + finely) * 16 + min(15, self._level // 3)
        self._correction = (self._odd * 64 + 16 + size) * 16
        return value

    def add(self, halves: int) -> None:
        self._linear.add(halves)

    def _mix(self, bit: int, inputs: list[int], mixers: tuple[int, int], correction: int) -> int:
        chances = [self._chances.setdefault(i, Probability()) for i in inputs]
        logits = [stretch(chance.value) for chance in chances]
        weights = [self._mixers.setdefault(i, [4096] * len(inputs)) for i in mixers]
        both = _mixed(weights, logits)
        place = (both + 2048) * 32
        lower, share = place >> 12, place & 4095
        if correction not in self._corrections:
            self._corrections[correction] = [SQUASHED[min(4095, i * 128)] for i in range(33)]
        cells = self._corrections[correction]
        corrected = (cells[lower] * (4096 - share) + cells[lower + 1] * share) >> 12
        chance = clamp((corrected + squash(both)) >> 1, _LEAST, 65536 - _LEAST)
        bit = self._coder.code(bit, chance)
        target = 65535 if bit else 0
        for weight in weights:
            _learn(weight, logits, (target - squash(both)) >> 2)
        for each in chances:
            each.update(bit)
        nearest = lower + (share >= 2048)
        cells[nearest] += (target - cells[nearest]) >> 7
        return bit


def _side(code: int) -> int:
    return (code > 0) + 2 * (code < 0)


def _mixed(weights: list[list[int]], logits: list[int]) -> int:
    """The logit that the sum of the weights (1 is 2**15) makes of the inputs."""
    total = sum(w * x for weight in weights for w, x in zip(weight, logits, strict=True))
    return clamp(total >> 15, -LOGIT, LOGIT)


def _learn(weights: list[int], logits: list[int], error: int) -> None:
    for j, logit in enumerate(logits):
        step = (((2 * logit * error) >> 16) + 1) >> 1
        weights[j] = clamp(weights[j] + step, -32768, 32767)
