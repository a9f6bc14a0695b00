"""Few floats come back bit by bit, in close to what their exponents and mantissas hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.codec.coders import encode_group
from tersor.codec.exponents import decode_exponents, encode_exponents

LAYOUTS = [(np.uint32, 23), (np.uint16, 7), (np.uint16, 10)]


@given(st.sampled_from(LAYOUTS), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60))
def test_any_bits_come_back(layout, values):
    dtype, bits = layout
    words = np.array(values, np.uint32).astype(dtype)
    back = decode_exponents(encode_exponents(words, bits), words.size, words.dtype, bits)
    assert back.dtype == words.dtype
    assert np.array_equal(back, words)


def test_a_stream_worked_by_hand():
    # bfloat16: 1.0 is sign 0, exponent 127, mantissa 0; -1.5 has mantissa 1000000, 1.25 0100000.
    words = np.array([0x3F80, 0xBFC0, 0x3FA0], np.uint16)
    rows = [np.array([row]) for row in ([0, 0, 0], [0, 1, 0])]
    plain = bytes([127, 0, 0b0000000_1, 0b000000_01, 0b00000_000])
    stream = plain + encode_group(rows, profile="small", kernels=[1, 1])
    assert encode_exponents(words, 7) == stream
    assert decode_exponents(stream, 3, words.dtype, 7).tolist() == words.tolist()


def test_few_mantissas_are_stored_once():
    # Steps on a grid of eight to an octave.
    random = np.random.default_rng(0)
    steps = (2.0 ** (random.integers(-40, -10, 200) / 8)).astype(np.float32)
    stream = encode_exponents(steps.view(np.uint32), 23)
    # 8 mantissas of 3 bytes, 3 bits to choose one, 2 for the exponent, and learning both.
    assert len(stream) < 24 + 200 * (3 + 2.5) / 8 + 40


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda s: s[:1], "ends too early"),
        (lambda s: s[:4], "ends too early"),
        (lambda s: bytes([s[0], 9]) + s[2:], "ends too early|impossible|goes on|no mantissa"),
        (lambda s: bytes([255]) + s[1:], "impossible exponent"),
        (lambda s: s + b"x" * 9, "goes on"),
        (lambda s: s[:4] + bytes([s[4] | 1]) + s[5:], "ends in bits that are no mantissa"),
    ],
)
def test_what_no_encoder_writes_is_refused(change, rule):
    words = np.array([0x3F80, 0xC0C1, 0x3F82], np.uint16)
    with pytest.raises(ValueError, match=rule):
        decode_exponents(change(encode_exponents(words, 7)), 3, words.dtype, 7)


def test_mantissas_rise_and_exist():
    words = np.repeat(np.array([0x3F80, 0x3F81], np.uint16), 200)
    stream = encode_exponents(words, 7)
    # Two mantissas in two bytes: 0000000 0000001 00.
    assert stream[:4] == bytes([127, 2, 0, 0b000001_00])
    with pytest.raises(ValueError, match="impossible mantissa"):
        decode_exponents(stream[:3] + b"\0" + stream[4:], 400, words.dtype, 7)
    with pytest.raises(ValueError, match=r"impossible mantissa|ends in bits"):
        decode_exponents(bytes([127, 1, 0]) + stream[4:], 400, words.dtype, 7)
