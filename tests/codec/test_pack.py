"""Elements survive every coder exactly, in close to the fewest bytes that could be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor.codec import coded_bytes, pack, read_header, save
from tersor.codec.coders import Shape
from tersor.codec.errors import Unreadable
from tersor.errors import ModelError
from tersor.forms import Affine, Bitmask, Codebook, Dense
from tersor.program.program import DTYPES
from tersor.surgery import hold


def values(dtype, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(count, generator=generator) < 0.5
    return (torch.randn(count, generator=generator) * 50).to(dtype)


@given(st.sampled_from(sorted(DTYPES)), st.integers(1, 70))
def test_elements_are_bits_and_back(name, count):
    tensor = values(DTYPES[name], count)
    back = pack.as_tensor(pack.elements(tensor), DTYPES[name], (1, count))
    assert back.dtype == DTYPES[name]
    assert back.shape == (1, count)
    assert torch.equal(back.view(torch.uint8), tensor[None].view(torch.uint8))


@settings(max_examples=40)
@given(st.sampled_from(sorted(set(DTYPES))), st.integers(1, 9), st.integers(1, 9))
def test_every_word_coder_gives_words_back(name, rows, columns):
    dtype, shape = DTYPES[name], Shape(rows, columns)
    words = pack.elements(values(dtype, rows * columns))
    if dtype in pack.INTEGERS:
        words = words.view(f"u{words.itemsize}")
    for coder in pack.word_coders(dtype):
        if dtype in pack.INTEGERS and coder == "planes":
            continue
        back = pack.decode_words(pack.encode_words(words, shape, coder, dtype), shape, coder, dtype)
        assert back.tobytes() == words.tobytes()


def test_types_that_no_file_holds_are_refused():
    with pytest.raises(ModelError, match="which a file cannot hold; convert it to one of"):
        pack.checked_dtype(torch.zeros(2, dtype=torch.uint16))


def test_words_must_agree_with_their_number():
    words = pack.elements(torch.randn(6))
    for coder in pack.word_coders(torch.float32):
        stream = pack.encode_words(words, Shape(2, 3), coder, torch.float32)
        for shape in (Shape(2, 2), Shape(3, 3)):
            with pytest.raises(Unreadable):
                pack.decode_words(stream, shape, coder, torch.float32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_normal_weights_come_close_to_their_entropy(tmp_path, bits):
    net = nn.Linear(1000, 300, bias=False)
    form = Affine.encode(torch.randn(300, 1000), bits=bits)
    counts = np.bincount((form.codes.numpy().astype(int) + 128).ravel(), minlength=256)
    share = counts[counts > 0] / form.codes.numel()
    entropy = -(share * np.log2(share)).sum() * form.codes.numel() / 8
    header = read_header(save(hold(net, "weight", form), tmp_path / "net.tersor"))
    codes = max(chunk.length for chunk in header.chunks)
    assert entropy * 0.99 <= codes <= entropy * 1.01 + 100


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
def test_coded_bytes_are_close_to_those_of_the_file(tmp_path, form):
    net = hold(nn.Linear(64, 64, bias=False), "weight", form)
    header = read_header(save(net, tmp_path / "net.tersor"))
    stored = sum(chunk.length for chunk in header.chunks)
    assert coded_bytes(form) == pytest.approx(stored, rel=0.01)
    assert header.stored_bytes(header.entries[0]) == stored
