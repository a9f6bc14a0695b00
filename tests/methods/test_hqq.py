"""Half-quadratic quantization against the paper's equations, one group after the other."""

import pytest
import torch
from torch import nn

import zoo
from surgery.nets import NETS, make
from tersor.errors import OptionError
from tersor.forms import Affine
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.hqq import hqq
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import decoded, walk


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def naive(group, bits, rounds=20):
    """Badri and Shaji's loop for one group: p = 0.7, kappa = 1.01; errors in steps, beta = 2."""
    low, high = min(0.0, group.min().item()), max(0.0, group.max().item())
    top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    scale = torch.tensor((high - low) / (top - bottom)).bfloat16().item()
    zero, beta = bottom - low / scale, 2.0
    for _ in range(rounds):
        codes = [min(max(round(w / scale + zero), bottom), top) for w in group.tolist()]
        wanted = []
        for w, code in zip(group.tolist(), codes, strict=True):
            x = w / scale - (code - zero)
            size = max(abs(x), 1e-6)
            shrunk = (1 if x > 0 else -1) * max(0.0, size - size ** (0.7 - 1) / beta)
            wanted.append(code - (w / scale - shrunk))
        zero = sum(wanted) / len(wanted)
        beta *= 1.01
    zero = torch.tensor(zero).half().item()
    codes = [min(max(round(w / scale + zero), bottom), top) for w in group.tolist()]
    return torch.tensor([(code - zero) * scale for code in codes])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "outlier", "positive"])
def test_equals_the_equations_of_the_paper(bits, kind):
    weight = normal((3, 40), bits)
    weight[0, 0] = 20 if kind == "outlier" else weight[0, 0]
    weight = weight.abs() if kind == "positive" else weight
    found = hqq(layer_of(weight), bits=bits, group_size=16).weight.detach()
    for row, mine in zip(weight, found, strict=True):
        expected = torch.cat([naive(group, bits) for group in row.split(16)])
        # Where single and double precision round a code apart, all of a group may move a little.
        close = torch.isclose(mine, expected, rtol=1e-3, atol=1e-3 * float(row.abs().max()))
        assert close.float().mean() > 0.95


@pytest.mark.parametrize("factor", [2.0**-20, 1024.0])
@pytest.mark.parametrize("fit_scale", [False, True])
def test_other_units_give_the_same_codes(factor, fit_scale):
    weight = normal((4, 64))
    one, other = (
        hqq(layer_of(w), fit_scale=fit_scale).weight.detach() for w in (weight, weight * factor)
    )
    assert torch.equal(one * factor, other)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, None])
def test_zero_points_take_error_off_and_scales_take_more(bits, group_size):
    weight = normal((16, 160)) + 0.2
    options = {"bits": bits, "group_size": group_size}
    errors = [
        (layer.weight.detach() - weight).square().mean().item()
        for layer in (
            rtn(layer_of(weight), symmetric=False, **options),
            hqq(layer_of(weight), **options),
            hqq(layer_of(weight), fit_scale=True, **options),
        )
    ]
    assert errors[2] < errors[1] < errors[0]


def test_one_group_worked_by_hand():
    # Steps of 1 from -2 to 1. 0.4, 0.4, 0.4 and 0.6 lie 0.4, 0.4, 0.4 above and 0.4 below their
    # codes, 0.2 on average, so that -2, 1 and the rest move to -1.8, 1.2 and 0.2; then 0.4, 0.4,
    # 0.4, 0.6 have -1.6 + ... each: the mean of what is left is what the zero point takes.
    weight = torch.tensor([[-2.0, 1.0, 0.25, 0.25, 0.25, 0.25]])
    form = hqq(layer_of(weight), bits=2, group_size=None).weight_form
    assert form.scale.tolist() == [[1]]
    assert form.codes.tolist() == [[-2, 1, 0, 0, 0, 0]]
    # The mean of (codes - weight) is -1 / 6.
    assert form.zero.item() == pytest.approx(-1 / 6, abs=2**-12)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("group_size", [None, 5])
@pytest.mark.parametrize("fit_scale", [False, True])
def test_no_weight_inside_the_levels_moves_more_than_half_a_step(name, group_size, fit_scale):
    net, _ = make(name)
    before = {site.name: site.weight.clone() for site in walk(net)}
    hqq(net, bits=4, group_size=group_size, fit_scale=fit_scale)
    for site in walk(net):
        form = site.form
        assert isinstance(form, Affine)
        assert form.zero.dtype == torch.float16
        apart = (site.weight - before[site.name]).abs().movedim(site.axis, 0).flatten(1)
        inside = (form.codes > -8) & (form.codes < 7)
        assert (apart[inside] <= form.scale.float().max() / 2 * (1 + 1e-3)).all()


def test_weights_that_are_all_alike_come_back():
    for value in (0.0, 3.0, -1e-20):
        weight = torch.full((2, 8), value)
        found = hqq(layer_of(weight)).weight.detach()
        assert torch.allclose(found, weight, rtol=2**-7, atol=1e-30)


def test_wrong_use_is_refused():
    with pytest.raises(OptionError, match=r'"0.weight" of shape \(6, 8\) was pruned, and levels'):
        hqq(magnitude(make("linear")[0], sparsity=0.5))
    with pytest.raises(OptionError, match=r'"0\.weight" .* is held as affine already'):
        hqq(rtn(make("linear")[0]))
    for options in ({"bits": 1}, {"bits": 9}, {"group_size": 0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            hqq(make("linear")[0], **options)


def test_images_are_told_apart_better_than_by_nearest(shared_data):
    images = zoo.cifar10()[0][:256]
    with torch.no_grad():
        expected = zoo.resnet20()(images).log_softmax(1)

        def divergence(net):
            with decoded(net):
                found = net(images).log_softmax(1)
            return (expected.exp() * (expected - found)).sum(1).mean().item()

        nearest = divergence(rtn(zoo.resnet20(), bits=4, group_size=64, symmetric=False))
        half_quadratic = divergence(hqq(zoo.resnet20()))
    assert half_quadratic < 0.6 * nearest
