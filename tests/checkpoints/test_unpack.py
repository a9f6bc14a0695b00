"""Unpacking writes what a file says and nowhere else, whoever made the file."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.checkpoints import unpacking
from tersor.codec import save, save_tensors
from tersor.errors import FileError, ModelError, OptionError, OutputError
from tersor.forms import Affine
from tersor.surgery import hold


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_file_of_a_network_has_its_weights_decoded_and_tied_ones_twice(tmp_path):
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    hold(net[0], "weight", Affine.encode(net[0].weight, bits=4))
    net[1].bias = net[0].bias
    save(net, tmp_path / "net.tersor")
    done = tersor.unpack(tmp_path / "net.tersor", tmp_path / "net.safetensors")
    found = load_file(tmp_path / "net.safetensors")
    assert torch.equal(found.pop("0.weight"), net[0].weight)
    plain = net.state_dict()
    assert found.keys() == {n for n in plain if not n.startswith("0.weight")}
    assert all(torch.equal(value, plain[name]) for name, value in found.items())
    assert (done.tensors, done.decoded) == (9, 1)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


NOTES = {
    "a list": [],
    "no files": {"files": []},
    "files are no list": {"files": 3},
    "a file is no row": {"files": ["a"]},
    "a place too far": {"files": [{"order": [0, 2]}]},
    "a place below": {"files": [{"order": [0, -1]}]},
    "a place is no number": {"files": [{"order": [0, "1"]}]},
    "a place is missing": {"files": [{"order": [0]}]},
    "a place twice": {"files": [{"order": [0, 0]}]},
    "two files and no index": {"files": [{"order": [0]}, {"order": [1]}]},
    "metadata of numbers": {"files": [{"metadata": [1, 2]}]},
    "odd without a type": {"files": [{}], "odd": {"a": ["x"]}},
    "odd of nothing": {"files": [{}], "odd": {"c": ["x", "F32", [3]]}},
    "odd with a bad name": {"files": [{}], "odd": {"a": [3, "F32", [3]]}},
    "two of one name": {"files": [{}], "odd": {"a": ["b", "F32", [3]]}},
}
TOO_LONG = f"{'ü' * 120}.safetensors"
SHARDS = {
    "files": [{"name": f"{n}.safetensors", "order": [n]} for n in (0, 1)],
    "index": {"file": "x.safetensors.index.json", "metadata": {}},
}
NOTES["an index without metadata"] = SHARDS | {"index": {"file": "x.safetensors.index.json"}}
NOTES["an index that is no object"] = SHARDS | {"index": [1]}
NOTES["a name too long for a disk"] = SHARDS | {
    "files": [{"name": name, "order": [n]} for n, name in enumerate(["a.safetensors", TOO_LONG])]
}
NOTES["an index too long for a disk"] = SHARDS | {
    "index": {"file": f"{TOO_LONG}.index.json", "metadata": {}}
}
OUTSIDE = ["../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "x.txt", "", "..", 3, None]


@pytest.mark.parametrize("name", NOTES)
def test_notes_that_make_no_sense_are_refused(tmp_path, name):
    path = tmp_path / "x.tersor"
    save_tensors({"a": noise(3), "b": noise(3)}, path, provenance={"safetensors": NOTES[name]})
    with pytest.raises(FileError, match=r"x.tersor: its notes on the safetensors files"):
        tersor.unpack(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tersor"]


@pytest.mark.parametrize("name", OUTSIDE, ids=str)
def test_no_file_is_written_outside_the_folder(tmp_path, name):
    good, index = "x.safetensors", "x.safetensors.index.json"
    for file, table in ((name, index), (good, name)):
        notes = {
            "files": [{"name": file, "order": [0]}, {"name": "y.safetensors", "order": [1]}],
            "index": {"file": table, "metadata": {}},
        }
        path = tmp_path / "x.tersor"
        save_tensors({"a": noise(3), "b": noise(3)}, path, provenance={"safetensors": notes})
        with pytest.raises(FileError, match="make no sense"):
            tersor.unpack(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tersor"]


def test_none_of_its_files_takes_the_place_of_what_is_unpacked(tmp_path):
    path = tmp_path / "1.safetensors"
    save_tensors({"a": noise(3), "b": noise(3)}, path, provenance={"safetensors": SHARDS})
    with pytest.raises(OptionError, match=r"1\.safetensors is what is unpacked; choose another"):
        tersor.unpack(path, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_type_that_does_not_fit_its_bytes_makes_no_file(tmp_path):
    notes = {"files": [{}], "odd": {"a": ["a", "F64", [3]]}}
    path = tmp_path / "x.tersor"
    save_tensors({"a": noise(3)}, path, provenance={"safetensors": notes})
    with pytest.raises(OutputError, match="would be no safetensors file"):
        tersor.unpack(path, tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tersor"]


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("there", [False, True])
def test_a_type_that_nobody_knows_makes_none_of_several_files(tmp_path, name, there):
    path = tmp_path / "x.tersor"
    notes = SHARDS | {"odd": {name: [name, "FOO", [3]]}}
    save_tensors({"a": noise(3), "b": noise(3)}, path, provenance={"safetensors": notes})
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match=r"would be no safetensors .*FOO.*nothing was written"):
        tersor.unpack(path, tmp_path / "out")
    assert (tmp_path / "out").exists() == there
    assert [p for p in tmp_path.glob("**/*") if p.is_file()] == [path]


def test_a_type_that_safetensors_lacks_is_named(tmp_path):
    save_tensors({"a": noise(3).to(torch.complex128)}, tmp_path / "x.tersor")
    with pytest.raises(ModelError, match=r'"a" of shape \(3,\) has the type torch.complex128'):
        tersor.unpack(tmp_path / "x.tersor", tmp_path / "x.safetensors")


def test_a_damaged_file_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.tersor"
    save_file({"a": noise(300, 300)}, tmp_path / "x.safetensors")
    tersor.pack(tmp_path / "x.safetensors", path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (tmp_path / "out.safetensors").write_text("before")
    with pytest.raises(FileError, match="the checksum of chunk"):
        tersor.unpack(path, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 3


def test_stopping_it_leaves_neither_files_nor_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "x.tersor"
    save_tensors({"a": noise(3), "b": noise(3)}, path, provenance={"safetensors": SHARDS})

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(unpacking, "stream", stopped)
    with pytest.raises(KeyboardInterrupt):
        tersor.unpack(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.tersor"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be made"):
        tersor.unpack(path, tmp_path / "file")
