"""A file is written whole or not at all, and always with the same bytes."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from tersor.codec import container, header_reader, load, read_header, save, verify
from tersor.codec.header import Run
from tersor.errors import FileError, ModelError, OutputError


@pytest.fixture
def net():
    return nn.Linear(3, 2)


@pytest.fixture
def old(tmp_path, net):
    """A file that must survive whatever happens to the next one."""
    path = save(net, tmp_path / "net.tersor")
    return path, path.read_bytes()


def assert_untouched(old):
    path, content = old
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_equal_models_give_equal_bytes(tmp_path, net):
    first = save(net, tmp_path / "a.tersor", example=torch.rand(1, 3), metrics={"b": 1, "a": 2})
    twin = nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    second = save(twin, tmp_path / "b.tersor", example=torch.ones(1, 3), metrics={"a": 2, "b": 1})
    assert first.read_bytes() == second.read_bytes()


def test_a_second_write_replaces_the_first(old, net):
    path, content = old
    with torch.no_grad():
        net.weight += 1
    save(net, path)
    assert path.read_bytes() != content
    assert torch.equal(load(path, into=nn.Linear(3, 2)).weight, net.weight)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(old, net, monkeypatch, step, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    wanted = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        save(net, old[0])
    monkeypatch.undo()
    assert_untouched(old)


def test_an_interrupt_while_encoding_leaves_the_old_file(old, net, monkeypatch):
    monkeypatch.setattr(container, "canonical", lambda value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        container.write(old[0], {}, b"", iter([(Run("raw", (1,)), [b"x"])]), str)
    assert_untouched(old)


FULL_DISK = """
import resource, signal, sys, torch, tersor.codec
from tersor.codec.header import Run
from tersor.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for room in (100_000, 100, 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        tersor.codec.save(torch.nn.Linear(300, 300), sys.argv[1])
    except OutputError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_file(old):
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, old[0]], check=True, capture_output=True, text=True
    )
    said = f"{old[0]} cannot be written: File too large; what was there before is untouched."
    assert run.stdout.count(said) == 3
    assert_untouched(old)


def test_the_folder_must_exist_and_be_one(tmp_path, net, old):
    with pytest.raises(OutputError, match=r"No such file or directory; .* Choose a folder"):
        save(net, tmp_path / "absent" / "net.tersor")
    with pytest.raises(OutputError, match="Not a directory"):
        save(net, old[0] / "net.tersor")
    with pytest.raises(OutputError, match="is a folder; give the path of a file in it"):
        save(net, tmp_path)
    assert_untouched(old)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path, net):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        save(net, tmp_path / "net.tersor")
    tmp_path.chmod(0o700)


def test_large_bodies_go_through_a_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "_SPOOL", 1000)
    net = nn.Linear(100, 100)
    path = save(net, tmp_path / "net.tersor")
    assert torch.equal(load(path, into=nn.Linear(100, 100)).weight, net.weight)
    assert os.listdir(tmp_path) == ["net.tersor"]


def test_the_header_is_read_without_the_chunks(tmp_path):
    net = nn.Sequential(nn.Linear(1100, 1000), nn.Linear(3, 5), nn.BatchNorm1d(7))
    path = save(net, tmp_path / "net.tersor")
    header = read_header(path)
    # The large weight is cut into chunks of 500 rows; the small floats share a chunk.
    assert [chunk.count for chunk in header.chunks] == [1000 + 15 + 5, 550_000, 550_000]
    assert [chunk.start for chunk in header.chunks] == [0, 0, 550_000]
    # Damage in a chunk is none of the header's business, but verify and load see it.
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)
    assert read_header(path) == header
    for reader in (verify, load):
        with pytest.raises(FileError, match="the checksum of chunk"):
            reader(path)


def test_a_description_beyond_the_limit_is_refused_when_written(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "LARGEST_TEXT", 500)
    with pytest.raises(OutputError, match="above the limit of 500"):
        save(nn.Linear(3, 2), tmp_path / "net.tersor", provenance={"note": "x" * 500})
    assert os.listdir(tmp_path) == []


def test_what_no_reader_would_accept_is_not_written(tmp_path, monkeypatch, old):
    monkeypatch.setattr(header_reader, "SMALLEST_LIMIT", 10_000)
    # A hundred thousand zeros take no chunk at all.
    net = nn.Linear(1000, 100)
    nn.init.zeros_(net.weight)
    with pytest.raises(ModelError, match=r"its tensors unfold to 400400 bytes, above the limit"):
        save(net, old[0])
    assert_untouched(old)
