"""Weight sharing by k-means: without data, and with inputs to choose by."""

import copy

import pytest
import torch
from torch import nn

from surgery.nets import NETS, make
from tersor.errors import OptionError
from tersor.forms import Bitmask, Codebook, NofM
from tersor.measure import divergence_of, reference_outputs
from tersor.methods import run
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.methods.share.clusters import clusters
from tersor.methods.share.kmeans import kmeans
from tersor.surgery import walk
from tersor.task import classification, regression


def normal(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(weights, values):
    return (weights[:, None] - values).square().amin(1).sum().item()


def inputs(name, n, seed):
    """More inputs for one of NETS."""
    example, generator = make(name)[1], torch.Generator().manual_seed(seed)
    shape = (n, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(16, shape, generator=generator)


def task_for(name):
    return regression(calibration=inputs(name, 64, 1), holdout=inputs(name, 32, 2))


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
        optimum = error(flat, clusters(flat, values).values)
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


def test_a_pruned_layer_with_two_values_keeps_zero_and_the_mean():
    layer = nn.Linear(4, 1, bias=False)
    walk(layer)[0].hold(Bitmask.encode(torch.tensor([[1.0, 0.0, 2.0, 6.0]])))
    # Zero and one other value, the mean 3 of 1, 2 and 6; then 1 is nearer to zero.
    assert kmeans(layer, values=2).weight.tolist() == [[0.0, 0.0, 3.0, 3.0]]


def entropy(codes):
    share = codes.flatten().long().bincount().double() / codes.numel()
    return float(-(share * share.clamp(min=1e-12).log2()).sum())


@pytest.mark.parametrize("data", [False, True])
def test_thrift_makes_codes_cheaper_and_errors_larger(data):
    net, _ = make("conv")
    task = task_for("conv") if data else None
    bits, errors = [], []
    for thrift in (0.0, 1.0, 3.0):
        done = kmeans(copy.deepcopy(net), task, thrift=thrift)
        site = walk(done)[1]
        bits.append(entropy(site.form.codes))
        errors.append(float((site.weight - walk(net)[1].weight).square().sum()))
    assert bits == sorted(bits, reverse=True)
    assert bits[2] < bits[0] - 0.4
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("values", [2, 16, 37])
def test_with_inputs_each_channel_has_a_scale_and_the_layer_its_values(name, values):
    net, _ = make(name)
    kmeans(net, task_for(name), values=values, start="best")
    for site in walk(net):
        form = site.form
        assert isinstance(form, Codebook)
        assert len(form.values) <= values
        assert form.scale.shape == (site.weight.shape[site.axis], 1)
        assert (form.values.diff() >= 0).all()
        plain = form.values.float()[form.codes.int()]
        assert torch.equal(
            site.weight,
            (plain.movedim(site.axis, -1) * form.scale.float()[:, 0]).movedim(-1, site.axis),
        )


@pytest.mark.parametrize("name", ["linear", "conv", "lstm", "attention", "tied"])
def test_with_inputs_answers_stay_nearer(name):
    net, _ = make(name)
    task = task_for(name)
    batches = task.holdout()
    wanted = reference_outputs(net, task, batches)
    plain, chosen = (
        divergence_of(kmeans(copy.deepcopy(net), given, values=8), task, batches, wanted)
        for given in (None, task)
    )
    assert chosen < 0.9 * plain


def test_a_layer_that_sees_one_input_twice_worked_by_hand():
    # Both inputs are always equal, so only their sum counts: 0.5 + 0.5 is worth as much as 1 + 0.
    # Each row is its largest weight, 1, times values; from 0, 1/2 and 1 the second row is 1 and 0.
    layer = nn.Linear(2, 3, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.25], [0.5, 1.0]])
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).expand(64, 2).contiguous()
    kmeans(layer, regression(calibration=x), values=3)
    assert (layer.weight.sum(1) - torch.tensor([1.0, 1.25, 1.5])).abs().max() < 0.02


@pytest.mark.parametrize("values", [3, 16])
@pytest.mark.parametrize("name", ["linear", "conv", "tied"])
def test_with_inputs_pruned_weights_stay_zero_too(name, values):
    net = magnitude(make(name)[0], sparsity=0.5, scope="layer")
    zeros = {site.name: site.weight == 0 for site in walk(net)}
    kmeans(net, task_for(name), values=values)
    for site in walk(net):
        assert (site.weight[zeros[site.name]] == 0).all()
        assert site.form.values[0] == 0
        assert isinstance(site.form._modules["codes_form"], Bitmask)


def test_channels_of_any_size_and_dead_ones_are_kept_apart():
    layer = nn.Linear(16, 4, bias=False)
    layer.weight.data *= torch.tensor([[1e4], [1e-4], [1e-15], [0.0]])
    before = layer.weight.detach().clone()
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    kmeans(layer, regression(calibration=x), values=16, start="best")
    relative = (layer.weight - before).norm(dim=1) / before.norm(dim=1)
    assert (relative[:3] < 0.2).all()
    assert layer.weight[3].abs().max() < 1e-30


def test_no_samples_are_as_no_task():
    task = task_for("conv")
    blind, unasked = (
        kmeans(make("conv")[0], given, samples=samples) for given, samples in ((None, 9), (task, 0))
    )
    for one, other in zip(walk(blind), walk(unasked), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert other.form.scale is None


def test_a_random_start_follows_its_seed():
    def shared(seed):
        net, _ = make("linear")
        return walk(kmeans(net, values=8, start="random", generator=seed))[0].weight

    assert torch.equal(shared(1), shared(1))
    assert not torch.equal(shared(1), shared(2))


@pytest.mark.parametrize("data", [False, True])
def test_trained_values_bring_answers_closer(data):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    x = torch.randn(384, 16, generator=torch.Generator().manual_seed(1))
    task = classification(calibration=x[:256], holdout=x[256:])
    shared = kmeans(copy.deepcopy(net), task if data else None, values=4)
    tune = {"method": "recover.scales", "options": {"epochs": 5}}
    tuned = run(shared, [tune], task, original=net)
    outcome = tuned.recipe.steps[-1].outcome
    assert outcome["divergence_after"] < 0.9 * outcome["divergence_before"]
    for old, new in zip(walk(shared), walk(tuned), strict=True):
        assert torch.equal(old.form.codes, new.form.codes)
        assert not torch.equal(old.form.values, new.form.values)
        assert new.form.tunable() == (("values", "scale") if data else ("values",))


def test_what_cannot_be_shared_is_refused():
    net, _ = make("linear")
    with pytest.raises(OptionError, match=r'"0\.weight" of shape \(6, 8\) is held as affine'):
        kmeans(rtn(net), task_for("linear"))
    with pytest.raises(OptionError, match="values=257"):
        kmeans(net, values=257)
    with pytest.raises(OptionError, match="thrift=-1"):
        kmeans(net, thrift=-1.0)
