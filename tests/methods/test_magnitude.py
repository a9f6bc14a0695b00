"""Magnitude pruning: the right weights, exactly as many as asked for."""

import pytest
import torch
from torch import nn

from surgery.nets import NETS, make
from tersor.codec import load, save
from tersor.errors import OptionError
from tersor.forms import Bitmask, Dense, NofM
from tersor.forms.form import rows
from tersor.methods.masks import largest
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.gptq import gptq
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk
from tersor.task import classification


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("sparsity", "scope"),
    [(0.1, "layer"), (0.5, "layer"), (0.83, "layer"), (0.1, "global"), (0.37, "global")],
)
def test_exactly_the_fraction_asked_for_becomes_zero(name, sparsity, scope):
    net, _ = make(name)
    magnitude(net, sparsity=sparsity, scope=scope)
    sites = walk(net)
    assert all(isinstance(site.form, Bitmask) for site in sites)
    zeros = [int((site.weight == 0).sum()) for site in sites]
    counts = [site.weight.numel() for site in sites]
    if scope == "layer":
        assert zeros == [round(sparsity * n) for n in counts]
    else:
        assert sum(zeros) == round(sparsity * sum(counts))


@pytest.mark.parametrize("name", ["linear", "conv", "lstm", "tied"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_equals_sorting_all_weights(name, scope):
    net, _ = make(name)
    before = [(site.name, site.weight.clone()) for site in walk(net)]
    magnitude(net, sparsity=0.4, scope=scope)
    groups = [before] if scope == "global" else [[entry] for entry in before]
    expected = {n: w.clone() for n, w in before}
    for group in groups:
        order = sorted(
            (abs(v), i, n, j)
            for i, (n, w) in enumerate(group)
            for j, v in enumerate(w.flatten().tolist())
        )
        for _, _, n, j in order[: round(0.4 * len(order))]:
            expected[n].view(-1)[j] = 0
    for site in walk(net):
        assert torch.equal(site.weight, expected[site.name])


def test_two_layers_worked_by_hand():
    # Of 1 -2 3 | 4 0.5 6 the smallest half overall is 0.5, 1, -2; one of three per layer is 1, 0.5.
    def net():
        model = nn.Sequential(nn.Linear(3, 1), nn.Linear(3, 1))
        model[0].weight.data = torch.tensor([[1.0, -2.0, 3.0]])
        model[1].weight.data = torch.tensor([[4.0, 0.5, 6.0]])
        return model

    whole = magnitude(net(), sparsity=0.5, scope="global")
    assert whole[0].weight.tolist() == [[0.0, 0.0, 3.0]]
    assert whole[1].weight.tolist() == [[4.0, 0.0, 6.0]]
    each = magnitude(net(), sparsity=0.34, scope="layer")
    assert each[0].weight.tolist() == [[0.0, -2.0, 3.0]]
    assert each[1].weight.tolist() == [[4.0, 0.0, 6.0]]


def test_of_equal_weights_the_first_go():
    # Three of five: the two 1s, then the first of the three 2s.
    keep = largest(torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0]), 0.6)
    assert keep.tolist() == [False, False, True, False, True]
    assert largest(torch.ones(4), 0.25).tolist() == [False, True, True, True]
    assert largest(torch.ones(4), 0.1).tolist() == [True] * 4


def test_zeros_that_are_there_count():
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    magnitude(layer, sparsity=0.5)
    assert layer.weight.tolist() == [[0.0, 0.0, 0.0, 1.0]]


def test_more_sparsity_afterwards_removes_more():
    net, _ = make("linear")
    magnitude(net, sparsity=0.3)
    magnitude(net, sparsity=0.6)
    once = magnitude(make("linear")[0], sparsity=0.6)
    assert torch.equal(net[0].weight, once[0].weight)
    assert torch.equal(net[2].weight, once[2].weight)


@pytest.mark.parametrize(
    ("scope", "way_out"), [("layer", "use a lower sparsity, or"), ("global", 'or scope="layer"')]
)
def test_a_layer_that_would_be_emptied_is_named(scope, way_out):
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 1) if scope == "global" else nn.Linear(2, 1)
    )
    model[1].weight.data.mul_(1e-6)
    with pytest.raises(
        OptionError, match=r"sparsity=0.9 would remove every weight of '1.weight'"
    ) as e:
        magnitude(model, sparsity=0.9, scope=scope)
    assert way_out in str(e.value)
    assert 'exclude="1.weight"' in str(e.value)
    assert type(model[0]) is nn.Linear
    magnitude(model, sparsity=0.9, scope=scope, exclude="1.weight")


def test_a_quantized_layer_is_refused():
    net = rtn(make("linear")[0], bits=4, include="0")
    with pytest.raises(OptionError, match=r"'0.weight' of shape \(6, 8\) is stored as affine"):
        magnitude(net, sparsity=0.5)
    magnitude(net, sparsity=0.5, exclude="0")
    assert int((net[2].weight == 0).sum()) == 12


def test_half_precision_and_dense_forms_can_be_pruned():
    net = make("linear")[0].half()
    assert magnitude(net, sparsity=0.5)[0].weight.dtype == torch.float16
    net = make("linear")[0]
    for site in walk(net):
        site.hold(Dense.encode(site.weight, dtype=torch.bfloat16))
    magnitude(net, sparsity=0.5)
    assert int((net[0].weight == 0).sum() + (net[2].weight == 0).sum()) == 36


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2), (1, 4)])
def test_n_of_every_m_neighbours_stay_and_they_are_the_largest(name, n, m):
    net, _ = make(name)
    before = {site.name: rows(site.weight, site.axis).clone() for site in walk(net)}
    fits = {name for name, matrix in before.items() if matrix.shape[1] % m == 0}
    if not fits:
        with pytest.raises(OptionError, match=f"'{n}:{m}' fits none of the"):
            magnitude(net, sparsity=f"{n}:{m}")
        return
    magnitude(net, sparsity=f"{n}:{m}")
    for site in walk(net):
        after = rows(site.weight, site.axis)
        if site.name not in fits:
            assert torch.equal(after, before[site.name])
            continue
        assert isinstance(site.form, NofM)
        assert (site.form.n, site.form.m) == (n, m)
        groups, found = (w.reshape(-1, m) for w in (before[site.name], after))
        assert ((found != 0).sum(1) == n).all()
        assert torch.equal(found.abs().topk(n).values, groups.abs().topk(n).values)
        assert torch.equal(found[found != 0], groups[found != 0])
    left = net.recipe.steps[-1].outcome.get("left", {})
    assert left.keys() == before.keys() - fits
    assert all(reason.startswith(f"{m} does not divide its ") for reason in left.values())


def test_one_pattern_worked_by_hand():
    # Of 1 -4 | 3 3 one stays each; of equal ones the first goes.
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[1.0, -4.0, 3.0, 3.0]])
    magnitude(layer, sparsity="1:2")
    assert layer.weight.tolist() == [[0.0, -4.0, 0.0, 3.0]]


@pytest.mark.parametrize("sparsity", ["4:4", "3:2", "2:300"])
def test_a_pattern_that_removes_nothing_or_is_too_long_is_refused(sparsity):
    with pytest.raises(OptionError, match=f"sparsity='{sparsity}' keeps .* n < m <= 256 must hold"):
        magnitude(nn.Linear(8, 8), sparsity=sparsity)


@pytest.mark.parametrize("sparsity", ["2-4", "0:4", "half", "2:4:8", 1.0, 0])
def test_what_is_neither_a_fraction_nor_a_pattern_is_refused(sparsity):
    with pytest.raises(OptionError, match=r"prune\.magnitude: sparsity="):
        magnitude(nn.Linear(8, 8), sparsity=sparsity)


@pytest.mark.parametrize("sparsity", ["2:4", "4:8", 0.5])
def test_the_written_file_is_smaller_and_gives_the_zeros_back(tmp_path, sparsity):
    def written(net, name):
        return save(net, tmp_path / name, graph=False).stat().st_size

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    dense = written(net, "dense.tersor")
    pruned = magnitude(net, sparsity=sparsity)
    small = written(pruned, "pruned.tersor")
    # Half of the values, and at most 2 bits each that say where they are.
    assert small < (0.5 + 2 / 32 + 0.02) * dense
    twin = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    assert torch.equal(load(tmp_path / "pruned.tersor", into=twin)[0].weight, pruned[0].weight)


@pytest.mark.parametrize("bits", [3, 8])
def test_gptq_keeps_the_zeros_and_the_pattern(bits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    magnitude(net, sparsity="2:4")
    zeros = [net[i].weight == 0 for i in (0, 2)]
    gptq(net, classification(calibration=torch.randn(256, 32)), bits=bits)
    for layer, zero in zip((net[0], net[2]), zeros, strict=True):
        assert (layer.weight[zero] == 0).all()
        codes = layer.weight_form.codes_form
        assert isinstance(codes, NofM)
        assert (codes.n, codes.m) == (2, 4)


def test_a_pattern_that_is_sparse_enough_stays_one():
    model = nn.Sequential(nn.Linear(8, 4))
    magnitude(model, sparsity="2:4")
    magnitude(model, sparsity=0.4)
    assert site_form(model).kind == "nofm"


def site_form(model):
    return next(iter(walk(model))).form
