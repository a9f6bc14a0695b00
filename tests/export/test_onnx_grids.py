"""Activations on a grid: the file computes with the integers of torch's simulation."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from tersor.errors import ExportError
from tersor.export import OnnxModel, onnx_grids, to_onnx
from tersor.forms.grid import DynamicGrid, Grid
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import decoded, fold
from tersor.surgery.grids import put

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

LAYERS = nn.Linear | nn.Conv2d | nn.ConvTranspose2d


def on_grids(net, x, outputs=(), signed=False, **options):
    """Weights rounded, each layer's input (and those outputs) on the grid that spans it."""
    net = copy.deepcopy(net)
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda layer, args, out: seen.update({layer: (args[0], out)}))
        for layer in net.modules()
        if isinstance(layer, LAYERS)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    rtn(net, **{"bits": 8, **options})
    for name, layer in net.named_modules():
        if layer in seen:
            for where, tensor in zip(("input", "output"), seen[layer], strict=True):
                if where == "input" or name in outputs:
                    low, high = tensor.min().item(), tensor.max().item()
                    put(layer, where, Grid.spanning(low, high, signed=signed))
    return net


def on_dynamic_grids(net, per_row=False, **options):
    net = rtn(copy.deepcopy(net), **options)
    for layer in net.modules():
        if isinstance(layer, LAYERS):
            put(layer, "input", DynamicGrid(per_row=per_row))
    return net


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(
    ("options", "signed"),
    [({}, False), ({}, True), ({"bits": 4}, False), ({"per_tensor": True}, False)],
)
def test_convolutions_run_on_integers(tmp_path, options, signed):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(2, 3, 9, 9)
    net = on_grids(net.eval(), x, ("4",), signed, **options)
    done = to_onnx(net, tmp_path / "net.onnx", example=x)
    assert (done.grids, done.fused) == (4, {"QLinearConv": 3})
    assert all(layer.note == "convolved as integers" for layer in done.layers)
    # Sums of integers differ from sums of floats where a value lies in the middle of two levels.
    assert done.difference.steps < 1.5
    assert done.default_difference.steps < 1.5


@pytest.mark.parametrize(
    ("rank", "symmetric", "bits"), [(2, True, 8), (3, True, 8), (2, False, 8), (3, False, 4)]
)
def test_linear_layers_run_on_integers(tmp_path, rank, symmetric, bits):
    x = torch.randn(
        (5, 64) if rank == 2 else (2, 5, 64), generator=torch.Generator().manual_seed(1)
    )
    net = on_grids(perceptron(), x, bits=bits, symmetric=symmetric)
    done = to_onnx(net, tmp_path / "net.onnx", example=x)
    assert done.fused == {"QGemm" if rank == 2 else "MatMulIntegerToFloat": 2}
    assert done.default_difference.relative < 1e-2
    assert all(layer.stored == f"int{bits} per channel" for layer in done.layers)


def test_one_layer_worked_by_hand(tmp_path):
    # x = 1.3 is 3 steps of 0.5 (2.6 rounded), w = 0.75 three of 0.25: 3 * 3 * 0.125 + 0.25.
    net = nn.Linear(1, 1)
    net.weight.data, net.bias.data = torch.tensor([[0.75]]), torch.tensor([0.25])
    rtn(net)
    with torch.no_grad():
        net.weight_form.scale.fill_(0.25)
        net.weight_form.codes.fill_(3)
    put(net, "input", Grid(0.5, 10, signed=False))
    to_onnx(net, tmp_path / "net.onnx", example=torch.tensor([[1.3]]))
    found = OnnxModel(tmp_path / "net.onnx")(torch.tensor([[1.3], [-9.0], [200.0]]))
    # The others are beyond the levels 0..255, which stand for -5.0 to 122.5.
    assert found.flatten().tolist() == [9 * 0.125 + 0.25, -30 * 0.125 + 0.25, 735 * 0.125 + 0.25]


@pytest.mark.parametrize(
    ("options", "rank"),
    [({}, 2), ({}, 3), ({"symmetric": False}, 3), ({"bits": 4}, 2), ({"per_tensor": True}, 2)],
)
def test_dynamic_grids_become_one_operator(tmp_path, rank, options):
    x = torch.randn(
        (5, 64) if rank == 2 else (2, 5, 64), generator=torch.Generator().manual_seed(1)
    )
    done = to_onnx(on_dynamic_grids(perceptron(), **options), tmp_path / "net.onnx", example=x)
    assert (done.grids, done.fused) == (2, {"DynamicQuantizeMatMul": 2})
    assert done.default_difference.relative < 1e-5


def test_grids_that_no_runtime_knows_are_computed(tmp_path):
    x = torch.randn(5, 64)
    done = to_onnx(on_dynamic_grids(perceptron(), per_row=True), tmp_path / "net.onnx", example=x)
    assert (done.grids, done.difference.relative < 1e-6) == (0, True)


@pytest.mark.parametrize("bits", [2, 5])
def test_narrow_grids_keep_their_levels(tmp_path, bits):
    net, x = nn.Linear(6, 6, bias=False), torch.linspace(-3, 3, 60).view(10, 6)
    net.weight.data = torch.eye(6)
    put(net, "input", Grid(0.3, 2, bits=bits, signed=False))
    to_onnx(net, tmp_path / "net.onnx", example=x)
    found = OnnxModel(tmp_path / "net.onnx")(x)
    with torch.no_grad():
        assert torch.allclose(found, net(x), atol=1e-6)
    assert len(found.unique()) == min(2**bits, len(net.input_grid(x).unique()))


def test_a_value_is_rounded_once_for_all_that_read_it(tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(4))
            grid = Grid(0.02, 100, signed=False)
            for layer in (self.one, self.two):
                put(layer, "input", grid)
            put(self.body, "output", copy.deepcopy(grid))
            put(self.three, "input", Grid(0.03, 100, signed=False))

        def forward(self, x):
            x = self.body(x)
            return self.one(x), self.two(x.view(-1, 2, 4).view(-1, 8)), self.three(x)

    done = to_onnx(rtn(Heads().eval()), tmp_path / "net.onnx", example=torch.randn(3, 8))
    assert done.grids == 2
    assert kinds(done.path).count("QuantizeLinear") == 2


def test_a_part_of_a_value_on_a_dynamic_grid_has_its_own(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(4, 4)
            put(self.body, "output", DynamicGrid())
            put(self.head, "input", DynamicGrid())

        def forward(self, x):
            return self.head(self.body(x)[:, :4])

    torch.manual_seed(1)
    net, x = rtn(Half().eval()), torch.randn(5, 8)
    net.body.weight_form.scale.data[6] *= 50
    done = to_onnx(net, tmp_path / "net.onnx", example=x)
    assert (done.grids, done.difference.steps < 0.01) == (2, True)


@pytest.mark.parametrize(
    "grid", [Grid.spanning(-3.0, 3.0), DynamicGrid()], ids=["fixed", "dynamic"]
)
def test_half_networks_round_in_float32(tmp_path, grid):
    net, x = rtn(nn.Linear(64, 32).eval().half()), torch.randn(5, 64).half()
    put(net, "input", grid)
    done = to_onnx(net, tmp_path / "net.onnx", example=x)
    assert (done.grids, done.difference.steps < 1) == (1, True)


def test_layers_beside_the_grids_stay_as_they_were(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    layers = (nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 3))
    net = on_grids(nn.Sequential(*layers, nn.Conv2d(4, 4, 1)).eval(), x)
    rtn(net, symmetric=False, include="2")
    rtn(net, group_size=2, include="3")
    done = to_onnx(net, tmp_path / "net.onnx", example=x)
    first, transposed, asymmetric, grouped = done.layers
    assert grouped.note == "convolved as floats: the integer convolution takes no groups"
    assert (first.note, transposed.note) == ("convolved as integers", "")
    assert asymmetric.note == "convolved as floats: the integer convolution takes no zero points"


def test_a_file_with_grids_runs_on_integers_unless_asked_otherwise(tmp_path):
    x = torch.randn(5, 64)
    grids = to_onnx(on_grids(perceptron(), x), tmp_path / "grids.onnx", example=x).path
    plain = to_onnx(rtn(perceptron(), bits=8), tmp_path / "plain.onnx", example=x).path
    for path, decode in ((grids, False), (plain, True)):
        chosen, asked = OnnxModel(path)(x), OnnxModel(path, decode=decode)(x)
        assert torch.equal(chosen, asked)
    assert not torch.equal(OnnxModel(plain)(x), OnnxModel(plain, decode=False)(x))


def test_a_difference_above_the_tolerance_is_refused(tmp_path, monkeypatch):
    x = torch.randn(5, 64)
    net, honest = on_grids(perceptron(), x), onnx_grids._rounded
    wrong = Grid(net[0].input_grid.scale * 1.5, 0, signed=False)
    monkeypatch.setattr(onnx_grids, "_rounded", lambda grid, *rest: honest(wrong, *rest))
    with pytest.raises(ExportError, match="more than tolerance="):
        to_onnx(net, tmp_path / "net.onnx", example=x)


def test_a_pretrained_network_runs_on_integers(shared_data, tmp_path):
    net, images = zoo.resnet20(), zoo.cifar10()[0]
    fold(net, images[:2])
    second = [name for name, _ in net.named_modules() if name.endswith("conv2")]
    net = on_grids(net, images[:64], second)
    done = to_onnx(net, tmp_path / "net.onnx", example=images[:2])
    # The first one's output is read as floats too, by the shortcut around the first block.
    assert done.fused == {"QGemm": 1, "QLinearConv": 18}
    assert done.bytes < 300_000
    with torch.inference_mode(), decoded(net):
        wanted = torch.cat([net(part) for part in images.split(200)]).argmax(1).numpy()
    found = OnnxModel(done.path)(images).argmax(1).numpy()
    # 1,017 images: what the last bit of a sum decides moves few.
    assert np.mean(found != wanted) < 0.01
