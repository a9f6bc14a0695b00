"""A file read tensor by tensor gives what loading it does, with little in memory at a time."""

import pytest
import torch
from torch import nn

from tersor.codec import read_header, read_parts, read_tensor, save, save_tensors, shelf, stream
from tersor.codec import streaming as module
from tersor.errors import FileError, ModelError
from tersor.forms import Affine, Bitmask, Form, Trellis
from tersor.surgery import hold


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed=0):
    """Layers of several forms, some of which share chunks; one weight is tied."""
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(12, 12) for _ in range(6)))
    hold(net[0], "weight", Affine.encode(net[0].weight, bits=4, symmetric=False))
    hold(net[1], "weight", Trellis.encode(net[1].weight, step=0.05, states=8))
    hold(net[2], "weight", Affine.encode(net[2].weight, bits=3, symmetric=False, group_size=5))
    hold(net[3], "weight", Bitmask.encode(net[3].weight.relu()))
    hold(
        net[3].weight_form, "values", Trellis.encode(net[3].weight_form.values, step=0.1, axis=None)
    )
    net[5].weight = net[4].weight
    return net


@pytest.fixture(params=[1, 200, 2**22], ids=["one by one", "some", "all"])
def batch(request, monkeypatch):
    monkeypatch.setattr(module, "BATCH", request.param)


@pytest.mark.usefixtures("batch")
@pytest.mark.parametrize("threads", [1, 2])
def test_every_tensor_is_the_one_that_was_saved(tmp_path, threads):
    net = network()
    path = save(net, tmp_path / "net.tersor")
    found = list(stream(path, threads=threads))
    assert [entry for entry, _ in found] == list(read_header(path).entries)
    for entry, item in found:
        weight = item.dense() if isinstance(item, Form) else item
        for name in entry.names:
            layer, _, leaf = name.rpartition(".")
            assert torch.equal(weight, getattr(net.get_submodule(layer), leaf))
    assert any(entry.names == ("4.weight", "5.weight") for entry, _ in found)


@pytest.mark.usefixtures("batch")
def test_changes_from_a_base_are_added_to_it(tmp_path):
    base, net = network(), network()
    net[4].weight.data += 1e-4
    net[0].weight_form.codes[3] ^= 1
    first = save(base, tmp_path / "base.tersor")
    path = save(net, tmp_path / "net.tersor", base=first)
    assert read_header(path).base
    for entry, item in stream(path, base=first):
        weight = item.dense() if isinstance(item, Form) else item
        layer, _, leaf = entry.names[0].rpartition(".")
        assert torch.equal(weight, getattr(net.get_submodule(layer), leaf))
    with pytest.raises(FileError, match="give that with base="):
        list(stream(path))


def test_only_what_shares_a_chunk_is_kept_for_later(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 1)
    items = {f"m{i}.{n}": noise(*s, seed=i) for i in range(9) for n, s in SIZES.items()}
    path = save_tensors(items, tmp_path / "x.tersor")
    read = module.read_leaves
    asked = []

    def counting(source, header, wanted, threads, base):
        asked.append(sum(header.leaves[index].plain.count for index in wanted))
        return read(source, header, wanted, threads, base)

    monkeypatch.setattr("tersor.codec.shelf.CHUNK", dict.fromkeys(shelf.CHUNK, 9) | {"words": 90})
    path = save_tensors(items, tmp_path / "x.tersor")
    monkeypatch.setattr(module, "read_leaves", counting)
    assert len(list(stream(path))) == 18
    # No tensor is decoded twice, and all vectors share a few chunks.
    assert sum(asked) == sum(item.numel() for item in items.values())
    assert max(asked) <= 100 + 120


SIZES = {"weight": (10, 10), "bias": (10,)}


def test_damage_is_found_when_its_chunk_is_due(tmp_path):
    items = {f"m{i}.weight": noise(300, 300, seed=i) for i in range(8)}
    path = save_tensors(items, tmp_path / "x.tersor")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="the checksum of chunk"):
        list(stream(path))


def test_one_part_of_every_form_can_be_read_alone(tmp_path):
    net = network()
    path = save(net, tmp_path / "net.tersor")
    steps = read_parts(path, "step")
    assert steps.keys() == {"1.weight"}
    assert torch.equal(steps["1.weight"], net[1].weight_form.step)
    assert read_parts(path, "nothing") == {}


def test_tensors_of_no_network_may_hold_anything(tmp_path):
    items = {
        "b.z": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "a.w": Trellis.encode(noise(6, 5), step=0.1, states=8),
        "b.a": torch.arange(5),
        "lone": noise(4, 4).bfloat16(),
    }
    path = save_tensors(items, tmp_path / "x.tersor", provenance={"from": "here"})
    header = read_header(path)
    assert header.provenance == {"from": "here"}
    assert [entry.names[0] for entry in header.entries] == ["b.a", "b.z", "a.w", "lone"]
    for name, item in items.items():
        found = read_tensor(path, name)
        meant = item.dense() if isinstance(item, Form) else item
        assert torch.equal(found.view(torch.uint8), meant.view(torch.uint8))


def test_a_name_that_no_file_may_have_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is no name of a module"):
        save_tensors({"a..b": noise(3)}, tmp_path / "x.tersor")
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.tersor"
    path.write_text("before")

    def check(draft):
        assert [entry.names for entry, _ in stream(draft)] == [("a",)]
        raise FileError("not this one")

    with pytest.raises(FileError, match="not this one"):
        save_tensors({"a": noise(3)}, path, check=check)
    assert [p.name for p in tmp_path.iterdir()] == ["x.tersor"]
    assert path.read_text() == "before"
