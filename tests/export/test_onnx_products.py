"""Linear layers of coded weights: ONNX Runtime multiplies every one of them by the codes."""

import pytest
import torch
from torch import nn

from tersor.export import to_onnx
from tersor.methods.quantize.rtn import rtn

pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "options",
    [{"bits": 8}, {"bits": 4, "group_size": 16}, {"bits": 2, "group_size": 16, "symmetric": False}],
    ids=str,
)
def test_every_layer_runs_on_its_codes(tmp_path, options, rank):
    torch.manual_seed(0)
    layers = (nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False), nn.Tanh())
    net = rtn(nn.Sequential(*layers, nn.Linear(32, 32)).eval(), **options)
    x = torch.randn((5, 64) if rank == 2 else (2, 5, 64))
    done = to_onnx(net, tmp_path / "net.onnx", example=x)
    assert done.fused == {"MatMulNBits": 3}
    assert done.difference.relative < 1e-6
    assert done.default_difference.relative < 0.03


def test_a_bias_before_an_activation_is_added_exactly(tmp_path):
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
    net[0].weight.data, net[0].bias.data = torch.tensor([[1.0], [-1.0]]), torch.tensor([0.5, -0.25])
    done = to_onnx(rtn(net, bits=8), tmp_path / "net.onnx", example=torch.tensor([[2.0], [-3.0]]))
    assert done.difference.absolute == 0
