"""Whatever bytes a coder is given, it answers with codes of the shape asked for or a ValueError."""

import numpy as np
import pytest

from codec.languages import MODULES
from tersor.codec import coders
from tersor.codec.coders import Shape, floats, native

COUNT = 3000


def mutated(stream, random):
    data = bytearray(stream)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(0, len(data))) if data else 0
        match int(random.integers(0, 5)):
            case 0 if data:
                data[at] ^= 1 << random.integers(0, 8)
            case 1 if data:
                data[at] = random.integers(0, 256)
            case 2 if data:
                del data[at]
            case 3:
                del data[at:]
            case _:
                data.insert(at, int(random.integers(0, 256)))
    return bytes(data)


def answers(decode, streams):
    """How many were decoded and how many refused."""
    decoded = refused = 0
    for stream in streams:
        try:
            decode(stream)
            decoded += 1
        except ValueError:
            refused += 1
    return decoded, refused


def some_codes(random):
    codes = np.rint(random.laplace(0, 3, (9, 18))).astype(np.int32)
    codes[2, 3] = 5000
    return codes


@pytest.mark.parametrize("profile", coders.PROFILES)
@pytest.mark.parametrize("states", [1, 8])
@pytest.mark.parametrize("language", ["c++", "python"])
def test_mutated_and_random_streams_are_refused_or_decoded(profile, language, states, monkeypatch):
    count = COUNT
    if language == "python":
        count = 20 if profile == "max" else 60
        for module in MODULES:
            monkeypatch.setattr(module, "native", lambda: None)
    elif native.native() is None:
        pytest.skip("the compiled coders are not built")
    random = np.random.default_rng(3)
    layout = {"profile": profile, "kernel": 9, "states": states}
    stream = coders.encode(some_codes(random), **layout)
    streams = [mutated(stream, random) for _ in range(count)]
    streams += [random.bytes(int(random.integers(0, 200))) for _ in range(count // 4)]

    def decode(data):
        assert coders.decode(data, (9, 18), dtype=np.int16, **layout).shape == (9, 18)

    _, refused = answers(decode, streams)
    assert refused > len(streams) // 10


@pytest.mark.parametrize("profile", coders.PROFILES)
@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_both_languages_refuse_the_same_streams(profile, dtype, monkeypatch):
    if native.native() is None:
        pytest.skip("the compiled coders are not built")
    random = np.random.default_rng(4)
    layout = {"profile": profile, "kernel": 9, "states": 4}
    stream = coders.encode(some_codes(random)[:3].clip(-99, 127), **layout)
    for data in [mutated(stream, random) for _ in range(25)]:
        found = []
        for language in ("c++", "python"):
            with monkeypatch.context() as patch:
                if language == "python":
                    for module in MODULES:
                        patch.setattr(module, "native", lambda: None)
                try:
                    decoded = coders.decode(data, (3, 18), dtype=dtype, **layout)
                    found.append(decoded.tolist())
                except ValueError:
                    found.append(None)
        assert found[0] == found[1]


@pytest.mark.parametrize("profile", coders.PROFILES)
def test_a_stream_cut_anywhere_or_longer_is_no_crash(profile):
    stream = coders.encode(some_codes(np.random.default_rng(5)), profile=profile, kernel=9)

    def decode(data):
        coders.decode(data, (9, 18), profile=profile, kernel=9)

    decoded, _ = answers(decode, [stream[:i] for i in range(len(stream))])
    # The adaptive coders read zeros after the end; the others notice that something is missing.
    assert decoded <= (len(stream) if profile in ("small", "max") else 0)
    with pytest.raises(ValueError, match=r"after its last|longer|too early"):
        decode(stream + bytes([1] * 8))


def test_shapes_that_a_stream_is_not_for_are_refused():
    stream = coders.encode(some_codes(np.random.default_rng(6)), profile="fast")
    for shapes in ([Shape(9, 17)], [Shape(9, 18), Shape(1, 1)], []):
        with pytest.raises(ValueError, match=r"[a-z]+ "):
            coders.decode_group(stream, shapes, profile="fast")


@pytest.mark.parametrize("kind", sorted(floats.WIDTHS))
def test_mutated_floats_are_refused_or_decoded(kind):
    random = np.random.default_rng(7)
    dtype = np.uint32 if kind == "float32" else np.uint16
    bits = random.integers(0, 2**16, (9, 18)).astype(dtype)
    stream = coders.encode_floats(bits, kind=kind)
    streams = [mutated(stream, random) for _ in range(COUNT)]
    _, refused = answers(lambda s: coders.decode_floats(s, bits.shape, kind=kind), streams)
    assert refused > COUNT // 10
    stream = coders.encode_delta(bits, bits // 2)
    streams = [mutated(stream, random) for _ in range(COUNT)]
    _, refused = answers(lambda s: coders.decode_delta(s, bits // 2), streams)
    assert refused > COUNT // 10
