"""Packed checkpoints: every bit back, or measured errors, and nothing half done."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

import tersor
import zoo
from tersor.checkpoints import free_name, packing, quantizing
from tersor.codec import read_header, read_parts, read_tensor
from tersor.errors import FileError, ModelError, OptionError, OutputError
from tersor.files import drafts
from tersor.methods.quantize.entropy import entropy

needs_data = pytest.mark.skipif(not zoo.DATA.exists(), reason="needs the shared data")
TYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64),
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def any_bits(dtype, *shape):
    """Elements of which any bits are set; for floats that is NaN, infinity and -0 as well."""
    count = math.prod(shape) * dtype.itemsize
    if not count:
        return torch.empty(shape, dtype=dtype)
    raw = np.random.default_rng(count).integers(0, 256, count, np.uint8)
    if dtype is torch.bool:
        raw &= 1
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def checkpoint(folder, tensors=None, **metadata):
    path = folder / "model.safetensors"
    save_file(tensors or {"a.weight": noise(64, 48), "a.bias": noise(64)}, path, metadata or None)
    return path


def there_and_back(path, **options):
    """The packing, and the bytes of the checkpoint afterwards."""
    folder = path.parent / "back"
    folder.mkdir(exist_ok=True)
    done = tersor.pack(path, folder / "model.tersor", **options)
    back = tersor.unpack(folder / "model.tersor", folder / path.name, base=options.get("base"))
    assert back.paths == [folder / path.name]
    assert drafts(folder) == []
    return done, (folder / path.name).read_bytes()


def same(a, b):
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("profile", ["fast", "small", "max"])
def test_every_type_comes_back_byte_for_byte(tmp_path, dtype, profile):
    tensors = {
        "layer.1.weight": any_bits(dtype, 24, 10, 3),
        "layer.1.bias": any_bits(dtype, 24),
        "layer.10.weight": any_bits(dtype, 300, 40),
        "scalar": any_bits(dtype),
        "same": any_bits(dtype, 1).expand(50).contiguous(),
        "empty": any_bits(dtype, 0, 7),
    }
    path = checkpoint(tmp_path, tensors, format="pt", **{"licence of ü": 'a "quoted" one\n'})
    done, back = there_and_back(path, profile=profile)
    assert back == path.read_bytes()
    assert done.identical
    assert done.error == 0
    assert done.elements == 24 * 30 + 24 + 12000 + 1 + 50
    assert done.bytes_before == len(back)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text()),
)
def test_any_names_types_and_shapes_come_back(tmp_path_factory, tensors, metadata):
    folder = tmp_path_factory.mktemp("any")
    named = {n: any_bits(t, *shape) for n, (t, shape) in tensors.items() if n != "__metadata__"}
    path = folder / "x.safetensors"
    try:
        path.write_bytes(save(named or {"a": torch.ones(1)}, metadata))
    except UnicodeEncodeError:
        return
    done, back = there_and_back(path)
    assert not done.identical or back == path.read_bytes()
    again = load_file(folder / "back" / path.name)
    before = load_file(path)
    assert again.keys() == before.keys()
    assert all(a.dtype == before[n].dtype and same(a, before[n]) for n, a in again.items())
    with safe_open(folder / "back" / path.name, "pt") as file:
        assert (file.metadata() or {}) == metadata


def test_a_checkpoint_of_empty_tensors_comes_back(tmp_path):
    path = checkpoint(tmp_path, {"a": noise(0, 3), "b": noise(0)})
    done, back = there_and_back(path)
    assert back == path.read_bytes()
    assert done.as_json()["bits_per_weight"] == done.elements == 0


def test_names_that_no_module_has_are_kept(tmp_path):
    names = ["", "a..b", ".a", "x\ny", "n" * 2000, "tensor0", "a", "a.b"]
    path = checkpoint(tmp_path, {name: noise(3, seed=i) for i, name in enumerate(names)})
    _, back = there_and_back(path)
    assert back == path.read_bytes()


def test_files_of_other_writers_keep_tensors_and_metadata(tmp_path):
    # Spaces in the header, another order, and floats that begin at an odd byte.
    weights = noise(5, 5)
    rows = {
        "z": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "__metadata__": {"b": "1", "a": "2"},
        "w": {"dtype": "F32", "shape": [5, 5], "data_offsets": [3, 103]},
        "f": {"dtype": "BOOL", "shape": [2], "data_offsets": [103, 105]},
    }
    head = json.dumps(rows).encode()
    data = bytes([1, 2, 3]) + weights.numpy().tobytes() + bytes([7, 1])
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    done, back = there_and_back(path)
    assert not done.identical
    length = int.from_bytes(back[:8], "little")
    # Laid out as before, down to a truth value of 7.
    assert back[8 + length :] == data
    found = json.loads(back[8 : 8 + length])
    assert found == rows
    assert list(found.pop("__metadata__")) == ["b", "a"]
    assert list(found) == ["z", "w", "f"]


@needs_data
def test_a_published_checkpoint_comes_back_byte_for_byte(tmp_path):
    path = zoo.DATA / "weights" / "resnet20_cifar10.safetensors"
    done = tersor.pack(path, tmp_path / "r.tersor")
    tersor.unpack(tmp_path / "r.tersor", tmp_path / "r.safetensors")
    assert (tmp_path / "r.safetensors").read_bytes() == path.read_bytes()
    assert done.bytes_after < 0.84 * done.bytes_before


@pytest.mark.parametrize("bits", [None, 4.0])
def test_a_network_takes_a_packed_checkpoint_as_it_is(tmp_path, bits):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    path = checkpoint(tmp_path, net.state_dict())
    done, _ = there_and_back(path, bits=bits)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    tersor.load(done.path, into=other)
    unpacked = load_file(tmp_path / "back" / path.name)
    for name, value in unpacked.items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(other.get_submodule(owner), leaf), value)


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a layer under two names."""

    def __init__(self, *, tied=True):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.head = nn.Linear(12, 30, bias=False)
        self.twice = nn.ModuleList([nn.Linear(12, 12)] * 2)
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("bits", [None, 4.0])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_name_of_a_tied_pair_serves_for_both(tmp_path, bits, name, device):
    net = Tied()
    tensors = {name: net.embed.weight, "twice.1.weight": net.twice[0].weight}
    tensors["twice.0.bias"] = net.twice[0].bias
    done, _ = there_and_back(checkpoint(tmp_path, tensors), bits=bits)
    with torch.device(device):
        other = Tied()
    tersor.load(done.path, into=other)
    weight = load_file(tmp_path / "back" / "model.safetensors")[name]
    assert torch.equal(other.embed.weight, weight)
    assert torch.equal(other.head.weight, weight)
    assert bits or other.head.weight is other.embed.weight
    # Tied for good: what is saved again has it once.
    entries = read_header(tersor.save(other, tmp_path / "again.tersor")).entries
    assert ("embed.weight", "head.weight") in [entry.names for entry in entries]
    with pytest.raises(FileError, match="the file lacks"):
        tersor.load(done.path, into=Tied(tied=False))


def shards(folder):
    """A checkpoint of two files in a folder of its own, and its tensors."""
    tensors = {f"layers.{i}.{n}": noise(6, 4, seed=i) for i in range(3) for n in ("w", "v")}
    names = sorted(tensors)
    files = {"model-1-of-2.safetensors": names[1::2], "model-2-of-2.safetensors": names[::2]}
    folder.mkdir()
    for file, inside in files.items():
        save_file({n: tensors[n] for n in inside}, folder / file, {"format": "pt", "part": file})
    placed = {n: file for file, inside in files.items() for n in inside}
    index = {"metadata": {"total_size": 576}, "weight_map": dict(sorted(placed.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text)
    return tensors


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_a_checkpoint_of_several_files_comes_back_as_it_was(tmp_path, name):
    tensors = shards(tmp_path / "llm")
    done = tersor.pack(tmp_path / "llm" / name, tmp_path / "llm.tersor")
    assert done.identical
    assert done.bytes_before == sum(p.stat().st_size for p in tmp_path.glob("llm/*.safetensors"))
    back = tersor.unpack(tmp_path / "llm.tersor", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "llm")
    assert len(back.paths) == 3
    together = tersor.unpack(tmp_path / "llm.tersor", tmp_path / "all.safetensors")
    assert together.paths == [tmp_path / "all.safetensors"]
    found = load_file(together.paths[0])
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "model-1-of-2.safetensors").unlink(), "it does not exist"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "cannot be read as an in"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is no index of a check"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../model.safetensors"}}'
            ),
            "must name files in its folder",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"b": "model-1-of-2.safetensors"}}'
            ),
            "do not belong together",
        ),
        (
            lambda f: (f / "other.safetensors.index.json").write_text("{}"),
            r"has 2 of \*.safetensors.index.json",
        ),
    ],
)
def test_a_folder_with_a_damaged_index_is_refused(tmp_path, harm, said):
    shards(tmp_path / "llm")
    harm(tmp_path / "llm")
    with pytest.raises(ModelError, match=said):
        tersor.pack(tmp_path / "llm", tmp_path / "llm.tersor")
    assert not (tmp_path / "llm.tersor").exists()


def test_bits_are_spent_as_quantizing_a_network_without_data_does(tmp_path):
    net = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20, bias=False), nn.Conv2d(3, 8, 3))
    path = checkpoint(tmp_path, {k: v.detach() for k, v in net.state_dict().items()})
    done = tersor.pack(path, tmp_path / "m.tersor", bits=3.0)
    entropy.__wrapped__(net, bits=3.0)
    for name in ("0.weight", "1.weight", "2.weight"):
        layer = net[int(name[0])]
        assert torch.equal(read_tensor(tmp_path / "m.tersor", name), layer.weight)
    bias = read_tensor(tmp_path / "m.tersor", "0.bias")
    assert torch.equal(bias, load_file(path)["0.bias"])
    stored = {tensor.name: tensor.stored for tensor in done.tensors}
    assert stored["0.weight"] == "quantized"
    assert stored["0.bias"] == "as it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_errors_are_those_of_the_unpacked_checkpoint(tmp_path, dtype):
    tensors = {"a": noise(40, 30).to(dtype), "b": 3 * noise(1, 60, 7).to(dtype), "n": noise(9)}
    path = checkpoint(tmp_path, tensors | {"i": torch.arange(12).reshape(3, 4)}, format="pt")
    done, _ = there_and_back(path, bits=4.0)
    found = load_file(tmp_path / "back" / path.name)
    assert torch.equal(found["n"], tensors["n"])
    assert torch.equal(found["i"], torch.arange(12).reshape(3, 4))
    errors = {tensor.name: tensor.error for tensor in done.tensors}
    lost = total = 0.0
    for name in ("a", "b"):
        assert found[name].dtype == dtype
        apart = float((found[name].double() - tensors[name].double()).square().sum())
        energy = float(tensors[name].double().square().sum())
        assert errors[name] == pytest.approx(math.sqrt(apart / energy), rel=1e-9)
        assert 0.01 < errors[name] < 0.2
        lost, total = lost + apart, total + energy
    assert done.error == pytest.approx(math.sqrt(lost / total), rel=1e-9)
    assert errors["n"] == errors["i"] == 0
    assert not done.identical


def test_more_bits_lose_less_and_take_more(tmp_path):
    path = checkpoint(tmp_path, {"w": noise(200, 100)})
    done = [tersor.pack(path, tmp_path / "m.tersor", bits=bits) for bits in (1.5, 3.0, 6.0)]
    assert done[0].bytes_after < done[1].bytes_after < done[2].bytes_after
    assert done[0].error > 2 * done[1].error > 8 * done[2].error
    assert done[1].bits_per_weight == pytest.approx(3, abs=0.3)


def test_blocks_of_rows_and_a_sample_of_them_give_nearly_the_same(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, {"w": noise(300, 50), "v": noise(2, 3000), "d": noise(1, 80, 6)})
    whole = tersor.pack(path, tmp_path / "whole.tersor", bits=3.0)
    monkeypatch.setattr(quantizing, "_BLOCK", 700)
    monkeypatch.setattr(quantizing, "_SAMPLE", 5000)
    done, _ = there_and_back(path, bits=3.0)
    assert done.error == pytest.approx(whole.error, rel=0.05)
    assert done.bytes_after == pytest.approx(whole.bytes_after, rel=0.05)
    found = load_file(tmp_path / "back" / path.name)["w"]
    assert torch.equal(found, read_tensor(done.path, "w"))


def test_what_cannot_be_quantized_is_kept_and_said(tmp_path):
    tensors = {"w": noise(30, 30), "holes": noise(5, 5), "far": noise(40, 40)}
    tensors["holes"][2, 3] = math.nan
    tensors["far"][0, 0] = 1e30
    done, _ = there_and_back(checkpoint(tmp_path, tensors), bits=3.0)
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert same(again["holes"], tensors["holes"])
    assert same(again["far"], tensors["far"])
    assert len(done.notes) == 2
    assert 'holes" holds NaN or infinity and is kept' in done.notes[0]
    assert '"far" holds weights too large' in done.notes[1]
    # The others have their bits all the same.
    assert done.error < 0.3


@pytest.mark.parametrize("scale", [1e39, 1e100, 1e200, 1e300])
def test_finite_weights_beyond_all_others_are_not_called_infinite(tmp_path, scale):
    tensors = {"w": noise(30, 30), "huge": noise(5, 5).double() * scale}
    done, _ = there_and_back(checkpoint(tmp_path, tensors), bits=3.0)
    assert done.notes == ['"huge" holds weights too large to quantize and is kept']
    assert same(load_file(tmp_path / "back" / "model.safetensors")["huge"], tensors["huge"])
    tensors.pop("w")
    with pytest.raises(ModelError, match="none that can be; pack it without loss"):
        tersor.pack(checkpoint(tmp_path, tensors), tmp_path / "m.tersor", bits=3.0)


def test_bits_that_are_missed_are_said(tmp_path):
    # Two equal magnitudes have no codes that cost 3 bits each.
    path = checkpoint(tmp_path, {"w": torch.ones(20, 20)})
    done, _ = there_and_back(path, bits=3.0)
    (note,) = done.notes
    said = re.match(r"bits=3 were asked for, and the quantized weights take about ([\d.]+);", note)
    assert not 0.95 < float(said[1]) / 3 < 1.05
    assert there_and_back(checkpoint(tmp_path), bits=3.0)[0].notes == []


@pytest.mark.parametrize("bits", [None, 3.0])
def test_changes_from_a_base_take_less(tmp_path, bits):
    before = {"w": noise(200, 100), "kept": noise(100, 50, seed=1), "b": noise(40)}
    after = before | {"w": before["w"] + 0.003 * noise(200, 100, seed=2)}
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file(before, first)
    save_file(after, second)
    tersor.pack(first, tmp_path / "1.tersor", bits=bits)
    alone = tersor.pack(second, tmp_path / "2.tersor", bits=bits)
    done = tersor.pack(second, tmp_path / "2.tersor", bits=bits, base=tmp_path / "1.tersor")
    assert done.bytes_after < (0.6 if bits is None else 0.3) * alone.bytes_after
    with pytest.raises(FileError, match="give that with base="):
        tersor.unpack(tmp_path / "2.tersor", tmp_path / "back.safetensors")
    tersor.unpack(tmp_path / "2.tersor", tmp_path / "b.safetensors", base=tmp_path / "1.tersor")
    found = load_file(tmp_path / "b.safetensors")
    if bits is None:
        assert (tmp_path / "b.safetensors").read_bytes() == second.read_bytes()
    else:
        assert done.error == pytest.approx(alone.error, rel=0.02)
        steps = [read_parts(tmp_path / f, "step") for f in ("1.tersor",)]
        own = read_parts(tmp_path / "2.tersor", "step") if not alone else steps[0]
        assert own == steps[0]
    assert torch.equal(found["b"], before["b"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 0}, "bits=0 for each weight"),
        ({"bits": -1.0}, "bits=-1 for each weight"),
        ({"bits": "3"}, "bits='3' for each weight"),
        ({"bits": True}, "bits=True for each weight"),
        ({"bits": 17}, "up to 16"),
        ({"bits": math.nan}, "bits=nan"),
        ({"profile": "tiny"}, "profile='tiny' is none of"),
        ({"profile": ["max"]}, r"profile=\['max'\] is none of"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, said):
    path = checkpoint(tmp_path)
    with pytest.raises(OptionError, match=said):
        tersor.pack(path, tmp_path / "m.tersor", **options)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("hello, this is no checkpoint")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({}, tmp_path / "none.safetensors")
    whole = checkpoint(tmp_path).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5])
    (tmp_path / "longer.safetensors").write_bytes(whole + b"1234")
    (tmp_path / "folder").mkdir()
    for name, said in {
        "text.safetensors": "cannot be read as a safetensors file",
        "empty.safetensors": "cannot be read as a safetensors file",
        "cut.safetensors": "cannot be read as a safetensors file",
        "longer.safetensors": "cannot be read as a safetensors file",
        "none.safetensors": "holds no tensors",
        "nowhere.safetensors": "it does not exist",
        "folder": "has no .safetensors file",
    }.items():
        with pytest.raises(ModelError, match=said):
            tersor.pack(tmp_path / name, tmp_path / "m.tersor")
    with pytest.raises(ModelError, match="float tensors of two or more dimensions"):
        tersor.pack(checkpoint(tmp_path, {"b": noise(5)}), tmp_path / "m.tersor", bits=3)
    assert not (tmp_path / "m.tersor").exists()


def test_the_checkpoint_and_its_base_are_not_overwritten(tmp_path):
    path = checkpoint(tmp_path)
    before = path.read_bytes()
    with pytest.raises(OptionError, match="is what the file is made from"):
        tersor.pack(path, path)
    tersor.pack(path, tmp_path / "base.tersor")
    with pytest.raises(OptionError, match="is what the file is made from"):
        tersor.pack(path, tmp_path / "base.tersor", base=tmp_path / "base.tersor")
    with pytest.raises(OptionError, match="is what is unpacked"):
        tersor.unpack(tmp_path / "base.tersor", tmp_path / "base.tersor")
    assert path.read_bytes() == before


def test_the_free_name_is_beside_what_was_named(tmp_path, monkeypatch):
    # As the cache of Hugging Face lays files out.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snap").mkdir()
    blob = checkpoint(tmp_path).rename(tmp_path / "blobs" / "0f3c")
    (tmp_path / "snap" / "model.safetensors").symlink_to("../blobs/0f3c")
    (tmp_path / "latest").symlink_to("snap")
    monkeypatch.chdir(tmp_path / "snap")
    beside = tmp_path / "snap" / "model.tersor"
    for path in (beside.with_suffix(".safetensors"), "model.safetensors"):
        assert free_name(path) == beside
    assert free_name("model.safetensors.index.json") == beside
    assert free_name(tmp_path / "latest") == tmp_path / "latest.tersor"
    assert free_name(".") == free_name("../snap/") == tmp_path / "snap.tersor"
    assert tersor.pack("model.safetensors", free_name("model.safetensors")).path == beside
    assert [p.name for p in blob.parent.iterdir()] == [blob.name]
    with pytest.raises(OptionError, match=r"model\.tersor is there already; name the file"):
        free_name("model.safetensors")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    path = checkpoint(tmp_path)
    for bits in (None, 3.0):
        with pytest.raises(OutputError, match="hoose a folder that exists"):
            tersor.pack(path, tmp_path / "none" / "m.tersor", bits=bits)


@pytest.mark.parametrize("bits", [None, 3.0])
def test_what_does_not_read_back_never_takes_its_name(tmp_path, monkeypatch, bits):
    path = checkpoint(tmp_path)
    (tmp_path / "m.tersor").write_text("what was there")
    true = packing.stream

    def wrong(*given, **options):
        for entry, item in true(*given, **options):
            if isinstance(item, torch.Tensor):
                item = item.clone()
                item.view(-1)[-1] *= -1
            else:
                item.codes[-1, -1] += 1
            yield entry, item

    monkeypatch.setattr(packing, "stream", wrong)
    with pytest.raises(OutputError, match="did not come back from the file as it was written"):
        tersor.pack(path, tmp_path / "m.tersor", bits=bits)
    assert (tmp_path / "m.tersor").read_text() == "what was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.tersor", "model.safetensors"]


@pytest.mark.parametrize("place", ["save_tensors", "Quantizer", "stream"])
def test_stopping_it_anywhere_leaves_nothing(tmp_path, monkeypatch, place):
    path = checkpoint(tmp_path)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(packing, place, stopped)
    with pytest.raises(KeyboardInterrupt):
        tersor.pack(path, tmp_path / "m.tersor", bits=3.0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path):
    path = checkpoint(tmp_path)
    for bits in (None, 2.5):
        tersor.pack(path, tmp_path / "1.tersor", bits=bits)
        tersor.pack(path, tmp_path / "2.tersor", bits=bits)
        assert (tmp_path / "1.tersor").read_bytes() == (tmp_path / "2.tersor").read_bytes()


def test_the_work_that_is_told_of_is_all_of_it(tmp_path):
    class Told:
        units = done = 0

        def plan(self, units):
            self.units = units

        def doing(self, what):
            assert what

        def advance(self, units=1):
            self.done += units

    path = checkpoint(tmp_path)
    for bits in (None, 3.0):
        told = Told()
        tersor.pack(path, tmp_path / "m.tersor", bits=bits, progress=told)
        assert told.done == told.units > 0
