"""A layer that holds forms is still that layer, whatever one does to it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from surgery.nets import NETS, Conv1D, Tied, make
from tersor.errors import OptionError
from tersor.forms import Affine, Bitmask, Codebook, Dense, FakeAffine, NofM
from tersor.surgery import decoded, form_of, held, hold, release, release_all, walk

every_net = pytest.mark.parametrize("name", NETS)


def affine(net, bits=4):
    for site in walk(net):
        site.hold(Affine.encode(site.weight, bits=bits, axis=site.axis))
    return net


def plain_twin(name, net):
    """The same network with the decoded weights written into plain parameters."""
    twin, inputs = make(name)
    weights = {site.name: site.weight for site in walk(net)}
    for site in walk(twin):
        site.hold(Dense.encode(weights[site.name], dtype=torch.float32))
    return release_all(twin), inputs


@every_net
def test_outputs_are_those_of_the_decoded_weights(name):
    net = affine(make(name)[0])
    twin, inputs = plain_twin(name, net)
    assert not list(held(twin))
    with torch.no_grad():
        assert torch.equal(net(inputs), twin(inputs))


@every_net
def test_exact_forms_change_no_output(name):
    net, inputs = make(name)
    with torch.no_grad():
        before = net(inputs)
        for site in walk(net):
            site.hold(Bitmask.encode(site.weight))
        assert torch.allclose(net(inputs), before, rtol=1e-6, atol=1e-6)


@every_net
def test_class_names_and_layer_names_stay(name):
    before, _ = make(name)
    names = [path for path, _ in before.named_modules() if "parametrizations" not in path]
    net = affine(make(name)[0])
    kept = [path for path, m in net.named_modules() if not path.endswith("_form")]
    assert kept == names
    for site in walk(net):
        for layer, _ in site.uses:
            assert type(layer).__name__ == type(layer).__mro__[1].__name__
            assert isinstance(layer, nn.Module)


@every_net
def test_deepcopy_and_pickle_keep_outputs_and_forms(name):
    net = affine(make(name)[0])
    inputs = make(name)[1]
    with torch.no_grad():
        expected = net(inputs)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(inputs), expected)
            assert [path for path, _ in held(twin)] == [path for path, _ in held(net)]
            forms = {id(form) for _, form in held(net)}
            assert not forms & {id(form) for _, form in held(twin)}


def test_torch_save_of_a_whole_network_loads_again():
    net, inputs = make("lstm")
    affine(net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(twin(inputs), net(inputs))


@every_net
def test_state_dict_moves_forms_from_net_to_net(name):
    net = affine(make(name)[0])
    inputs = make(name)[1]
    torch.manual_seed(1)
    other = NETS[name][0]().eval()
    affine(other)
    assert other.load_state_dict(net.state_dict()) == ([], [])
    with torch.no_grad():
        assert torch.equal(other(inputs), net(inputs))


@every_net
def test_half_precision_changes_what_is_computed_but_not_what_is_stored(name):
    net = affine(make(name)[0])
    inputs = make(name)[1]
    with torch.no_grad():
        expected = net(inputs)
        stored = {k: v.dtype for k, v in net.state_dict().items() if "_form" in k}
        net.to(torch.bfloat16)
        assert {k: v.dtype for k, v in net.state_dict().items() if "_form" in k} == stored
        assert {site.weight.dtype for site in walk(net)} == {torch.bfloat16}
        if inputs.is_floating_point():
            inputs = inputs.to(torch.bfloat16)
        found = net(inputs).float()
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@every_net
def test_torch_export_gives_the_same_outputs(name):
    net = affine(make(name)[0])
    inputs = make(name)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (inputs,))
    with torch.no_grad():
        assert torch.allclose(program.module()(inputs), net(inputs), rtol=1e-6, atol=1e-6)


@every_net
def test_scales_can_be_trained(name):
    net = affine(make(name)[0])
    inputs = make(name)[1]
    for _, form in held(net):
        form.scale.data = form.scale.float()
        form.scale.requires_grad_(True)
    target = torch.zeros(())
    scales = list({id(f.scale): f.scale for _, f in held(net)}.values())
    optimizer = torch.optim.Adam(scales, lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(inputs) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        assert all(scale.grad is not None for scale in scales)
        optimizer.step()
    assert losses[-1] < losses[0]


@every_net
def test_training_with_quantization_then_freezing_changes_nothing(name):
    net, inputs = make(name)
    for site in walk(net):
        site.hold(FakeAffine.encode(site.weight, bits=4, axis=site.axis))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = net(inputs)
        for site in walk(net):
            site.hold(site.form.freeze())
        assert (net(inputs) - trained).abs().max() == 0.0


def test_tied_weights_share_one_form():
    net, inputs = make("tied")
    affine(net)
    assert net.output.weight_form is net.embedding.weight_form
    twin = copy.deepcopy(net)
    assert twin.output.weight_form is twin.embedding.weight_form
    release_all(twin)
    assert twin.output.weight is twin.embedding.weight
    with torch.no_grad():
        assert torch.equal(twin(inputs), net(inputs))


@pytest.mark.parametrize(
    "encode",
    [
        lambda w: Affine.encode(w, bits=4),
        lambda w: Affine.encode(w, bits=4, group_size=3, symmetric=False),
        lambda w: Codebook.encode(w, torch.linspace(-1, 1, 16)),
        lambda w: Bitmask.encode(w * (w.abs() > 0.1)),
        lambda w: NofM.encode(w * torch.tensor([1.0, 0.0] * 4), n=1, m=2),
        lambda w: Dense.encode(w, dtype=torch.float16),
    ],
)
def test_every_form_is_rebuilt_from_its_parts(encode):
    torch.manual_seed(0)
    form = encode(torch.randn(6, 8))
    parts = {name: getattr(form, name) for name, _ in form.parts()}
    twin = type(form).build(form.config(), parts, form.shape, form.dtype)
    assert torch.equal(twin.dense(), form.dense())
    assert twin.stored_bits() == form.stored_bits()
    assert all(part.is_contiguous() for part in parts.values())


def test_nested_forms_decode_and_count_the_inner_form():
    torch.manual_seed(0)
    layer = nn.Linear(40, 10)
    weight = layer.weight.detach() * (torch.rand(10, 40) < 0.2)
    outer = Affine.encode(weight, bits=4)
    expected = outer.dense()
    hold(outer, "codes", Bitmask.encode(outer.codes, bits=4))
    hold(layer, "weight", outer)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(twin.weight, expected)
    kept = int((expected != 0).sum())
    assert twin.weight_form.stored_bits() == 400 + 4 * kept + 10 * 16
    assert [path for path, _ in held(twin)] == ["weight"]


def test_decoding_once_gives_the_same_and_is_undone():
    net, inputs = make("lstm")
    affine(net)
    with torch.no_grad():
        outside = net(inputs)
        with decoded(net):
            form = form_of(net.head, "weight")
            assert net.head.weight is net.head.weight
            assert torch.equal(net(inputs), outside)
            form.scale.data.mul_(2)
            assert torch.equal(net(inputs), outside)
        assert net.head.weight is not net.head.weight
        assert not torch.equal(net(inputs), outside)


def test_decoding_once_is_undone_after_an_error():
    net, _ = make("linear")
    affine(net)
    with pytest.raises(RuntimeError), decoded(net):
        net(torch.ones(3, 7))
    assert all(form._decoded is None for _, form in held(net))


def test_holding_again_replaces_the_form():
    layer = nn.Linear(8, 4)
    hold(layer, "weight", Affine.encode(layer.weight, bits=8))
    kind = type(layer)
    hold(layer, "weight", Affine.encode(layer.weight, bits=2))
    assert type(layer) is kind
    assert layer.weight_form.bits == 2


def test_release_gives_the_plain_layer_back():
    layer = nn.LSTM(4, 4)
    form = Affine.encode(layer.weight_hh_l0, bits=4)
    hold(layer, "weight_hh_l0", form)
    parameter = release(layer, "weight_hh_l0")
    assert type(layer) is nn.LSTM
    assert torch.equal(layer.weight_hh_l0, form.dense())
    assert parameter is layer.weight_hh_l0
    out, _ = layer(torch.ones(2, 1, 4))
    assert any(w is parameter for w in layer._flat_weights)
    assert out.shape == (2, 1, 4)


def test_a_held_weight_cannot_be_assigned():
    layer = nn.Linear(8, 4)
    hold(layer, "weight", Affine.encode(layer.weight, bits=8))
    for value in (torch.zeros(4, 8), nn.Parameter(torch.zeros(4, 8))):
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = value
    assert layer.weight.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [("weight", (4, 7), r"\(4, 7\).*\(4, 8\)"), ("kernel", (4, 8), 'no parameter "kernel"')],
)
def test_holding_what_does_not_fit_is_refused(name, shape, named):
    layer = nn.Linear(8, 4)
    with pytest.raises(OptionError, match=named):
        hold(layer, name, Affine.encode(torch.ones(shape), bits=4))
    assert type(layer) is nn.Linear


def test_a_form_of_another_shape_cannot_replace_one():
    layer = affine(nn.Linear(8, 4))
    before = layer.weight
    with pytest.raises(OptionError, match=r"\(8, 4\) cannot hold .*\(4, 8\)"):
        hold(layer, "weight", Affine.encode(torch.ones(8, 4), bits=4))
    assert torch.equal(layer.weight, before)


def test_a_tied_weight_is_decoded_once(monkeypatch):
    net, calls = affine(Tied()), []
    real = Affine.dense
    monkeypatch.setattr(Affine, "dense", lambda form: calls.append(form) or real(form))
    with decoded(net):
        assert net.embedding.weight is net.output.weight
    assert len(calls) == len(set(calls))


@every_net
def test_decoded_and_released_weights_are_contiguous(name):
    # safetensors and views refuse others.
    net = affine(make(name)[0])
    assert all(form.dense().is_contiguous() for _, form in held(net))
    assert all(tensor.is_contiguous() for tensor in release_all(net).state_dict().values())


def test_releasing_a_plain_weight_is_refused():
    with pytest.raises(OptionError, match="not held"):
        release(nn.Linear(2, 2), "weight")


def test_a_wider_type_keeps_codes():
    net = affine(nn.Sequential(Conv1D(6, 8)))
    codes = net[0].weight_form.codes
    net.double()
    assert net[0].weight_form.codes.dtype == torch.int8
    assert torch.equal(net[0].weight_form.codes, codes)
    assert net[0].weight.dtype == torch.float64


def test_a_tied_net_trains_its_one_form_from_both_ends():
    torch.manual_seed(0)
    net = Tied()
    for site in walk(net):
        site.hold(FakeAffine.encode(site.weight, bits=4, axis=site.axis))
    net(torch.arange(16)[None]).square().mean().backward()
    grad = net.embedding.weight_form.latent.grad
    assert grad is net.output.weight_form.latent.grad
    assert (grad.abs().sum(1) > 0).all()
