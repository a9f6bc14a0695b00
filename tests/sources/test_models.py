"""Each way to name a model opens the same network; each wrong one says what is wrong."""

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.codec import save
from tersor.errors import ModelError
from tersor.measure import size
from tersor.methods import run
from tersor.sources import open_model
from tersor.surgery import held, walk

RTN = [{"method": "quantize.rtn", "options": {"bits": 8}}]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))


X = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)

CODE = """
import torch
from torch import nn
from tests_sources_neighbour import width

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))

pair = lambda: (net(), torch.zeros(1, 3, 8, 8))
ready = net()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "made_here.py").write_text(CODE)
    (tmp_path / "tests_sources_neighbour.py").write_text("width = 8\n")
    yield tmp_path
    for name in ("made_here", "tests_sources_neighbour"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("made_here.py:net", "net"),
        ("./made_here.py:pair", "pair"),
        ("made_here.py:ready", "ready"),
        ("made_here:net", "net"),
    ],
)
def test_code_gives_its_network_in_evaluation_mode(folder, spec, name):
    opened = open_model(spec)
    assert opened.name == name
    assert not opened.model.training
    assert torch.equal(opened.model(X), net().eval()(X))
    assert (opened.example is None) == (name != "pair")


def test_a_file_named_like_a_package_opens_itself(folder):
    (folder / "json.py").write_text((folder / "made_here.py").read_text())
    assert torch.equal(open_model("json.py:net").model(X), net().eval()(X))
    assert json.loads("[1]") == [1]
    assert sys.modules["json"] is json


def test_a_file_opened_twice_is_run_once(folder):
    assert open_model("made_here.py:ready").model is open_model("./made_here.py:ready").model


def test_an_import_that_fails_leaves_no_half_module(folder):
    (folder / "made_here.py").write_text("x = 1\nraise KeyError('x')\n")
    with pytest.raises(ModelError, match=r"does not import: KeyError: 'x'; `python made_here\.py`"):
        open_model("made_here.py:net")
    assert "made_here" not in sys.modules


def test_a_tersor_file_opens_without_code(folder):
    small = run(net().eval(), RTN)
    save(small, "small.tersor", example=X)
    opened = open_model("small.tersor")
    assert opened.name == "small"
    assert torch.allclose(opened.model(X), small(X), rtol=1e-6, atol=1e-6)
    assert {name for name, _ in held(opened.model)} == {"0.weight", "3.weight"}
    assert opened.made_up
    assert [tuple(x.shape) for x in opened.example.values()] == [(2, 3, 8, 8)]


def test_a_tersor_file_without_graph_asks_for_the_code(folder):
    small = run(net().eval(), RTN)
    save(small, "weights.tersor", graph=False)
    with pytest.raises(ModelError, match=r"--like file\.py:factory"):
        open_model("weights.tersor")
    opened = open_model("weights.tersor", like=net())
    assert torch.equal(opened.model(X), small(X))


def test_an_exported_program_opens_and_can_be_compressed(folder):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net().eval(), (X,), dynamic_shapes=({0: batch},))
    torch.export.save(program, "net.pt2")
    opened = open_model("net.pt2")
    assert torch.allclose(opened.model(X), net().eval()(X), atol=1e-6)
    assert torch.equal(opened.example, X)
    assert [site.kind for site in walk(opened.model)] == ["Conv2d", "Linear"]
    small = run(opened.model, RTN)
    assert size(small).bytes < 0.4 * size(opened.model).bytes
    save(small, "net.tersor", example=opened.example)
    again = open_model("net.tersor").model
    for rows in (X, torch.cat([X, X + 0.1, X])):
        assert torch.allclose(again(rows), small(rows), atol=1e-6)


def test_a_file_that_is_no_program_is_refused(folder, capsys):
    (folder / "bad.pt2").write_bytes(b"PK\x03\x04 nothing")
    with zipfile.ZipFile("other.pt2", "w") as archive:
        archive.writestr("x.npy", b"1")
    for name in ("bad.pt2", "other.pt2"):
        with pytest.raises(ModelError, match=rf"{name} cannot be opened as an exported program"):
            open_model(name)
    # torch would log a traceback.
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "pytorch_model.bin"])
def test_weights_alone_are_not_a_network(folder, name):
    (folder / name).write_bytes(b"x")
    with pytest.raises(ModelError, match="holds weights without the network; write a function"):
        open_model(name)


def test_a_scripted_network_is_refused(folder):
    (folder / "scripted_here.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(torch.jit.script(nn.Linear(2, 2)))\n"
    )
    with pytest.raises(ModelError, match="TorchScript module, whose layers cannot be changed"):
        open_model("scripted_here.py:net")


def test_a_mistyped_name_is_met_with_the_closest(folder):
    with pytest.raises(ModelError, match=r"has no 'redy'; .* write made_here.py:ready"):
        open_model("made_here.py:redy")
