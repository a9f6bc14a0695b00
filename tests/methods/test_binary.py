"""Binary weights: XNOR-Net's scale, more planes, and what is refused."""

import pytest
import torch
from torch import nn

from surgery.nets import NETS, make
from tersor.errors import OptionError
from tersor.forms import Affine, BitPlanes
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.binary import binary
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk


@pytest.mark.parametrize("name", NETS)
def test_one_plane_is_the_sign_times_the_mean_size(name):
    net, _ = make(name)
    before = {site.name: site.weight.clone() for site in walk(net)}
    binary(net)
    for site in walk(net):
        assert isinstance(site.form, Affine)
        rows = before[site.name].movedim(site.axis, 0).flatten(1)
        found = site.weight.movedim(site.axis, 0).flatten(1)
        mean = rows.abs().mean(1, keepdim=True)
        expected = torch.where(rows < 0, -mean, mean)
        # Its scale is the next number of 8 significant bits.
        assert torch.allclose(found, expected, rtol=2**-7)


@pytest.mark.parametrize("name", NETS)
def test_every_plane_takes_some_of_the_error(name):
    errors = []
    for planes in (1, 2, 3):
        net, _ = make(name)
        before = {site.name: site.weight.clone() for site in walk(net)}
        binary(net, planes=planes, group_size=16)
        sites = walk(net)
        assert all(isinstance(site.form, BitPlanes) == (planes > 1) for site in sites)
        errors.append(sum((s.weight - before[s.name]).square().sum().item() for s in sites))
    assert errors[2] < 0.6 * errors[1] < 0.6 * 0.6 * errors[0]


def test_groups_worked_by_hand():
    layer = nn.Linear(3, 1)
    layer.weight.data = torch.tensor([[1.0, -3.0, -4.0]])
    assert binary(layer, group_size=2).weight.tolist() == [[2, -2, -4]]


def test_wrong_use_is_refused():
    with pytest.raises(OptionError, match=r'"0.weight" of shape \(6, 8\) was pruned, and signs'):
        binary(magnitude(make("linear")[0], sparsity=0.5))
    with pytest.raises(OptionError, match=r'"0\.weight" .* is held as affine already'):
        binary(rtn(make("linear")[0]))
    with pytest.raises(OptionError, match="planes=5"):
        binary(make("linear")[0], planes=5)
