"""Entropy-constrained quantization: the bits that were asked for, spent where they count."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import cifar10
import zoo
from surgery.nets import NETS, make
from tersor.codec import coders, load, save
from tersor.errors import ModelError, OptionError
from tersor.forms import Trellis
from tersor.measure import divergence_of, reference_outputs
from tersor.measure.curvature import Curvature
from tersor.methods.effects import effects
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.entropy import entropy, look
from tersor.methods.quantize.rtn import rtn
from tersor.methods.survey import Weight, _set_steps
from tersor.surgery import held, walk
from tersor.surgery.walk import vectors
from tersor.task import classification, regression

needs_data = pytest.mark.skipif(not zoo.DATA.exists(), reason="needs the shared data")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def task():
    x = noise(200, 32) @ noise(32, 32, seed=1)
    return classification(calibration=x, holdout=x[:50])


def coded_bits(model: nn.Module) -> float:
    """Bits per weight as the coder writes them, each weight by itself."""
    sizes = [
        (8 * len(coders.encode(f.codes.numpy(), profile="small")), f.codes.numel())
        for _, f in held(model)
        if len(f.shape) > 1
    ]
    return sum(b for b, _ in sizes) / sum(n for _, n in sizes)


@pytest.mark.parametrize("bits", [1.5, 3.0, 5.0])
@pytest.mark.parametrize("states", [1, 8])
@pytest.mark.parametrize("given", [True, False], ids=["task", "no task"])
def test_about_as_many_bits_are_taken_as_were_asked_for(bits, states, given):
    done, outcome = entropy.__wrapped__(net(), task() if given else None, bits=bits, states=states)
    assert outcome["bits"] == pytest.approx(bits, rel=0.05)
    # 2,688 weights leave the coder little to learn from.
    assert coded_bits(done) == pytest.approx(bits, rel=0.25)
    assert all(isinstance(site.form, Trellis) for site in walk(done))


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_layer_and_every_vector_is_held(name):
    model, x = make(name)
    before = model(x).detach()
    done = entropy(model, bits=8.0)
    assert all(isinstance(site.form, Trellis) for site in walk(done))
    assert vectors(done) == []
    assert torch.allclose(done(x), before, atol=0.05 * float(before.abs().max()))


def test_more_bits_bring_the_outputs_closer():
    model, given = net(), task()
    batches = given.holdout()
    reference = reference_outputs(model, given, batches)
    apart = [
        divergence_of(entropy(copy.deepcopy(model), given, bits=b), given, batches, reference)
        for b in (1.0, 2.0, 4.0, 8.0)
    ]
    assert apart == sorted(apart, reverse=True)
    # Six decibels a bit: a factor of 16 for two bits, but for the noise of few weights.
    assert 4 < apart[1] / apart[2] < 64


def test_pruned_weights_stay_zero():
    model = magnitude(net(), sparsity=0.6, scope="layer")
    zeros = {site.name: site.weight == 0 for site in walk(model)}
    entropy(model, task(), bits=3.0)
    for site in walk(model):
        assert (site.weight[zeros[site.name]] == 0).all()


def test_a_quantized_weight_is_refused_with_a_way_out():
    with pytest.raises(OptionError, match=r'"0.weight" of shape \(64, 32\) is held as affine'):
        entropy(rtn(net()))
    with pytest.raises(OptionError, match="states=3; choose one of"):
        entropy(net(), states=3)


def test_batch_norms_become_a_scale_and_a_shift():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).train()
    x = noise(20, 3, 8, 8) + 1
    for _ in range(20):
        model(x)
    model.eval()
    before = model(x).detach()
    done = entropy(copy.deepcopy(model), regression(calibration=x, holdout=x), bits=7.0)
    assert (done[1].running_mean == 0).all()
    assert (done[1].running_var == 1 - done[1].eps).all()
    assert torch.allclose(done(x), before, atol=0.03 * float(before.abs().max()))


def test_steps_make_a_bit_worth_the_same_everywhere():
    # Four times the curvature of an element is half the step, of which three quarters in
    # octaves are believed.
    sites = walk(net())
    weights = [
        Weight(site, np.ones((8, 8), np.float32), effects((8, 8), Curvature(0.0))) for site in sites
    ]
    middle = _set_steps(weights, [4.0, 1.0])
    assert middle == pytest.approx(2.0)
    assert weights[1].step / weights[0].step == pytest.approx(2**0.75)


def test_a_weight_that_nothing_depends_on_is_stored_coarsely_not_wrongly():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 10), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    torch.manual_seed(0)
    done = entropy(Unused().eval(), task(), bits=4.0)
    assert torch.isfinite(done.unused.weight).all()
    assert done.unused.weight_form.step >= done.used.weight_form.step


@needs_data
def test_a_real_network_keeps_its_answers_in_a_seventh_of_the_bytes():
    model, given = zoo.resnet20(), cifar10.task()
    done = entropy(copy.deepcopy(model), given, bits=2.7)
    images = [zoo.cifar10()[0]]
    apart = divergence_of(done, given, images, reference_outputs(model, given, images))
    assert apart < 0.02
    assert coded_bits(done) < 2.9


def test_a_layer_with_weight_norm_takes_what_was_stored_of_it(tmp_path):
    def normed():
        torch.manual_seed(0)
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 2))

    small = entropy(normed(), bits=4.0)
    loaded = load(save(small, tmp_path / "net.tersor", graph=False), into=normed())
    assert torch.equal(loaded(noise(3, 16)), small(noise(3, 16)))


@pytest.mark.parametrize("bits", [0.2, 0.5, 7.0, 10.0, 14.0])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_few_and_many_bits_are_those_in_the_file(bits, spread):
    layer = nn.Linear(256, 256, bias=False)
    rows = torch.exp(spread * noise(256, 1, seed=5))
    layer.weight.data = noise(256, 256) * rows
    done, outcome = entropy.__wrapped__(layer, None, bits=bits)
    codes = done.weight_form.codes.numpy()
    found = 8 * len(coders.encode(codes, profile="max", states=8)) / codes.size
    assert found == pytest.approx(outcome["bits"], rel=0.04, abs=0.04)
    if "asked" in outcome:
        assert outcome["asked"] == bits <= 0.5
    else:
        assert outcome["bits"] == pytest.approx(bits, rel=0.05)


@pytest.mark.parametrize("options", [{"include": "0.weight"}, {"exclude": "1.*"}])
def test_norms_that_are_not_chosen_stay_as_they_are(options):
    torch.manual_seed(0)
    layers = [nn.Linear(32, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)]
    model = nn.Sequential(*layers).train()
    model(noise(64, 32) + 1)
    before = {name: value.clone() for name, value in model[1].state_dict().items()}
    done, outcome = entropy.__wrapped__(model.eval(), task(), bits=2.0, **options)
    assert all(torch.equal(value, before[name]) for name, value in done[1].state_dict().items())
    assert "corrected" not in outcome
    assert isinstance(done[0].weight_form, Trellis)


def test_an_empty_vector_is_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 4), nn.Linear(5, 0)

        def forward(self, x):
            return self.used(x)

    done = entropy(Odd(), task(), bits=3.0)
    assert {name for name, _ in held(done)} == {"used.weight", "used.bias"}


def test_parameters_that_share_one_buffer_are_told_apart():
    plain, flat = net(), net()
    values = nn.utils.parameters_to_vector(flat.parameters()).clone()
    nn.utils.vector_to_parameters(values, flat.parameters())
    one, other = (entropy(model, task(), bits=3.0) for model in (plain, flat))
    for (_, form), (_, same) in zip(held(one), held(other), strict=True):
        assert torch.equal(form.codes, same.codes)


@pytest.mark.parametrize("place", ["0.weight", "2.bias"])
@pytest.mark.parametrize("given", [True, False], ids=["task", "no task"])
def test_weights_that_are_not_finite_are_named(place, given):
    model = net()
    model.get_parameter(place).data.view(-1)[3] = torch.inf
    with pytest.raises(ModelError, match=f'"{place}" .* NaN or infinity'):
        entropy(model, task() if given else None)


def test_what_is_known_of_another_network_is_no_use():
    known = look(net(), task())
    other = net()
    other[0].weight.data[0, 0] += 1
    with pytest.raises(OptionError, match=r'known= is of another network: "0.weight"'):
        entropy.__wrapped__(other, task(), known=known)
    with pytest.raises(OptionError, match="known= is of another network"):
        entropy.__wrapped__(nn.Sequential(nn.Linear(32, 10)), task(), known=known)
