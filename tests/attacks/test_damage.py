"""Files that were damaged on their way: cut, flipped, renamed, or from the future."""

import random

import pytest
import torch
from torch import nn

from attacks.forge import MAGIC, Pieces
from tersor.codec import load, read_header, save, verify
from tersor.errors import FileError
from tersor.forms import Affine
from tersor.surgery import walk


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file with a graph, codes, floats and integers, under 2 kB."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()
    for site in walk(model):
        site.hold(Affine.encode(site.weight, bits=4))
    return save(model, tmp_path_factory.mktemp("file") / "net.tersor", example=torch.rand(2, 6))


def refused(path, content):
    other = path.with_name("other.tersor")
    other.write_bytes(content)
    with pytest.raises(FileError) as caught:
        load(other)
    assert str(other) in str(caught.value)
    return str(caught.value)


def test_one_flipped_bit_in_any_byte_is_noticed(path):
    content, choose = path.read_bytes(), random.Random(0)
    assert len(content) < 2000
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << choose.randrange(8)
        refused(path, flipped)


def test_a_file_cut_short_anywhere_is_noticed(path):
    content = path.read_bytes()
    for length in (*range(80), *range(80, len(content), 7), len(content) - 1):
        refused(path, content[:length])


def test_damage_is_explained_with_the_way_out(path):
    content = path.read_bytes()
    assert "it should be" in (cut := refused(path, content[:-10]))
    assert "it was cut short" in cut
    assert "get it again from where it came from" in cut
    assert "something was appended to it" in refused(path, content + b"x")
    flipped = bytearray(content)
    flipped[-40] ^= 1
    assert "the checksum of chunk" in refused(path, flipped)
    flipped = bytearray(content)
    flipped[60] ^= 1
    assert "the checksum of its header is wrong" in refused(path, flipped)
    flipped = bytearray(content)
    flipped[-1] ^= 1
    assert "its checksum is wrong" in refused(path, flipped)


@pytest.mark.parametrize(
    "content", [b"", b"\x89", b"PK\x03\x04 a zip archive", b"\x80\x02}q\x00.", b'{"__metadata__"']
)
def test_another_kind_of_file_is_named_as_such(path, content):
    says = refused(path, content)
    if content != b"\x89":
        assert f"is not a .tersor file: it starts with {content[:8]!r}" in says
    with pytest.raises(FileError):
        read_header(path.with_name("other.tersor"))


def test_a_newer_file_asks_for_an_upgrade(path):
    pieces = Pieces.of(path)
    pieces.preamble = {"version": 3}
    newer = pieces.write(path.with_name("newer.tersor"))
    for reader in (load, read_header, verify):
        with pytest.raises(FileError, match=r"newer tersor \(file version 3, this one reads 0\)"):
            reader(newer)
    # Its header and length may mean something else by then, so nothing else is looked at.
    newer.write_bytes(MAGIC + b"\1\0\0\0" + bytes(44))
    with pytest.raises(FileError, match="upgrade with `pip install -U tersor`"):
        load(newer)


def test_unknown_flags_are_refused(path):
    pieces = Pieces.of(path)
    pieces.preamble = {"flags": 4}
    with pytest.raises(FileError, match="its flags are 0x4"):
        load(pieces.write(path.with_name("flags.tersor")))


def test_what_is_no_file_is_refused(path):
    with pytest.raises(FileError, match="does not exist; check the path"):
        load(path.with_name("absent.tersor"))
    with pytest.raises(FileError, match="not a regular file"):
        load("/dev/zero")
    with pytest.raises(FileError, match="cannot be read"):
        load(path.parent)


def test_an_untouched_file_passes(path):
    assert verify(path) == read_header(path)
    assert Pieces.of(path).write(path.with_name("same.tersor")).read_bytes() == path.read_bytes()
