"""Elements survive packing exactly, in close to the fewest bytes that Huffman coding allows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.codec import coded_bytes, pack, read_header, save
from tersor.codec.pack import Coding, Unreadable, coding_of, decode, encode
from tersor.errors import ModelError
from tersor.forms import Affine, Bitmask, Codebook, Dense
from tersor.program.program import DTYPES
from tersor.surgery import hold


def values(dtype, bits, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype in (torch.int8, torch.uint8):
        low = -(2 ** (bits - 1)) if dtype is torch.int8 else 0
        return torch.randint(low, low + 2**bits, (count,), generator=generator).to(dtype)
    if dtype is torch.bool:
        return torch.rand(count, generator=generator) < 0.5
    return (torch.randn(count, generator=generator) * 50).to(dtype)


@given(
    st.sampled_from(sorted(DTYPES)),
    st.integers(1, 8),
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
)
def test_elements_come_back_exactly(name, bits, counts):
    tensors = [values(DTYPES[name], bits, n, seed) for seed, n in enumerate(counts)]
    coding = coding_of(tensors[0], bits)
    back = decode(encode(tensors, coding), coding, sum(counts))
    assert back.dtype == DTYPES[name]
    assert torch.equal(back.view(torch.uint8), torch.cat(tensors).view(torch.uint8))


def test_codes_worked_by_hand():
    # 3 bits, two to a byte, the first in the low bits; int8 codes count from -4.
    codes = torch.tensor([-4, 3, 0], dtype=torch.int8)
    assert encode([codes], Coding(torch.int8, 3)) == [bytes([0b111_000, 0b000_100])]
    # One bit: eight to a byte.
    flags = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    assert encode([flags], coding_of(flags)) == [bytes([0b10000001, 1])]


@pytest.mark.parametrize("bits", range(1, 9))
def test_even_codes_take_no_more_than_their_bits(bits):
    codes = values(torch.uint8, bits, 60_000)
    (stream,) = encode([codes], Coding(torch.uint8, bits))
    # 2 % and a table; three bits share a byte with two, so Huffman must win the rest back.
    assert len(stream) <= 60_000 * bits / 8 * 1.02 + 100


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_normal_weights_come_close_to_their_entropy(bits):
    codes = Affine.encode(torch.randn(300, 1000), bits=bits).codes
    counts = np.bincount((codes.numpy().astype(int) + 128).ravel(), minlength=256)
    share = counts[counts > 0] / codes.numel()
    entropy = -(share * np.log2(share)).sum() * codes.numel() / 8
    (stream,) = encode([codes], Coding(torch.int8, bits))
    assert entropy * 0.99 <= len(stream) <= entropy * (1.08 if bits == 2 else 1.02)


def test_float_weights_are_split_into_planes_and_few_values_are_not():
    normal = torch.randn(20_000)
    streams = encode([normal], coding_of(normal))
    assert len(streams) == 4
    assert sum(map(len, streams)) < 0.9 * 80_000
    few = torch.randn(5)[torch.randint(0, 5, (20_000,))]
    assert len(encode([few], coding_of(few))) == 1
    assert sum(map(len, encode([few], coding_of(few)))) < 20_000


@pytest.mark.parametrize(
    "form",
    [
        Affine.encode(torch.randn(64, 64), bits=3, group_size=16, symmetric=False),
        Codebook.encode(torch.randn(64, 64), torch.linspace(-2, 2, 16)),
        Dense.encode(torch.randn(64, 64), dtype=torch.bfloat16),
        Bitmask.encode(torch.randn(64, 64).relu()),
        hold(Affine.encode(torch.randn(64, 64).relu(), bits=4), "codes",
             Bitmask.encode(Affine.encode(torch.randn(64, 64).relu(), bits=4).codes)),
    ],
    ids=["affine", "codebook", "dense", "bitmask", "nested"],
)  # fmt: skip
def test_coded_bytes_are_those_of_the_file(tmp_path, form):
    net = hold(nn.Linear(64, 64, bias=False), "weight", form)
    header = read_header(save(net, tmp_path / "net.tersor"))
    stored = sum(chunk.stored.size for chunk in header.chunks)
    # Codes and zero points of equal bits share a chunk and a Huffman table, for better or worse.
    assert abs(stored - coded_bytes(form)) <= 8
    assert header.stored_bytes(header.entries[0]) == stored


def test_a_large_tensor_is_judged_by_a_sample_within_one_percent(monkeypatch):
    # Rows that grow along the way, as those of rare and frequent words do.
    weight = torch.randn(6000, 800) * torch.linspace(0.1, 1, 6000)[:, None]
    form = Affine.encode(weight, bits=6, axis=None)
    judged = coded_bytes(form)
    monkeypatch.setattr(pack, "_LARGE", 2**30)
    assert judged == pytest.approx(coded_bytes(form), rel=0.01)
    assert judged != coded_bytes(form)


def test_large_floats_are_coded_as_their_sample_says(monkeypatch):
    weight = torch.randn(300_000)
    coding = coding_of(weight)
    exact = encode([weight], coding)
    monkeypatch.setattr(pack, "_LARGE", 2**20)
    assert sum(map(len, encode([weight], coding))) <= 1.01 * sum(map(len, exact))
    assert torch.equal(decode(encode([weight], coding), coding, 300_000), weight)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match=r"shape \(2,\) holds codes that do not fit 3 bits"):
        encode([torch.tensor([0, 5], dtype=torch.int8)], Coding(torch.int8, 3))
    with pytest.raises(ModelError, match="which a file cannot hold; convert it to one of"):
        coding_of(torch.zeros(2, dtype=torch.uint16))


def test_streams_must_agree_with_the_count():
    floats = torch.randn(6)
    coding = coding_of(floats)
    with pytest.raises(Unreadable, match="has 2 streams where 1 or 4 are possible"):
        decode([b"", b""], coding, 6)
    with pytest.raises(Unreadable):
        decode([bytes(23)], coding, 6)
