"""Models know of trellises, kernels, scales and what rows have in common, in both languages."""

import numpy as np
import pytest

from codec.languages import compiled, in_python
from tersor.codec import coders
from tersor.codec.coders import Shape, linear, native, neighbours


def correlated(rows, columns, seed=0):
    """Rows of which a third of the variance lies in four directions."""
    random = np.random.default_rng(seed)
    shared = random.normal(0, 1, (rows, 4)) @ random.normal(0, 1, (4, columns))
    return np.rint(2 * (shared / 2 + random.normal(0, 1.5, (rows, columns)))).astype(np.int32)


@compiled
@pytest.mark.parametrize(("rows", "columns", "kernel"), [(40, 60, 1), (9, 200, 1), (25, 81, 9)])
def test_both_languages_predict_the_same(rows, columns, kernel):
    codes = correlated(rows, columns)
    codes[3] *= 2000
    for states in (1, 8):

        def encode(states=states):
            return coders.encode(codes, profile="max", kernel=kernel, states=states)

        assert in_python(encode) == encode()


@compiled
@pytest.mark.parametrize("profile", ["fast", "small", "max"])
def test_every_path_of_the_processor_gives_the_same_bytes(profile):
    codes = correlated(1500, 100)
    stream = coders.encode(codes, profile=profile)
    before = native.native().use_wide(False)
    try:
        assert coders.encode(codes, profile=profile) == stream
        assert np.array_equal(coders.decode(stream, codes.shape, profile=profile), codes)
    finally:
        native.native().use_wide(before)
    assert np.array_equal(coders.decode(stream, codes.shape, profile=profile), codes)


def test_rows_that_resemble_each_other_cost_less_than_shuffled_columns():
    codes = correlated(2000, 100)
    shuffled = np.random.default_rng(1).permuted(codes, axis=0)
    for profile, most in (("small", 1.01), ("max", 0.97)):
        together = len(coders.encode(codes, profile=profile))
        assert together < most * len(coders.encode(shuffled, profile=profile))


@pytest.mark.parametrize(("kernel", "channels"), [(1, 300), (9, 70), (70, 60)])
def test_a_prediction_is_what_the_definition_says(kernel, channels):
    # Innovations, coefficients and gains as in the module's text, in floats and in one loop each.
    random = np.random.default_rng(5)
    weights = random.integers(-9, 10, (5, channels * kernel)) * 2
    near = linear.Linear(Shape(5, channels * kernel, kernel), 5)
    by_channel, by_tap = np.zeros((channels, channels)), np.zeros((kernel, kernel))
    energy, tap_energy = np.zeros(channels), np.zeros(kernel)
    usual, squares = 160_000.0, []
    for row in weights:
        usual = np.mean(squares) if squares else usual
        rest, own = np.zeros((channels, kernel)), np.zeros(kernel)
        gains, tap_gains = np.zeros((channels, kernel)), np.zeros(kernel)
        for column, weight in enumerate(row):
            c, p = divmod(column, kernel)
            taps = by_tap[p, :p] @ own[:p] if kernel <= 64 else 0
            before = slice(max(0, c - 16), c)  # 4 * (5 - 1), in whole vectors
            guess = taps + by_channel[c, before] @ rest[before, p]
            assert abs(near.predict(column) - guess / 4) < 2 + abs(guess) / 100
            near.add(int(weight))
            own[p] = weight * 32 - taps
            rest[c, p] = weight * 32 - guess
            by_tap[p, :p] += own[p] * tap_gains[:p]
            by_channel[c, before] += rest[c, p] * gains[before, p]
            tap_energy[p] += own[p] ** 2
            energy[c] += rest[c, p] ** 2
            tap_gains[p] = own[p] / (3 * kernel * usual + tap_energy[p])
            gains[c, p] = rest[c, p] / (3 * channels * usual + energy[c])
            squares.append(own[p] ** 2)


def test_rows_and_columns_of_their_own_scale_cost_less_than_the_entropy_of_all():
    random = np.random.default_rng(1)
    scale = 2.0 ** random.uniform(-2, 3, (300, 1)) * 2.0 ** random.uniform(-1, 1, (1, 288))
    codes = np.rint(random.laplace(0, 1, (300, 288)) * scale).astype(np.int32)
    share = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(share * np.log2(share)).sum() * codes.size / 8
    for profile, most in (("fast", 0.90), ("small", 0.93), ("max", 0.92)):
        assert len(coders.encode(codes, profile=profile)) < entropy * most


def test_smooth_kernels_cost_less_than_the_same_codes_shuffled():
    random = np.random.default_rng(2)
    slope = random.normal(0, 3, (60, 40, 1, 1)) * np.linspace(-1, 1, 3)[:, None]
    codes = np.rint(slope + random.normal(0, 0.7, (60, 40, 3, 3))).astype(np.int32)
    matrix = codes.reshape(60, -1)
    shuffled = random.permuted(codes.reshape(60, 40, 9), axis=2).reshape(60, -1)
    for profile, most in (("small", 0.9), ("max", 0.8)):
        smooth = len(coders.encode(matrix, profile=profile, kernel=9))
        assert smooth < most * len(coders.encode(shuffled, profile=profile, kernel=9))


def trellis_codes(weights, states):
    """The codes of the points nearest to weights in steps of the union, along a trellis; greedy."""
    carried, fed = neighbours.TRELLISES[states]
    codes = np.empty(weights.shape, np.int32)
    for row, into in zip(weights, codes, strict=True):
        state = 0
        for i, weight in enumerate(row):
            odd = state & 1
            size = int((abs(weight) + odd) / 2 + 0.5)
            into[i] = size if weight > 0 else -size
            state = state >> 1 ^ odd * carried ^ (size & 1) * fed
    return codes


@pytest.mark.parametrize("states", list(neighbours.TRELLISES)[1:])
def test_codes_of_a_trellis_cost_less_where_the_coder_knows_of_it(states):
    weights = np.random.default_rng(3).normal(0, 1.5, (200, 200))
    codes = trellis_codes(weights, states)
    for profile in ("small", "max"):
        blind = len(coders.encode(codes, profile=profile))
        assert len(coders.encode(codes, profile=profile, states=states)) < 0.95 * blind
        assert len(coders.encode(codes, profile=profile, states=64 if states < 64 else 4)) > (
            0.99 * blind
        )


def test_the_trellis_worked_by_hand():
    # Eight states: 0 -1-> 2 -0-> 1 -3-> 0^5^2 = 7 -0-> 3^5 = 6. Of state 1, code 3 is weight 5,
    # and of state 7, code -2 weight -3.
    near = neighbours.Neighbours(Shape(1, 6, 1, 8))
    near.start_row(0)
    seen = []
    for column, code in enumerate((1, 0, 3, -2, 0)):
        near.look(column)
        seen.append(near.odd)
        near.add(code)
    near.look(5)
    assert seen == [0, 0, 1, 1, 0]
    assert [near.here(back) for back in (5, 4, 3, 2, 1)] == [2, 0, 5, -3, 0]


@pytest.mark.parametrize("states", [0, 2, 3, 128, -8])
def test_a_trellis_of_another_size_is_refused(states):
    codes = np.zeros((2, 3), int)
    with pytest.raises(ValueError, match=rf"states={states}; .*\[1, 4, 8, 16, 32, 64\]"):
        coders.encode(codes, profile="small", states=states)
    with pytest.raises(ValueError, match=rf"states={states}"):
        coders.decode(b"", (2, 3), profile="fast", states=states)
