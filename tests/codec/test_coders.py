"""Coders give every code back, with the same bytes in C++ and in Python, close to the entropy."""

import functools
import hashlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.languages import compiled, in_python
from tersor.codec import coders
from tersor.codec.coders import (
    Shape,
    huffman,
    native,
    static,
)
from tersor.codec.coders.arithmetic import RangeDecoder, RangeEncoder

KERNELS = (1, 9, 25, 3)
STATES = (1, 4, 8, 16, 32, 64)


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
    "fast": "b130afe8d83c36e1",
    "small": "fc5504252cc8c62f",
    "max": "860531dabe887a8c",
    "huffman": "fbd157fb8de256b5",
    "sparse": "61c7c7c77c4eb729",
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
        coder.code(bit, 1 << 15)
        assert coder.finish() == stream
        assert RangeDecoder(stream).code(0, 1 << 15) == bit


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
