"""Residual form: a base and two thin matrices, in files, in ONNX, and refused where they misfit."""

import copy

import pytest
import torch
from torch import nn

from tersor.codec import load, save
from tersor.forms import KINDS, Affine, Codebook, Residual
from tersor.surgery import form_of, hold


def residual(shape, axis=0, rank=2, bits=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    base = Affine.encode(torch.randn(shape, generator=generator).to(dtype), bits=3, axis=axis)
    outputs, inputs = shape[axis], base.codes.numel() // shape[axis]
    left, right = torch.randn(outputs, rank), torch.randn(rank, inputs)
    form = Residual(base.dense(), left, right, axis=axis, shape=shape, dtype=dtype)
    hold(form, "base", base)
    if bits:
        hold(form, "left", Affine.encode(left, bits=bits, axis=1))
        hold(form, "right", Affine.encode(right, bits=bits))
    return form


def test_a_weight_worked_by_hand():
    # Base 1 everywhere; (1, 2) times (3, 4) adds 3 4 and 6 8.
    base, left, right = torch.ones(2, 2), torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])
    form = Residual(base, left, right, axis=0, shape=(2, 2), dtype=torch.float32)
    assert form.dense().tolist() == [[4, 5], [7, 9]]
    turned = Residual(base, left, right, axis=1, shape=(2, 2), dtype=torch.float32)
    assert turned.dense().tolist() == [[4, 7], [5, 9]]


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 10), 0), ((6, 10), 1), ((5, 3, 3, 2), 0), ((4, 8, 3), 1)]
)
def test_each_element_is_its_base_plus_a_sum_over_the_rank(shape, axis):
    form = residual(shape, axis, rank=3)
    dense, base = form.dense().movedim(axis, 0), form.base.movedim(axis, 0)
    flat, rough = dense.reshape(len(dense), -1), base.reshape(len(dense), -1)
    left, right = form.left.tolist(), form.right.tolist()
    for o in range(flat.shape[0]):
        for i in range(flat.shape[1]):
            added = sum(left[o][r] * right[r][i] for r in range(3))
            assert flat[o, i].item() == pytest.approx(rough[o, i].item() + added, abs=1e-5)


def test_bits_are_those_of_the_base_and_of_the_factors():
    # 6 x 10 at 3 bits and 6 scales; 2 x (6 + 10) at 8 bits and 2 scales for each factor.
    assert residual((6, 10)).stored_bits() == 60 * 3 + 6 * 16 + 2 * 16 * 8 + 4 * 16
    assert residual((6, 10), bits=None).tunable() == ("left", "right")
    assert residual((6, 10)).tunable() == ()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_file_gives_it_back_and_no_half_changes_what_is_stored(bits, tmp_path):
    net = nn.Sequential(nn.Conv1d(8, 6, 3), nn.ReLU()).eval()
    form = residual((6, 8, 3), bits=bits)
    hold(net[0], "weight", form)
    path = save(net, tmp_path / "net.tersor", example=torch.rand(2, 8, 9))
    x = torch.rand(3, 8, 12)
    for loaded in (load(path), load(path, into=nn.Sequential(nn.Conv1d(8, 6, 3), nn.ReLU()))):
        again = form_of(loaded.get_submodule("0"), "weight")
        assert torch.equal(again.dense(), form.dense())
        assert again.stored_bits() == form.stored_bits()
        assert torch.equal(loaded(x), net(x))
    half = copy.deepcopy(net).half()[0]
    assert half.weight.dtype == torch.float16
    assert half.weight_form.left.dtype == form.left.dtype
    assert half.weight_form.stored_bits() == form.stored_bits()


@pytest.mark.parametrize(("shape", "axis"), [((6, 40), 0), ((40, 6), 1), ((5, 3, 3, 3), 0)])
@pytest.mark.parametrize("bits", [None, 8])
def test_onnx_runtime_computes_the_same_weight_from_what_is_stored(shape, axis, bits):
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from export.test_onnx_forms import lowered

    form = residual(shape, axis, bits=bits)
    value, writer = lowered(form)
    assert torch.allclose(value, form.dense(), atol=1e-5)
    assert max(size for _, size in writer.stored.values()) <= max(
        form.base.numel(), 4 * 2 * max(form.left.shape[0], form.right.shape[1])
    )


BAD = {
    "axis": ({"axis": 2}, {}),
    "axis of another type": ({"axis": True}, {}),
    "base of another shape": ({}, {"base": torch.zeros(10, 6)}),
    "base of codes": ({}, {"base": torch.zeros(6, 10, dtype=torch.int8)}),
    "no rank": ({}, {"left": torch.zeros(6, 0), "right": torch.zeros(0, 10)}),
    "too much rank": ({}, {"left": torch.zeros(6, 7), "right": torch.zeros(7, 10)}),
    "left of another shape": ({}, {"left": torch.zeros(7, 2)}),
    "left a vector": ({}, {"left": torch.zeros(12)}),
    "right of another rank": ({}, {"right": torch.zeros(3, 10)}),
    "right of codes": ({}, {"right": torch.zeros(2, 10, dtype=torch.int8)}),
}


@pytest.mark.parametrize("name", BAD)
def test_parts_that_do_not_belong_together_are_refused(name):
    form = residual((6, 10))
    config, parts = BAD[name]
    whole = {part: getattr(form, part) for part, _ in form.parts()}
    Residual.build(form.config(), whole, form.shape, form.dtype)
    with pytest.raises(ValueError, match=r"must be|is no dimension"):
        Residual.build(form.config() | config, whole | parts, form.shape, form.dtype)


def test_any_form_may_hold_the_base():
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    base = Codebook.encode(weight, torch.linspace(-1, 1, 4))
    left, right = torch.ones(8, 1), torch.ones(1, 12)
    form = Residual(weight, left, right, axis=0, shape=(8, 12), dtype=torch.float32)
    hold(form, "base", base)
    assert torch.equal(form.dense(), base.dense() + 1)
    assert KINDS["residual"] is Residual
