"""Files that were damaged on their way: cut, flipped, renamed, or from the future."""

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


def test_one_flipped_bit_anywhere_is_noticed(path):
    content = path.read_bytes()
    assert len(content) < 1500
    for at in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            refused(path, flipped)


def test_a_file_cut_short_anywhere_is_noticed(path):
    content = path.read_bytes()
    for length in range(len(content)):
        refused(path, content[:length])


def test_damage_is_explained_with_the_way_out(path):
    content = path.read_bytes()
    assert "it should be" in (cut := refused(path, content[:-10]))
    assert "it was cut short" in cut
    assert "get it again from where it came from" in cut
    assert "something was appended to it" in refused(path, content + b"x")
    flipped = bytearray(content)
    flipped[-1] ^= 1
    assert "the checksum of chunk" in refused(path, flipped)
    flipped = bytearray(content)
    flipped[60] ^= 1
    assert "the checksum of its header is wrong" in refused(path, flipped)


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
    pieces.preamble = {"version": 3, "least": 3}
    newer = pieces.write(path.with_name("newer.tersor"))
    says = r"newer tersor \(file version 3, for readers of version 3 on; this one reads 1\)"
    for reader in (load, read_header, verify):
        with pytest.raises(FileError, match=says):
            reader(newer)
    # Its header and length may mean something else by then, so nothing else is looked at.
    newer.write_bytes(MAGIC + b"\2\0\2\0" + bytes(44))
    with pytest.raises(FileError, match="upgrade with `pip install -U tersor`"):
        load(newer)


def test_a_newer_file_that_needs_nothing_new_is_read(path):
    pieces = Pieces.of(path)
    pieces.preamble = {"version": 3, "optional": 0x8001}
    pieces.header["+speed"] = {"of": "light"}
    newer = pieces.write(path.with_name("newer.tersor"))
    x = torch.rand(4, 6)
    assert torch.equal(load(newer)(x), load(path)(x))


def test_an_older_file_is_refused(path):
    pieces = Pieces.of(path)
    pieces.preamble = {"version": 0, "least": 0}
    with pytest.raises(FileError, match="file version 0, from before tersor's first release"):
        load(pieces.write(path.with_name("older.tersor")))


def test_a_feature_that_is_needed_and_unknown_is_named(path):
    pieces = Pieces.of(path)
    pieces.preamble = {"required": 0b10100}
    with pytest.raises(FileError, match=r"needs feature 2, 4 of .* does not know; upgrade with"):
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
