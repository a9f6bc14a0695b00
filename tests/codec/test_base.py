"""A file of changes gives the same model as a whole one, and needs its base and no other file."""

import copy

import pytest
import torch
from torch import nn

from attacks.forge import Pieces
from tersor.codec import load, read_header, read_tensor, save, save_tensors, shelf, verify
from tersor.errors import FileError, OptionError
from tersor.forms import Affine, Bitmask, Codebook, Dense, Trellis
from tersor.surgery import hold


def network():
    """Weights of every sort: codes, trellis, words, masks, a codebook, counters."""
    torch.manual_seed(3)
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)), nn.BatchNorm1d(40))
    hold(net[0], "weight", Affine.encode(net[0].weight, bits=8))
    hold(net[1], "weight", Trellis.encode(net[1].weight, step=0.003, states=8))
    hold(net[2], "weight", Codebook.encode(net[2].weight, torch.linspace(-0.2, 0.2, 16)))
    hold(net[3], "weight", Bitmask.encode(net[3].weight.relu()))
    hold(net[4], "weight", Dense.encode(net[4].weight, dtype=torch.bfloat16))
    return net


def trained(net):
    """The same network a little later: most codes are the same."""
    later = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(4)
    for index in (0, 1, 2):
        codes = later[index].weight_form.codes
        where = torch.rand(codes.shape, generator=generator) < 0.03
        codes[where] = (
            (codes[where].int() - 1).clamp(0 if index == 2 else -128, 127).to(codes.dtype)
        )
    later[4].weight_form.stored.data.mul_(1 + 2**-7)
    later[5].weight.data.mul_(1 + 2**-20)
    later[6].num_batches_tracked += 5
    return later


def assert_same(net, other):
    state = other.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


@pytest.fixture
def files(tmp_path):
    net = network()
    later = trained(net)
    base = save(net, tmp_path / "base.tersor")
    return later, base, save(later, tmp_path / "next.tersor", base=base)


def test_changes_come_back_and_are_smaller(tmp_path, files):
    later, base, path = files
    assert_same(later, load(path, into=network(), base=base))
    whole = save(later, tmp_path / "whole.tersor")
    assert path.stat().st_size < 0.7 * whole.stat().st_size
    header = read_header(path)
    assert header.base == read_header(base).identity
    assert any(run.changed for run in header.runs)
    # Biases have not changed at all.
    assert any(kind.run is None for kind in header.kinds)
    assert verify(path, base=base) == header


@pytest.mark.parametrize("name", [f"{i}.{leaf}" for i in range(6) for leaf in ("weight", "bias")])
def test_rows_of_changes_are_read_with_rows_of_the_base(files, monkeypatch, name):
    monkeypatch.setattr("tersor.codec.shelf.TOGETHER", 100)
    monkeypatch.setattr("tersor.codec.shelf.CHUNK", dict.fromkeys(shelf.CHUNK, 200))
    later, base, path = files
    save(network(), base)
    save(later, path, base=base)
    weight = later.get_parameter(name) if "bias" in name else later.get_submodule(name[0]).weight
    assert torch.equal(read_tensor(path, name, base=base), weight)
    assert torch.equal(read_tensor(path, name, slice(7, 19), base=base), weight[7:19])


def test_the_same_model_again_takes_no_chunks(tmp_path, files):
    _, base, path = files
    save(network(), path, base=base)
    assert read_header(path).chunks == ()
    assert_same(network(), load(path, into=network(), base=base))


def test_a_base_that_has_nothing_alike_is_not_needed(tmp_path, files):
    later, _, path = files
    other = save(nn.Linear(2, 2), tmp_path / "other.tersor")
    save(later, path, base=other)
    assert read_header(path).base == ""
    assert_same(later, load(path, into=network()))
    # Giving one all the same does no harm.
    assert_same(later, load(path, into=network(), base=other))


def test_a_base_without_tensors_is_one_that_has_nothing_alike(tmp_path):
    base = save_tensors({}, tmp_path / "none.tersor")
    path = save_tensors({"weight": torch.rand(3, 2)}, tmp_path / "next.tersor", base=base)
    assert read_header(path).base == ""
    assert torch.equal(read_tensor(path, "weight"), read_tensor(path, "weight", base=base))


def test_changes_too_large_for_a_coder_are_not_stored(tmp_path):
    net, far = nn.Module(), nn.Module()
    net.register_buffer("ids", torch.tensor([[2**31 - 2, 0], [5, 1]]))
    far.register_buffer("ids", torch.tensor([[-(2**31) + 2, 0], [5, 1]]))
    base = save(net, tmp_path / "base.tersor")
    path = save(far, tmp_path / "next.tersor", base=base)
    assert torch.equal(load(path, into=net, base=base).ids, far.ids)


def test_a_missing_base_is_asked_for(files):
    _, base, path = files
    says = rf"stored as changes from the file with the identity {read_header(base).identity}; give"
    for read in (load, verify, lambda p: read_tensor(p, "0.weight")):
        with pytest.raises(FileError, match=says):
            read(path)
    with pytest.raises(FileError, match=r"absent\.tersor does not exist"):
        load(path, base=base.with_name("absent.tersor"))


def test_another_base_is_refused(files):
    _, base, path = files
    net = network()
    net[0].weight_form.codes[0, 0] += 1
    save(net, base)
    with pytest.raises(FileError, match=r"base\.tersor: it has the identity .*, and changes are"):
        load(path, into=network(), base=base)


def test_a_base_must_hold_all_its_weights(tmp_path, files):
    later, _, path = files
    says = r"next\.tersor: it is stored as changes from another file itself"
    with pytest.raises(FileError, match=says):
        save(later, tmp_path / "third.tersor", base=path)
    assert not (tmp_path / "third.tersor").exists()
    with pytest.raises(FileError, match=says):
        load(path, base=path)


def test_a_file_does_not_take_the_place_of_its_base(tmp_path, files, monkeypatch):
    later, base, _ = files
    before = base.read_bytes()
    monkeypatch.chdir(tmp_path)
    for place in ("base.tersor", base, tmp_path / "x" / ".." / base.name):
        with pytest.raises(OptionError, match=r"is its own base, .*; choose another name"):
            save(later, place, base=base)
        with pytest.raises(OptionError, match="is its own base"):
            save_tensors({"a": torch.ones(3)}, place, base="base.tersor")
    assert base.read_bytes() == before


def test_damage_of_the_base_is_its_own(files):
    _, base, path = files
    content = bytearray(base.read_bytes())
    content[-1] ^= 1
    base.write_bytes(content)
    with pytest.raises(FileError, match=r"base\.tersor is not usable: the checksum of chunk"):
        load(path, into=network(), base=base)


def test_changes_of_what_the_base_does_not_have_are_refused(tmp_path, files):
    _, base, path = files
    pieces = Pieces.of(path)
    tensors = pieces.header["modules"][0][2]
    tensors["basis"] = tensors.pop("bias")
    forged = pieces.write(tmp_path / "forged.tersor")
    with pytest.raises(FileError, match=r'"0\.basis" is a change from what its base does not have'):
        load(forged, base=base)
