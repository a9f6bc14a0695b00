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
from tersor.errors import OptionError
from tersor.forms import Trellis
from tersor.measure import divergence_of, reference_outputs
from tersor.measure.curvature import Curvature
from tersor.methods.effects import effects
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.entropy import entropy
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
