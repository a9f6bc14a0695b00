"""Trellis codes of rotated weights: errors fed forward as they should be, and less of them."""

import copy
import itertools

import pytest
import torch
from torch import nn

import zoo
from surgery.nets import NETS, make
from tersor.codec import load, read_tensor, save
from tersor.errors import ModelError, OptionError
from tersor.forms import Bitshift, Rotated
from tersor.forms.bitshift import from_tiles, states, unpack, values
from tersor.forms.rotated import turn_both
from tersor.methods.layerwise import Layer
from tersor.methods.ldlq import Code, encode
from tersor.methods.moments import Moments
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.methods.quantize.trellis import rotated, trellis
from tersor.methods.viterbi import nearest_rings
from tersor.surgery import walk
from tersor.task import regression

CODE = Code(2, 10)


def problem(outputs, inputs, power=1.0):
    """A weight, and moments of inputs whose spectrum falls as i**-power."""
    generator = torch.Generator().manual_seed(outputs)
    basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))[0]
    spectrum = torch.arange(1.0, inputs + 1) ** -power
    moments = basis @ spectrum.diag() @ basis.T + 1e-3 * torch.eye(inputs)
    return torch.randn(outputs, inputs, generator=generator), moments


def error(weight, form, moments):
    apart = weight - form.dense()
    return float(((apart @ moments) * apart).sum() / ((weight @ moments) * weight).sum())


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 12), (300, 5), (7, 9)])
def test_errors_are_fed_forward_as_least_squares_says(outputs, inputs):
    # Strip by strip: all columns to come are set to what is best for the columns that are fixed.
    weight, moments = problem(outputs, inputs)
    form = encode(weight, moments, CODE)
    rows, columns = form.tile
    scale = weight.square().mean().sqrt().bfloat16().float()
    target, fixed = (weight / scale).double(), torch.empty(outputs, inputs).double()
    wide = moments.double()
    for start in range(0, inputs, columns):
        done, left = slice(0, start), slice(start, None)
        moved = (target[:, done] - fixed[:, done]) @ wide[done, left] @ wide[left, left].inverse()
        strip = (target[:, left] + moved)[:, :columns]
        # What a later answer leaves of an error is its product with the Schur complement.
        own, later = slice(start, start + columns), slice(start + columns, None)
        cross = wide[own, later]
        weights = (wide[own, own] - cross @ wide[later, later].inverse() @ cross.T).diagonal()
        padded = nn.functional.pad(strip, (0, columns - strip.shape[1], 0, -outputs % rows))
        counts = torch.zeros_like(padded)
        counts[:outputs, : strip.shape[1]] = weights / weights.mean()
        rings, priced = (
            p.view(-1, rows, columns).transpose(1, 2).flatten(1).float() for p in (padded, counts)
        )
        codes = nearest_rings(rings, priced, bits=2, state_bits=10)
        found = from_tiles(values(states(codes, 2, 10)), outputs, strip.shape[1], form.tile)
        fixed[:, own] = found.double()
    assert torch.equal(form.levels(), fixed.float())


def test_with_equal_inputs_every_ring_is_the_nearest():
    weight, _ = problem(256, 6)
    plain, fed = encode(weight, None, CODE), encode(weight, torch.eye(6), CODE)
    assert torch.equal(plain.codes, fed.codes)
    scale = weight.square().mean().sqrt().bfloat16().float()
    rings = nearest_rings(weight.T / scale, torch.ones(1, 1), bits=2, state_bits=10)
    assert torch.equal(unpack(plain.codes, 2, 256 * 6).view(6, 256), rings.int())


@pytest.mark.parametrize(("power", "most"), [(0.5, 0.9), (1.0, 0.6), (1.5, 0.35)])
def test_feeding_errors_forward_lessens_them(power, most):
    weight, moments = problem(128, 96, power)
    fed = error(weight, encode(weight, moments, CODE), moments)
    assert fed < most * error(weight, encode(weight, None, CODE), moments)


@pytest.mark.parametrize("moments", [True, False])
def test_scales_are_the_best_for_their_codes(moments):
    weight, own = problem(40, 30)
    form = encode(weight, own if moments else None, CODE)
    measure = own if moments else torch.eye(30)
    least = error(weight, form, measure)
    for row, factor in itertools.product((0, 17), (0.97, 1.03)):
        moved = copy.deepcopy(form)
        moved.scale.data[row] *= factor
        assert error(weight, moved, measure) > least


def test_rotation_rescues_weights_with_outliers():
    # One weight in fifty is twenty times as large: codes made for N(0, 1) miss it or the others.
    weight, _ = problem(128, 64)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.02] *= 20
    turned = turn_both(weight, 5)
    assert turned.abs().max() < 0.4 * weight.abs().max()
    eye = torch.eye(64)
    assert error(turned, encode(turned, None, CODE), eye) < 0.09
    assert error(weight, encode(weight, None, CODE), eye) > 0.12


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", [2, 3])
def test_every_weight_takes_its_bits(name, bits):
    net, _ = make(name)
    before = {site.name: site.weight.clone() for site in walk(net)}
    trellis(net, bits=bits, state_bits=8)
    for site in walk(net):
        assert isinstance(site.form, Rotated)
        inner = site.form.turned_form
        assert isinstance(inner, Bitshift)
        rings = -(-before[site.name].numel() // 8) * 8
        assert inner.scale.shape == (inner.shape[0], 1)
        assert inner.stored_bits() - inner.scale.numel() * 16 <= 2.5 * bits * max(rings, 64)
        apart = (site.weight - before[site.name]).square().mean()
        assert apart < (0.16 if bits == 2 else 0.05) * before[site.name].square().mean()


def test_a_rotation_costs_nothing_where_none_is_needed():
    # The moments are turned with the weight: errors are fed forward as well as without.
    weight, moments = problem(128, 96)
    layer = nn.Linear(96, 128, bias=False)
    layer.weight.data = weight
    site = walk(layer)[0]
    seen = Moments(moments[None], None)
    form = rotated(Layer(site, weight, seen), CODE, 7)
    plain = error(weight, encode(weight, moments, CODE), moments)
    assert error(weight, form, moments) < 1.15 * plain


def test_layers_are_calibrated_on_what_they_are_given():
    # Of 16 inputs two carry all: what calibration saw comes out better than the weight itself.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Linear(64, 32, bias=False)).eval()
    inputs = torch.randn(400, 16) * torch.tensor([5.0, 5.0] + [0.1] * 14)
    task = regression(calibration=inputs[:256], holdout=inputs[256:])
    expected = net(inputs)
    gaps = []
    for given in (task, None):
        done = copy.deepcopy(net)
        trellis(done, given, bits=2, state_bits=10, samples=256)
        gaps.append(float((done(inputs) - expected).square().mean().detach()))
    assert gaps[0] < 0.3 * gaps[1]


def test_a_file_gives_single_rows_back(tmp_path):
    net = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 40)).eval()
    trellis(net, bits=3, state_bits=9)
    path = save(net, tmp_path / "net.tersor", example=torch.randn(2, 20))
    assert torch.equal(read_tensor(path, "2.weight", slice(5, 9)), net[2].weight[5:9])
    assert torch.equal(load(path)(torch.ones(3, 20)), net(torch.ones(3, 20)))


@pytest.mark.slow
def test_an_exported_file_holds_the_packed_codes(tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from tersor.export import to_onnx

    net = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    trellis(net, bits=3, state_bits=10)
    # It compares with torch's outputs, or raises.
    found = to_onnx(net, tmp_path / "net.onnx", example=torch.randn(3, 24))
    codes = {layer.name: layer for layer in found.layers}["0.weight.turned.codes"]
    assert (codes.bytes, codes.note) == (24 * 64 * 3 // 8, "computed when used")


def test_seeds_draw_other_rotations():
    weights = []
    for seed in (1, 1, 2):
        layer = nn.Linear(24, 16)
        layer.weight.data = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
        weights.append(trellis(layer, state_bits=8, generator=seed).weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(OptionError, match=r"quantize.trellis: bits=5"):
        trellis(nn.Linear(8, 8), bits=5)
    with pytest.raises(OptionError, match=r"state_bits=17"):
        trellis(nn.Linear(8, 8), state_bits=17)
    with pytest.raises(OptionError, match=r'"weight" of shape .8, 8. is pruned, and a rotation'):
        trellis(magnitude(nn.Linear(8, 8)))
    layer = nn.Linear(8, 8)
    layer.weight.data[3, 4] = torch.nan
    with pytest.raises(ModelError, match=r'"weight" of shape .8, 8. holds NaN'):
        trellis(layer)
    with pytest.raises(OptionError, match=r'"weight" of shape .8, 8. is held as affine already'):
        trellis(rtn(nn.Linear(8, 8)))


@pytest.mark.slow
@pytest.mark.skipif(not zoo.DATA.exists(), reason="needs the shared data")
def test_a_llama_still_writes_at_three_bits():
    import stories
    from tersor.measure import quality

    net, task = zoo.stories260k(), stories.task(64)
    trellis(net, task, bits=3, state_bits=12, samples=64, exclude="tok_embeddings")
    assert quality(net, task)["perplexity"].value < 6.5
