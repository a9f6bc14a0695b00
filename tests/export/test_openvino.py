"""OpenVINO files hold small weights, multiply integers on a grid, and agree with torch."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from tersor.errors import ExportError, MissingExtra, ModelError, OptionError
from tersor.export import OpenvinoModel, openvino, openvino_run, to_openvino
from tersor.forms import Bitmask
from tersor.forms.grid import Grid
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import decoded, fold, hold
from tersor.surgery.grids import put

pytest.importorskip("openvino", reason="needs the extra openvino")
pytest.importorskip("onnxscript", reason="needs the extra openvino")


class Named(nn.Module):
    """Several inputs and outputs, an embedding and a linear layer."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(60, 64), nn.Linear(64, 10)
        rtn(self.eval(), **options)

    def forward(self, ids, scale):
        rows = self.table(ids)
        return {"logits": self.head(rows) * scale, "rows": (rows,)}


def on_grids(net, x):
    """Every convolution and linear layer of a chain on grids that span what it reads."""
    rtn(net.eval(), bits=8)
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                put(layer, "input", Grid.spanning(x.min().item(), x.max().item()))
            x = layer(x)
    return net


@pytest.mark.parametrize(
    "options",
    [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 32, "symmetric": False}],
    ids=str,
)
def test_a_file_is_called_like_its_model(tmp_path, options):
    net = Named(**options)
    ids, scale = torch.randint(0, 60, (2, 5)), torch.rand(2, 1, 1)
    done = to_openvino(net, tmp_path / "net.xml", example={"ids": ids, "scale": scale})
    assert done.difference.relative < 1e-5
    assert done.inputs["ids"] == ("batch", "length")
    weights = sum(layer.bytes for layer in done.layers)
    assert weights <= (tmp_path / "net.bin").stat().st_size < weights + 400
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == done.bytes
    model = OpenvinoModel(done.path)
    assert model.input_names == ["ids", "scale"]
    ids, scale = torch.randint(0, 60, (4, 3)), torch.rand(4, 1, 1)
    with torch.no_grad():
        wanted, found = net(ids, scale), model(ids, scale=scale)
    assert torch.allclose(found["logits"], wanted["logits"], atol=1e-5)
    assert torch.allclose(found["rows"][0], wanted["rows"][0], atol=1e-5)


def test_what_is_on_a_grid_is_multiplied_as_integers(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 9)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten())
    net = on_grids(nn.Sequential(*layers, nn.Linear(400, 10)), x)
    done = to_openvino(net, tmp_path / "net.xml", example=x)
    assert done.products == {"Convolution u8": 2, "FullyConnected u8": 1}
    assert done.grids == 3
    assert done.difference.steps < 3
    json.dumps(done.as_json())


def test_without_grids_an_exact_session_computes_in_floats(tmp_path):
    x = torch.randn(4, 64)
    net = rtn(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), bits=8)
    done = to_openvino(net, tmp_path / "net.xml", example=x)
    assert done.difference.relative < 1e-5
    with torch.no_grad():
        exact, free = OpenvinoModel(done.path)(x), OpenvinoModel(done.path, exact=False)(x)
        assert torch.allclose(exact, net(x), atol=1e-5)
    assert (free - exact).abs().max() <= 1.01 * done.default_difference.absolute + 1e-5


def test_compiling_by_size_changes_nothing_but_speed(tmp_path):
    net = Named(bits=8)
    example = {"ids": torch.randint(0, 60, (2, 5)), "scale": torch.rand(2, 1, 1)}
    path = to_openvino(net, tmp_path / "net.xml", example=example).path
    free, fixed = OpenvinoModel(path), OpenvinoModel(path, by_size=True)
    for rows in (*range(1, 11), 1, 10):
        ids, scale = torch.randint(0, 60, (rows, 4)), torch.rand(rows, 1, 1)
        assert torch.allclose(fixed(ids, scale)["logits"], free(ids, scale)["logits"], atol=1e-5)
    assert len(fixed._by_size) == 8


def test_a_pretrained_network_runs_on_integers(shared_data, tmp_path):
    net, images = zoo.resnet20(), zoo.cifar10()[0]
    fold(net, images[:2])
    rtn(net, bits=8)
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                low = -2.5 if layer is net.conv1 else 0.0
                put(layer, "input", Grid.spanning(low, 6.0))
    done = to_openvino(net, tmp_path / "net.xml", example=images[:2])
    assert done.products["Convolution u8"] == 19
    with torch.inference_mode(), decoded(net):
        wanted = torch.cat([net(part) for part in images.split(200)]).argmax(1)
    assert (OpenvinoModel(done.path)(images).argmax(1) != wanted).float().mean() < 0.01


def test_a_difference_above_the_tolerance_keeps_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "net.xml"
    path.write_text("before", encoding="utf-8")
    net, x = rtn(nn.Linear(8, 8), bits=8), torch.randn(2, 8)
    honest = openvino.infer
    monkeypatch.setattr(openvino, "infer", lambda *given: [2 * y for y in honest(*given)])
    with pytest.raises(ExportError, match="differ from torch's by 1 of the largest"):
        to_openvino(net, path, example=x)
    assert path.read_text(encoding="utf-8") == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["net.xml"]


def test_masks_stay_masks(tmp_path):
    net, x = nn.Linear(48, 16).eval(), torch.randn(2, 48)
    net.weight.data[torch.rand(16, 48) > 0.2] = 0
    rtn(net, bits=8)
    hold(net.weight_form, "codes", Bitmask.encode(net.weight_form.codes, bits=8))
    done = to_openvino(net, tmp_path / "net.xml", example=x)
    assert done.difference.relative < 1e-5
    # A bit for each weight and a byte for each of a fifth of them, scales, bias, and constants.
    assert (tmp_path / "net.bin").stat().st_size < 48 * 16 * 0.4 + 250


def test_one_size_alone_is_said(tmp_path):
    class Fixed(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(2, 24))

    done = to_openvino(Fixed(24, 4), tmp_path / "net.xml", example=torch.randn(2, 4, 6))
    assert "outputs were compared on the example alone: no other size could be tried" in done.notes


def test_a_file_that_does_not_run_is_refused(tmp_path, monkeypatch):
    def fails(*given, **options):
        raise RuntimeError("Check failed at src/plugins/a.cpp:1:\nno memory for it")

    monkeypatch.setattr(openvino, "compiled", fails)
    with pytest.raises(ExportError, match="does not run the file: no memory for it; export to ONN"):
        to_openvino(nn.Linear(8, 8), tmp_path / "net.xml", example=torch.randn(2, 8))
    assert list(tmp_path.iterdir()) == []


def test_inputs_of_a_wrong_size_are_refused(tmp_path):
    path = to_openvino(nn.Linear(8, 4), tmp_path / "net.xml", example=torch.randn(2, 8)).path
    for by_size in (False, True):
        with pytest.raises(ModelError, match=r"'input' .*shape \(2, 7\), where .* takes \[\?,8\]"):
            OpenvinoModel(path, by_size=by_size)(torch.randn(2, 7))


def test_what_does_not_fit_is_refused(tmp_path):
    net, x = nn.Linear(48, 8), torch.randn(2, 48)
    with pytest.raises(OptionError, match=r"does not end in \.xml"):
        to_openvino(net, tmp_path / "net.onnx", example=x)
    with pytest.raises(OptionError, match="tolerance=0 is relative"):
        to_openvino(net, tmp_path / "net.xml", example=x, tolerance=0)
    with pytest.raises(OptionError, match="group_size=32 cuts the last group of 'weight'"):
        to_openvino(rtn(net, bits=4, group_size=32), tmp_path / "net.xml", example=x)
    with pytest.raises(ModelError, match="is no file"):
        OpenvinoModel(tmp_path / "net.xml")
    Path(tmp_path / "net.xml").write_text("nonsense", encoding="utf-8")
    with pytest.raises(ExportError, match="OpenVINO cannot load"):
        OpenvinoModel(tmp_path / "net.xml")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(openvino_run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tersor\[openvino\]"):
        to_openvino(nn.Linear(8, 8), tmp_path / "net.xml", example=torch.randn(2, 8))
