"""Weight sharing: Lloyd's algorithm, against a slow one and the best clustering there is."""

from itertools import combinations

import pytest
import torch
from torch import nn

from surgery.nets import NETS, make
from tersor.forms import Bitmask, Codebook, NofM
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.share.kmeans import clusters, kmeans
from tersor.surgery import walk


def normal(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(weights, values):
    return (weights[:, None] - values).square().amin(1).sum().item()


def naive_lloyd(weights, centers):
    """Assign each weight to its nearest center, move each center to its weights' mean, repeat."""
    while True:
        owner = (weights[:, None] - centers).abs().argmin(1)
        counts = torch.bincount(owner, minlength=len(centers))
        assert counts.all()
        moved = torch.stack([weights[owner == i].mean() for i in range(len(centers))])
        if torch.equal(moved, centers):
            return moved
        centers = moved


def best(weights, count):
    """The least squared error over every way to cut the sorted weights into `count` stretches."""
    ordered = weights.sort().values
    return min(
        sum((part - part.mean()).square().sum().item() for part in ordered.tensor_split(list(cuts)))
        for cuts in combinations(range(1, len(ordered)), count - 1)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("start", ["linear", "density"])
def test_equals_a_slow_lloyd(count, seed, start):
    weights = normal(400, seed)
    if start == "linear":
        centers = torch.linspace(weights.min(), weights.max(), count, dtype=torch.float64)
    else:
        ranks = [int((i + 0.5) / count * 400) for i in range(count)]
        centers = weights.sort().values[ranks]
    expected = naive_lloyd(weights, centers)
    assert torch.allclose(clusters(weights, count, start), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_comes_near_the_best_clustering_there_is(count, seed):
    weights = normal(14, seed)
    least = best(weights, count)
    found = [error(weights, clusters(weights, count, start)) for start in ("linear", "density")]
    assert least * (1 - 1e-9) <= min(found) <= 1.35 * least


@pytest.mark.parametrize("count", [2, 7, 16, 100, 256])
@pytest.mark.parametrize("start", ["linear", "density"])
@pytest.mark.parametrize("kind", ["normal", "outliers", "steps"])
def test_every_value_is_the_mean_of_its_weights_and_none_is_idle(count, start, kind):
    weights = normal(3000, count)
    if kind == "outliers":
        weights[:3] *= 1000
    if kind == "steps":
        weights = (weights * 200).round() / 200
    values = clusters(weights, count, start)
    assert len(values) == count
    assert (values.diff() > 0).all()
    owner = (weights[:, None] - values).abs().argmin(1)
    assert torch.bincount(owner, minlength=count).all()
    means = torch.stack([weights[owner == i].mean() for i in range(count)])
    assert torch.allclose(values, means, rtol=1e-9, atol=1e-12)


def test_clusters_worked_by_hand():
    # From 0 and 10: 0 1 2 | 9 10 gives 1 and 9.5, and no weight changes sides.
    weights = torch.tensor([0.0, 10.0, 1.0, 9.0, 2.0])
    assert clusters(weights, 2).tolist() == [1.0, 9.5]


def test_a_pruned_layer_with_two_values_keeps_zero_and_the_mean():
    layer = nn.Linear(4, 1, bias=False)
    walk(layer)[0].hold(Bitmask.encode(torch.tensor([[1.0, 0.0, 2.0, 6.0]])))
    # Zero and one other value, the mean 3 of 1, 2 and 6; then 1 is nearer to zero.
    assert kmeans(layer, values=2).weight.tolist() == [[0.0, 0.0, 3.0, 3.0]]


def test_an_idle_value_moves_to_the_worst_weight():
    # From 0, 5 and 10 the middle one has no weight. Of 0, 1, 3 (mean 4/3) the worst is 3.
    assert clusters(torch.tensor([0.0, 1.0, 3.0, 10.0]), 3).tolist() == [0.5, 3.0, 10.0]


@pytest.mark.parametrize("count", [4, 5, 256])
def test_few_distinct_weights_are_stored_exactly(count):
    weights = torch.tensor([3.0, -1.0, 3.0, 0.0, 0.25, 0.0])
    assert clusters(weights, count).tolist() == [-1.0, 0.0, 0.25, 3.0]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("values", [2, 16, 37])
def test_layers_get_codebooks_of_their_own(name, values):
    net, _ = make(name)
    before = {site.name: site.weight.clone() for site in walk(net)}
    kmeans(net, values=values)
    for site in walk(net):
        assert isinstance(site.form, Codebook)
        distinct = before[site.name].unique().numel()
        assert site.weight.unique().numel() == min(values, distinct)
        assert site.form.values.dtype == torch.float16
        flat = before[site.name].flatten().double()
        optimum = error(flat, clusters(flat, values))
        reached = (site.weight.flatten() - before[site.name].flatten()).double().square().sum()
        assert reached <= optimum * 1.01 + 1e-6


@pytest.mark.parametrize("values", [2, 3, 16])
@pytest.mark.parametrize("name", ["linear", "conv", "conv1d of gpt-2", "tied"])
def test_pruned_weights_stay_exactly_zero_and_sparse(name, values):
    net = magnitude(make(name)[0], sparsity=0.5, scope="layer")
    zeros = {site.name: site.weight == 0 for site in walk(net)}
    kmeans(net, values=values)
    for site in walk(net):
        assert (site.weight[zeros[site.name]] == 0).all()
        assert site.form.values[0] == 0
        assert len(site.form.values) <= values
        codes = site.form._modules["codes_form"]
        assert isinstance(codes, Bitmask)
        assert codes.values.numel() <= int((~zeros[site.name]).sum())


def test_n_of_m_weights_stay_n_of_m():
    layer = nn.Linear(8, 4)
    weight = layer.weight.detach() * torch.tensor([1.0, 0.0] * 4)
    walk(layer)[0].hold(NofM.encode(weight, n=1, m=2))
    kmeans(layer, values=5)
    assert isinstance(layer.weight_form._modules["codes_form"], NofM)
    assert (layer.weight[:, 1::2] == 0).all()
    assert (layer.weight - weight).abs().max() < weight.abs().max() / 2


def test_weights_too_small_for_float16_keep_a_wide_codebook():
    layer = nn.Linear(32, 32)
    layer.weight.data = normal((32, 32), 0).float() * 1e-7
    before = layer.weight.detach().clone()
    kmeans(layer, values=256)
    assert layer.weight_form.values.dtype == torch.float32
    assert (layer.weight - before).abs().max() < 0.1e-7


@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_an_even_start_keeps_large_weights_closer(count, seed):
    weights = normal(4000, seed)
    linear, density = (
        (weights[:, None] - clusters(weights, count, start)).abs().amin(1).max()
        for start in ("linear", "density")
    )
    assert linear < 0.9 * density
