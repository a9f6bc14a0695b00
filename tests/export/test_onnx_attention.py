"""Attention loses detours on its way into the file, and computes what torch computes."""

from collections import Counter

import pytest
import torch
from torch import nn

from tersor.export import OnnxModel, to_onnx

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


class Attention(nn.Module):
    """Self-attention of four heads; the mask is True where a token may be looked at."""

    def __init__(self, masked):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.masked = nn.Linear(32, 96), masked

    def forward(self, x, seen):
        q, k, v = self.inner(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        mask = seen[:, None, None, :] if self.masked == "bool" else None
        if self.masked == "float":
            mask = torch.where(seen[:, None, None, :], 0.0, -torch.inf)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def exported(path, masked):
    x, seen = torch.randn(2, 5, 32), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    net = Attention(masked).eval()
    return net, to_onnx(net, path, example=(x, seen))


@pytest.mark.parametrize("masked", ["bool", "none", "float"])
def test_detours_are_gone_and_outputs_are_the_same(tmp_path, masked):
    net, done = exported(tmp_path / "net.onnx", masked)
    kinds = Counter(node.op_type for node in onnx.load(done.path).graph.node)
    assert kinds["IsNaN"] == 0
    perms = [
        list(node.attribute[0].ints)
        for node in onnx.load(done.path).graph.node
        if node.op_type == "Transpose"
    ]
    assert [0, 1, 3, 2] in perms
    assert [0, 2, 1] not in perms
    x, seen = 3 * torch.randn(4, 9, 32), torch.rand(4, 9) > 0.4
    seen[:, 0] = True
    with torch.no_grad():
        assert torch.allclose(OnnxModel(done.path)(x, seen), net(x, seen), atol=1e-5)


def test_a_mask_of_finite_numbers_keeps_them(tmp_path):
    class Soft(Attention):
        def forward(self, x, seen):
            q, k, v = self.inner(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
            mask = torch.where(seen[:, None, None, :], 0.0, -2.0)
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    x, seen = torch.randn(2, 5, 32), torch.rand(2, 5) > 0.5
    done = to_onnx(Soft("float").eval(), tmp_path / "net.onnx", example=(x, seen))
    assert done.difference.relative < 1e-5


def test_a_row_that_sees_nothing_stays_finite(tmp_path):
    _, done = exported(tmp_path / "net.onnx", "bool")
    x, seen = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    assert OnnxModel(done.path)(x, seen).isfinite().all()
