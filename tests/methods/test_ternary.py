"""Ternary weights: the scale is the best there is, the rules are the papers', zeros stay."""

import pytest
import torch
from torch import nn

from surgery.nets import NETS, make
from tersor.errors import OptionError
from tersor.forms import Affine, Bitmask
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.methods.quantize.ternary import best_scale, ternary
from tersor.surgery import walk


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def least_error(row):
    """Over every number of weights that become the scale: TWN, eq. 3, by trying them all."""
    ordered = row.abs().double().sort(descending=True).values
    return min(
        (ordered[:k] - ordered[:k].mean()).square().sum() + ordered[k:].square().sum()
        for k in range(1, len(row) + 1)
    ).item()


def twn(row):
    """Li et al. 2016, eq. 6 and 5: a threshold of 0.7 mean|w|, the mean of what is above."""
    above = row.abs() > 0.7 * row.abs().mean()
    return row.sign() * above * row.abs()[above].mean()


def error(one, other):
    return (one - other).double().square().sum().item()


def layer_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


@pytest.mark.parametrize("inputs", [1, 2, 7, 64, 301])
@pytest.mark.parametrize("kind", ["normal", "heavy", "alike"])
def test_no_scale_is_better(inputs, kind):
    weight = normal((6, inputs), inputs)
    weight = {"normal": weight, "heavy": weight**3, "alike": weight.sign()}[kind]
    found = ternary(layer_of(weight)).weight.detach()
    for row, mine in zip(weight, found, strict=True):
        # A scale of 8 significant bits is off by 2**-8 of itself.
        slack = row.square().sum().item() * 2**-16
        least = least_error(row)
        assert least - 1e-6 <= error(row, mine) <= least + slack
        assert error(row, mine) <= error(row, twn(row)) + slack


def test_it_beats_the_approximation_of_the_paper():
    weight = normal((50, 40)) ** 3
    exact = error(ternary(layer_of(weight)).weight.detach(), weight)
    approximate = sum(error(twn(row), row) for row in weight)
    assert exact < 0.95 * approximate


def test_best_scale_worked_by_hand():
    # Sums 4, 7, 8 squared over 1, 2, 3: 16, 24.5, 21.3; so two weights, and their mean is 3.5.
    assert best_scale(torch.tensor([[3.0, 1.0, 4.0]])).tolist() == [3.5]
    assert ternary(layer_of(torch.tensor([[3.0, 1.0, -4.0]]))).weight.tolist() == [[3.5, 0, -3.5]]


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("group_size", [None, 5])
def test_absmean_is_that_of_bitnet(per_tensor, group_size):
    if per_tensor and group_size:
        pytest.skip("they contradict each other")
    weight = normal((4, 13))
    options = {"rule": "absmean", "group_size": group_size, "per_tensor": per_tensor}
    found = ternary(layer_of(weight), **options).weight.detach()
    groups = [weight] if per_tensor else list(weight.split(group_size or 13, 1))
    parts = []
    for group in groups:
        mean = group.abs().mean() if per_tensor else group.abs().mean(1, keepdim=True)
        mean = mean.bfloat16().float()
        parts.append((group / mean).round().clamp(-1, 1) * mean)
    assert torch.allclose(found, torch.cat(parts, 1))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", [{}, {"group_size": 3}, {"per_tensor": True}], ids=str)
def test_three_levels_per_scale(name, options):
    net, _ = make(name)
    before = {site.name: site.weight.clone() for site in walk(net)}
    ternary(net, **options)
    for site in walk(net):
        assert isinstance(site.form, Affine)
        assert site.form.bits == 2
        assert set(site.form.codes.unique().tolist()) <= {-1, 0, 1}
        assert ((site.weight == 0) | (site.weight.sign() == before[site.name].sign())).all()
        assert error(site.weight, before[site.name]) < before[site.name].double().square().sum()


@pytest.mark.parametrize("name", ["linear", "conv", "conv1d of gpt-2", "tied"])
def test_pruned_weights_stay_exactly_zero_and_sparse(name):
    net = magnitude(make(name)[0], sparsity=0.5, scope="layer")
    zeros = {site.name: site.weight == 0 for site in walk(net)}
    ternary(net)
    for site in walk(net):
        assert (site.weight[zeros[site.name]] == 0).all()
        assert isinstance(site.form._modules["codes_form"], Bitmask)


def test_a_layer_of_zeros_stays_one():
    assert not ternary(layer_of(torch.zeros(2, 3))).weight.any()


def test_wrong_use_is_refused():
    with pytest.raises(OptionError, match="per_tensor=True and group_size=4 contradict"):
        ternary(make("linear")[0], per_tensor=True, group_size=4)
    with pytest.raises(OptionError, match=r'"0\.weight" .* is held as affine already'):
        ternary(rtn(make("linear")[0]))
