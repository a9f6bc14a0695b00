"""Narrow floats: within their rounding on every layer, biases and norms too, ranges kept."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import zoo
from surgery.nets import NETS, make
from tersor.codec import load, save
from tersor.errors import OptionError
from tersor.forms import Bitmask, Dense, NofM
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.cast import TYPES, cast
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import decoded, walk
from tersor.surgery.walk import vectors

# Half a step next to a number, relative to it; half a step below the normal range.
ROUNDING = {"fp16": 2**-11, "bf16": 2**-8, "fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3}
SUBNORMAL = {"fp8_e4m3": 2**-10, "fp8_e5m2": 2**-17}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("format", TYPES)
def test_every_weight_is_within_its_rounding(name, format):
    net, _ = make(name)
    before = {site.name: site.weight.clone() for site in walk(net)}
    cast(net, format=format)
    for site in walk(net):
        assert site.form.stored.dtype == TYPES[format]
        weight = before[site.name]
        bound = ROUNDING[format] * weight.abs()
        if format in SUBNORMAL:
            scale = site.form.scale.float()[:, 0]
            along = [len(scale) if dim == site.axis else 1 for dim in range(weight.dim())]
            # A scale rounded down clips the largest weight by 2**-9 of it, less than half a step.
            bound = torch.maximum(bound, SUBNORMAL[format] * scale.reshape(along)) * (1 + 1e-6)
        else:
            bound = bound + 2**-25
        assert ((site.weight - weight).abs() <= bound).all()


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_biases_and_norms_are_cast_and_counters_are_not(format):
    net = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)).eval()
    net[1].weight.data.normal_()
    expected = net[1].weight.detach().to(TYPES[format]).float()
    cast(net, format=format)
    assert not vectors(net)
    assert torch.equal(net[1].weight, expected)
    assert net[1].running_mean.dtype == torch.float32
    held = [form for form in net.modules() if isinstance(form, Dense)]
    assert sum(form.stored_bits() for form in held) == 16 * (4 * 4 * 3 + 4 + 4 + 4)


def test_eight_bits_are_for_weights_alone():
    net = cast(make("linear")[0], format="fp8_e4m3")
    assert len(vectors(net)) == 2


@pytest.mark.parametrize(("format", "most"), [("fp8_e4m3", 448), ("fp8_e5m2", 57344)])
def test_float8_is_that_of_another_library(format, most):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 100, generator=generator) ** 3
    layer = nn.Linear(100, 64, bias=False)
    layer.weight.data = weight.clone()
    cast(layer, format=format)
    scale = (weight.abs().amax(1, keepdim=True) / most).bfloat16().float()
    theirs = getattr(ml_dtypes, {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}[format])
    levels = (weight / scale).clamp(-most, most).numpy().astype(theirs).astype(np.float32)
    assert torch.equal(layer.weight, torch.from_numpy(levels) * scale)


def test_one_channel_worked_by_hand():
    # 7 / 448 = 2**-6; 1.2 becomes 76.8 of them, between 72 and 80, which are 1.125 and 1.25.
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[7.0, 1.2]])
    assert cast(layer, format="fp8_e4m3").weight.tolist() == [[7.0, 1.25]]


@pytest.mark.parametrize("format", TYPES)
@pytest.mark.parametrize("name", ["linear", "conv", "conv1d of gpt-2", "tied"])
def test_a_pruned_layer_keeps_its_mask(name, format, tmp_path):
    net, x = make(name)
    magnitude(net, sparsity=0.5)
    before = {site.name: (site.weight.clone(), site.form.stored_bits()) for site in walk(net)}
    cast(net, format=format)
    for site in walk(net):
        assert isinstance(site.form, Bitmask)
        weight, bits = before[site.name]
        assert torch.equal(site.weight == 0, weight == 0)
        assert (site.weight - weight).abs().max() <= ROUNDING[format] * weight.abs().max()
        kept = int((weight != 0).sum())
        scale = 16 if format.startswith("fp8") else 0
        assert bits - site.form.stored_bits() == kept * (32 - 8 * TYPES[format].itemsize) - scale
    again = load(save(net, tmp_path / "net.tersor"), into=make(name)[0])
    assert torch.equal(again(x), net(x))


def test_n_of_m_values_have_scales_for_each_channel():
    layer = nn.Linear(8, 4)
    weight = layer.weight.detach() * torch.tensor([1.0, 0.0] * 4)
    walk(layer)[0].hold(NofM.encode(weight, n=1, m=2))
    cast(layer, format="fp8_e4m3")
    inner = layer.weight_form._modules["values_form"]
    assert inner.scale.shape == (4, 1)
    assert (layer.weight - weight).abs().max() <= 2**-4 * weight.abs().max()


def test_what_takes_no_more_bits_stays_as_it_is():
    net = cast(make("linear")[0], format="bf16")
    forms = [site.form for site in walk(net)]
    for format in ("bf16", "fp16"):
        cast(net, format=format)
        assert [site.form for site in walk(net)] == forms
    cast(net, format="fp8_e5m2")
    assert [site.form.stored.dtype for site in walk(net)] == [torch.float8_e5m2] * 2
    half = make("linear")[0].half()
    cast(half, format="bf16")
    assert all(site.form is None for site in walk(half))


def test_wrong_use_is_refused_before_anything_is_changed():
    net = make("linear")[0]
    net[2].bias.data[1] = 70_000
    with pytest.raises(OptionError, match=r'at most 65504, but "2.bias" of shape \(4,\) reaches 7'):
        cast(net)
    assert all(site.form is None for site in walk(net))
    with pytest.raises(OptionError, match=r'"0.weight" of shape \(6, 8\) is held as affine'):
        cast(rtn(make("linear")[0]))


@pytest.mark.parametrize("scale", [torch.ones(2, 1), torch.ones(1, 1).bfloat16()])
def test_scales_that_do_not_fit_are_refused(scale):
    parts = {"stored": torch.ones(2, 3).to(torch.float8_e4m3fn), "scale": scale}
    with pytest.raises(ValueError, match=r"scale must be bfloat16 of shape \(2, 1\)"):
        Dense.build({"axis": 0}, parts, (2, 3), torch.float32)
    parts["scale"] = torch.ones(2, 1).bfloat16()
    for axis in (2, -1, "0", True):
        with pytest.raises(ValueError, match=r"axis=.* is no dimension"):
            Dense.build({"axis": axis}, parts, (2, 3), torch.float32)


def test_images_are_told_apart_as_before(shared_data):
    images = zoo.cifar10()[0][:256]
    with torch.no_grad():
        expected = zoo.resnet20()(images).argmax(1)
        for format, most in {"fp16": 0, "bf16": 2, "fp8_e4m3": 12, "fp8_e5m2": 25}.items():
            net = cast(zoo.resnet20(), format=format)
            with decoded(net):
                assert int((net(images).argmax(1) != expected).sum()) <= most
