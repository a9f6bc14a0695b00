"""Floats and changes since a base come back bit for bit, in few bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.languages import in_python
from tersor.codec import coders
from tersor.codec.coders import floats


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
