"""Coders give every code back, with the same bytes in C++ and in Python, close to the entropy."""

import functools
import hashlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.codec import coders
from tersor.codec.coders import (
    Shape,
    adaptive,
    floats,
    huffman,
    linear,
    native,
    neighbours,
    rans,
    static,
)
from tersor.codec.coders.arithmetic import HALF, RangeDecoder, RangeEncoder

MODULES = (adaptive, rans, huffman, floats)
KERNELS = (1, 9, 25, 3)
STATES = (1, 4, 8, 16, 32, 64)

compiled = pytest.mark.skipif(native.native() is None, reason="the compiled coders are not built")


def in_python(work):
    kept = [module.native for module in MODULES]
    for module in MODULES:
        module.native = lambda: None
    try:
        return work()
    finally:
        for module, found in zip(MODULES, kept, strict=True):
            module.native = found


@st.composite
def groups(draw, most=60):
    """Matrices of one to three kinds of layout and trellis, from all zero to very large codes."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes, kernels, states = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        kernel = draw(st.sampled_from(KERNELS))
        columns = kernel * draw(st.integers(0, most // kernel // 4 + 1))
        rows = draw(st.integers(0, 6))
        scale = draw(st.sampled_from((0, 0.05, 0.6, 2, 30, 2000, 2**20)))
        codes.append(np.rint(random.laplace(0, 1, (rows, columns)) * scale).astype(np.int32))
        kernels.append(kernel)
        states.append(draw(st.sampled_from(STATES)))
    return codes, kernels, states


def shapes_of(codes, kernels, states):
    return [Shape(*c.shape, k, s) for c, k, s in zip(codes, kernels, states, strict=True)]


def geometric(count, chance, seed=0):
    """Two-sided geometric codes, and their entropy in bits each."""
    random = np.random.default_rng(seed)
    codes = (random.geometric(chance, count) - random.geometric(chance, count)).astype(np.int32)
    share = np.unique(codes, return_counts=True)[1] / count
    return codes.reshape(-1, 100), float(-(share * np.log2(share)).sum())


@pytest.mark.parametrize("profile", coders.PROFILES)
@settings(max_examples=40, deadline=None)
@given(group=groups())
def test_all_codes_come_back(profile, group):
    codes, kernels, states = group
    stream = coders.encode_group(codes, profile=profile, kernels=kernels, states=states)
    back = coders.decode_group(stream, shapes_of(*group), profile=profile)
    assert all(np.array_equal(a, b) for a, b in zip(codes, back, strict=True))


@compiled
@pytest.mark.parametrize("profile", coders.PROFILES)
@settings(max_examples=15, deadline=None)
@given(group=groups(most=30))
def test_both_languages_write_the_same_bytes_and_read_each_other(profile, group):
    codes, kernels, states = group
    shapes = shapes_of(*group)

    def encode():
        return coders.encode_group(codes, profile=profile, kernels=kernels, states=states)

    stream = encode()
    assert in_python(encode) == stream
    back = in_python(lambda: coders.decode_group(stream, shapes, profile=profile))
    assert all(np.array_equal(a, b) for a, b in zip(codes, back, strict=True))


@compiled
def test_python_reads_the_many_lanes_of_large_matrices():
    codes, _ = geometric(140_000, 0.3)
    stream = coders.encode(codes, profile="fast")
    back = in_python(lambda: coders.decode(stream, codes.shape, profile="fast", dtype=np.int8))
    assert np.array_equal(back, codes)


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


@pytest.mark.parametrize("profile", coders.PROFILES)
@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((0, 7)),
        np.zeros((7, 0)),
        np.zeros((50, 50)),
        np.full((1, 1), -3),
        np.full((20, 20), 5),
        np.array([[2**20, -(2**20), 0, 1]]),
        np.array([[2**31 - 1, 1 - 2**31]]),
        np.eye(100),
    ],
    ids=["no rows", "no columns", "zeros", "one", "equal", "large", "largest", "sparse"],
)
def test_extreme_matrices_come_back(profile, codes):
    codes = codes.astype(np.int64)
    stream = coders.encode(codes, profile=profile)
    assert np.array_equal(coders.decode(stream, codes.shape, profile=profile), codes)


# Bits of 100,000 codes over their entropy: 1 % for fixed frequencies, tables included.
@pytest.mark.parametrize(
    ("profile", "over"), [("fast", 0.01), ("small", 0.02), ("max", 0.02), ("huffman", 0.04)]
)
@pytest.mark.parametrize("chance", [0.15, 0.4, 0.7])
def test_independent_codes_take_their_entropy(profile, over, chance):
    codes, entropy = geometric(100_000, chance)
    bits = len(coders.encode(codes, profile=profile)) * 8 / codes.size
    assert entropy * 0.999 < bits < entropy * (1 + over) + (0.05 if profile == "huffman" else 0)


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


@pytest.mark.parametrize("states", STATES[1:])
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


def test_a_group_takes_less_than_its_matrices():
    parts = [geometric(2_000, 0.4, seed)[0] for seed in range(20)]
    for profile in ("fast", "small", "max"):
        alone = sum(len(coders.encode(part, profile=profile)) for part in parts)
        assert len(coders.encode_group(parts, profile=profile, kernels=[1] * 20)) < 0.99 * alone


def test_sparse_codes_take_little():
    codes = np.zeros((100, 1000), np.int8)
    codes.reshape(-1)[::500] = 1
    # 200 of 100,000 at even distances: a run of 499 each, 1 bit for a mask.
    assert len(coders.encode(codes, profile="sparse")) < 400
    assert len(coders.encode(codes, profile="fast")) < 400


GOLDEN = {
    "fast": "d9d5ea64e87310b8",
    "small": "fc5504252cc8c62f",
    "max": "860531dabe887a8c",
    "huffman": "3f2c7dfdaad9c670",
    "sparse": "4ab697d445fc8a68",
}


@pytest.mark.parametrize("profile", coders.PROFILES)
def test_streams_stay_as_they_are(profile):
    # Codes from a formula, so that no random generator has to stay as it is.
    i = np.arange(45 * 54)
    codes = ((i * i * 31 + i // 7) % 97 * ((i * 13) % 89) // 800 - 4).reshape(45, 54)
    codes[3, 5], codes[7, :] = 70_000, 0
    stream = coders.encode(codes, profile=profile, kernel=9)
    assert hashlib.sha256(stream).hexdigest()[:16] == GOLDEN[profile]
    assert np.array_equal(coders.decode(stream, codes.shape, profile=profile, kernel=9), codes)


def test_range_coder_worked_by_hand():
    # A one of chance 1/2 takes the lower half of [0, 1), a zero the upper: 1 is named by 0, which
    # no byte needs to say, and 0 by 1/2.
    for bit, stream in ((1, b""), (0, b"\x80")):
        coder = RangeEncoder()
        coder.code(bit, HALF)
        assert coder.finish() == stream
        assert RangeDecoder(stream).code(0, HALF) == bit


def test_canonical_huffman_codes_worked_by_hand():
    # Counts 1, 1, 2, 4 give lengths 3, 3, 2, 1 and codes 110, 111, 10, 0.
    assert huffman.code_lengths([1, 1, 2, 4]) == [3, 3, 2, 1]
    assert huffman._bits(np.array([3, 2, 0, 1]), [3, 3, 2, 1]) == bytes(
        [0b0_10_110_11, 0b1_0000000]
    )


def test_huffman_codes_of_extreme_counts_have_at_most_12_bits():
    lengths = huffman.code_lengths([2**i for i in range(30)])
    assert max(lengths) == 12
    assert sum(2.0**-length for length in lengths) == 1


@pytest.mark.parametrize("total", [1024, 4096, 16384])
def test_frequencies_fill_their_table_and_forget_no_symbol(total):
    for weights in ([0, 0], [1] * 256, [2**30] + [1] * 255, [0, 5, 0, 1]):
        found = static.frequencies(np.array(weights, np.int64), total)
        assert found.sum() == total
        assert all((f > 0) >= (w > 0) for f, w in zip(found, weights, strict=True))


@pytest.mark.parametrize("states", [0, 2, 3, 128, -8])
def test_a_trellis_of_another_size_is_refused(states):
    codes = np.zeros((2, 3), int)
    with pytest.raises(ValueError, match=rf"states={states}; .*\[1, 4, 8, 16, 32, 64\]"):
        coders.encode(codes, profile="small", states=states)
    with pytest.raises(ValueError, match=rf"states={states}"):
        coders.decode(b"", (2, 3), profile="fast", states=states)


@pytest.mark.parametrize("profile", coders.PROFILES)
def test_a_code_too_large_for_its_type_is_refused(profile):
    stream = coders.encode(np.array([[1, 300, -2]]), profile=profile)
    with pytest.raises(ValueError, match="too large for its type"):
        coders.decode(stream, (1, 3), profile=profile, dtype=np.int8)


@pytest.mark.parametrize(
    ("codes", "kernel", "said"),
    [
        (np.zeros((2, 3)), 1, "integer"),
        (np.zeros(3, int), 1, "integer"),
        (np.zeros((2, 10), int), 9, "kernel=9 does not divide the 10 columns"),
        (np.array([[2**31]]), 1, "must lie from"),
    ],
)
def test_what_cannot_be_coded_is_refused(codes, kernel, said):
    with pytest.raises(ValueError, match=said):
        coders.encode(codes, profile="small", kernel=kernel)


def test_missing_compiled_coders_are_said_once(monkeypatch):
    find = native.native.__wrapped__
    monkeypatch.delenv("TERSOR_NO_NATIVE", raising=False)
    monkeypatch.setitem(sys.modules, "tersor.codec.coders._native", None)
    monkeypatch.delattr(coders, "_native", raising=False)
    cached = functools.cache(find)
    with pytest.warns(RuntimeWarning, match="slower") as said:
        found = [cached(), cached()]
    assert found == [None, None]
    assert len(said) == 1
    # Whoever chose it need not be told.
    monkeypatch.setenv("TERSOR_NO_NATIVE", "1")
    assert find() is None


def words(kind, count, seed=0):
    values = np.random.default_rng(seed).normal(0, 0.02, count).astype(np.float32)
    if kind == "float16":
        return values.astype(np.float16).view(np.uint16).reshape(-1, 50)
    bits = values.view(np.uint32)
    return (bits if kind == "float32" else (bits >> 16).astype(np.uint16)).reshape(-1, 50)


@pytest.mark.parametrize("kind", sorted(floats.WIDTHS))
def test_floats_come_back_bit_for_bit(kind):
    width = floats.WIDTHS[kind]
    dtype = np.uint16 if width == 16 else np.uint32
    for bits in (
        words(kind, 5_000),
        np.arange(2**16).astype(dtype).reshape(256, 256) * (1 if width == 16 else 65537),
        np.zeros((0, 3), dtype),
    ):
        kept = bits.copy()
        stream = coders.encode_floats(bits, kind=kind)
        assert np.array_equal(bits, kept)
        given = bytearray(stream)
        assert np.array_equal(coders.decode_floats(given, bits.shape, kind=kind), bits)
        assert given == stream
        assert in_python(lambda b=bits: coders.encode_floats(b, kind=kind)) == stream
        back = in_python(lambda b=bits, s=stream: coders.decode_floats(s, b.shape, kind=kind))
        assert np.array_equal(back, bits)


# Exponents of normal values have 2.5 bits of entropy; sign and mantissa are noise.
@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 10.7), ("float32", 26.7)])
def test_normal_floats_take_little_more_than_sign_and_mantissa(kind, most):
    bits = words(kind, 200_000)
    assert len(coders.encode_floats(bits, kind=kind)) * 8 / bits.size < most


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([np.uint8, np.uint16, np.uint32]), st.integers(0, 40), st.integers(0, 2**32))
def test_changes_since_a_base_come_back(dtype, rows, seed):
    random = np.random.default_rng(seed)
    base = random.integers(0, np.iinfo(dtype).max, (rows, 11), dtype)
    bits = base + random.integers(0, 4, base.shape).astype(dtype) - dtype(1)
    stream = coders.encode_delta(bits, base)
    assert np.array_equal(coders.decode_delta(stream, base), bits)


def test_few_small_changes_take_few_bytes():
    base = words("float32", 100_000)
    bits = base.copy()
    bits[::10] += 3
    # One word in ten has changed by three: 0.47 bits to say which, and all else is known.
    assert len(coders.encode_delta(bits, base)) < 100_000 * 0.6 / 8
