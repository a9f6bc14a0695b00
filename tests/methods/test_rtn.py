"""Round to nearest: half a level at most, on every kind of layer, with zeros kept."""

import pytest
import torch
from torch import nn

from surgery.nets import NETS, make
from tersor.errors import OptionError
from tersor.forms import Affine, Bitmask, NofM
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [{}, {"group_size": 3}, {"symmetric": False}, {"per_tensor": True}],
    ids=["channel", "group", "asymmetric", "tensor"],
)
def test_no_weight_moves_more_than_half_a_level(name, bits, options):
    net, _ = make(name)
    before = {site.name: site.weight.clone() for site in walk(net)}
    rtn(net, bits=bits, **options)
    for site in walk(net):
        assert isinstance(site.form, Affine)
        half = site.form.scale.float().max() / 2
        assert (site.weight - before[site.name]).abs().max() <= half * (1 + 1e-5)


def test_one_layer_worked_by_hand():
    # Row 1: top 3 at 3 bits, scale 6 / 3 = 2, so 3.1 -> 4; row 2: scale 3 / 3 = 1, so 1.4 -> 1.
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[6.0, 3.1], [3.0, 1.4]])
    rtn(layer, bits=3)
    assert layer.weight.tolist() == [[6.0, 4.0], [3.0, 1.0]]


def test_a_scale_belongs_to_an_output_channel():
    # Conv1D keeps (inputs, outputs): one scale per column.
    net, _ = make("conv1d of gpt-2")
    rtn(net)
    assert net[0].weight_form.scale.shape == (6, 1)
    assert net[0].weight_form.axis == 1


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv", "conv1d of gpt-2", "tied"])
def test_pruned_weights_stay_exactly_zero_and_sparse(name, bits, per_tensor):
    net, _ = make(name)
    magnitude(net, sparsity=0.5, scope="layer")
    zeros = {site.name: site.weight == 0 for site in walk(net)}
    rtn(net, bits=bits, per_tensor=per_tensor)
    for site in walk(net):
        assert (site.weight[zeros[site.name]] == 0).all()
        codes = site.form._modules["codes_form"]
        assert isinstance(codes, Bitmask)
        assert codes.bits == bits
        assert codes.values.numel() == int((site.weight != 0).sum())


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(("layer", "axis"), [("linear", 0), ("conv1d of gpt-2", 1)])
def test_n_of_m_weights_stay_n_of_m(per_tensor, layer, axis):
    net, _ = make(layer)
    site = walk(net)[0]
    weight = site.weight.movedim(axis, 0).reshape(-1, 2).clone()
    weight[torch.arange(len(weight)), weight.abs().argmin(1)] = 0
    weight = weight.reshape(site.weight.movedim(axis, 0).shape).movedim(0, axis)
    site.hold(NofM.encode(weight.contiguous(), n=1, m=2, axis=axis))
    rtn(net, bits=4, per_tensor=per_tensor, include=site.name)
    held = walk(net)[0]
    assert (held.weight[weight == 0] == 0).all()
    assert (held.weight - weight).abs().max() <= held.form.scale.float().max() / 2 * 1.001
    inner = held.form._modules["codes_form"]
    assert isinstance(inner, Bitmask if per_tensor else NofM)


@pytest.mark.parametrize("options", [{"symmetric": False}, {"bits": 1}])
def test_options_that_would_fill_a_pruned_layer_are_refused(options):
    net = magnitude(make("linear")[0], sparsity=0.5)
    with pytest.raises(OptionError, match=r"pruned layer '0.weight' of shape \(6, 8\)"):
        rtn(net, **options)


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(OptionError, match="per_tensor=True and group_size=4 contradict"):
        rtn(make("linear")[0], per_tensor=True, group_size=4)


def test_a_second_time_changes_nothing_and_other_options_do():
    net, _ = make("linear")
    rtn(net, bits=4)
    forms = [site.form for site in walk(net)]
    rtn(net, bits=4)
    assert [site.form for site in walk(net)] == forms
    rtn(net, bits=4, symmetric=False)
    assert [site.form for site in walk(net)] != forms
