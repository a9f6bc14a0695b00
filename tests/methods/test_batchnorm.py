"""Batch-norm correction: its equations, one layer after the other, and its gate."""

import copy

import pytest
import torch
from torch import nn

import zoo
from tersor.codec import load, save
from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import run
from tersor.methods.quantize.rtn import rtn
from tersor.methods.recover.batchnorm import batchnorm
from tersor.surgery import decoded
from tersor.task import Task, classification

STEPS = [{"method": "quantize.rtn", "options": {"bits": 3}}, {"method": "recover.batchnorm"}]


class Deep(nn.Module):
    """Four convolutions, each followed by a batch norm."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.head(x.mean((2, 3)))


def images(n, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def deep():
    """With statistics of images that are brighter than those the tests calibrate on."""
    torch.manual_seed(0)
    net = Deep().train()
    with torch.no_grad():
        for seed in range(40):
            net(images(64, 100 + seed) * 1.5 + 0.5)
    return net.eval()


def task(batch_size=64, calibration=256, **given) -> Task:
    given = {"holdout": images(128, 2)} | given
    return classification(calibration=images(calibration, 1), batch_size=batch_size, **given)


def inputs_of(net, x):
    """What each batch norm of `net` sees, by name."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, m in net.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_statistics_follow_the_equations_layer_after_layer():
    net, x = deep(), images(256, 1)
    out = run(net, STEPS, task(batch_size=256))
    assert out.recipe.steps[-1].outcome["kept"]
    # Inputs of the corrected network are those that each correction was computed from.
    reference, seen = inputs_of(net, x), inputs_of(out, x)
    for name, before in net.named_modules():
        if isinstance(before, nn.BatchNorm2d):
            after = out.get_submodule(name)
            c, f = (v[name].double().transpose(0, 1).flatten(1) for v in (seen, reference))
            var0 = before.running_var.double()
            ratio = var0 / f.var(1, correction=0)
            variance = ratio * c.var(1, correction=0)
            mean = before.running_mean + (c.mean(1) - f.mean(1)) * ratio.sqrt()
            assert torch.allclose(after.running_var.double(), variance, rtol=1e-4)
            assert torch.allclose(after.running_mean.double(), mean, rtol=1e-4, atol=1e-5)


def test_one_channel_worked_by_hand():
    # The original sees 0 and 4 (mean 2, variance 4), the halved network 0 and 2 (1, 1).
    # Variance 16 * 1 / 4 = 4; mean 3 + (1 - 2) * sqrt(16 / 4) = 1.
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1), nn.Linear(1, 2)).eval()
    net[0].weight.data.fill_(2.0)
    net[1].running_mean.fill_(3.0), net[1].running_var.fill_(16.0)
    net[2].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    halved = copy.deepcopy(net)
    halved[0].weight.data.fill_(1.0)
    x = torch.tensor([[0.0], [2.0]])
    batchnorm(halved, classification(calibration=x, holdout=x + 1), original=net)
    assert halved[1].running_var.item() == pytest.approx(4.0)
    assert halved[1].running_mean.item() == pytest.approx(1.0)


@pytest.mark.parametrize("batch_size", [32, 100])
def test_batches_of_any_size_come_to_nearly_the_same(batch_size):
    whole = run(deep(), STEPS, task(batch_size=256))
    parts = run(deep(), STEPS, task(batch_size=batch_size))
    for one, other in zip(whole.norms, parts.norms, strict=True):
        spread = one.running_var.sqrt()
        assert ((one.running_mean - other.running_mean).abs() <= 0.05 * spread).all()
        assert torch.allclose(one.running_var, other.running_var, rtol=0.05)


def test_the_outcome_is_the_divergence_on_held_out_inputs():
    net, data = deep(), task()
    steps = [{"method": "quantize.rtn", "options": {"bits": 2}}, STEPS[1]]
    out = run(net, steps, data)
    outcome = out.recipe.steps[-1].outcome
    quantized = run(net, steps[:1])

    def divergence(model):
        with torch.no_grad():
            rows = [data.divergence(net(x), model(x)) for x in data.holdout()]
        return torch.cat(rows).mean().item()

    assert outcome["divergence_before"] == pytest.approx(divergence(quantized), rel=1e-5)
    assert outcome["divergence_after"] == pytest.approx(divergence(out), rel=1e-5)
    assert outcome["divergence_after"] < 0.5 * outcome["divergence_before"]
    assert outcome["layers"] == 4


def test_a_correction_that_does_not_help_is_taken_back():
    # Calibration sees inputs that have nothing in common with the held-out ones.
    net = deep()
    data = classification(calibration=images(8, 1) - 5, holdout=images(128, 2))
    quantized = run(net, STEPS[:1])
    out = batchnorm(copy.deepcopy(quantized), data, original=net)
    outcome = out.recipe.steps[-1].outcome
    assert outcome["kept"] is False
    assert outcome["divergence_after"] >= outcome["divergence_before"]
    for name, buffer in quantized.named_buffers():
        assert torch.equal(out.get_buffer(name), buffer)


def test_an_uncompressed_network_stays_bit_for_bit():
    net = deep()
    out = batchnorm(copy.deepcopy(net), task(), original=net)
    assert out.recipe.steps[-1].outcome["kept"] is False
    for name, buffer in net.named_buffers():
        assert torch.equal(out.get_buffer(name), buffer)


def test_modes_and_hooks_are_left_as_they_were():
    net = deep()
    compressed = rtn(copy.deepcopy(net), bits=3)
    compressed.norms[1].train()
    batchnorm(compressed, task(), original=net)
    assert [m.training for m in compressed.norms] == [False, True, False, False]
    assert not any(m._forward_pre_hooks for m in (*net.modules(), *compressed.modules()))
    assert int(compressed.norms[1].num_batches_tracked) == 40


def test_a_channel_that_never_varies_keeps_its_variance():
    net = deep()
    compressed = copy.deepcopy(net)
    compressed.convs[3].weight.data[2] = 0
    before = compressed.norms[3].running_var.clone()
    out = batchnorm(compressed, task(), original=net)
    assert torch.isfinite(out(images(4))).all()
    if out.recipe.steps[-1].outcome["kept"]:
        assert out.norms[3].running_var[2] == before[2]


def test_networks_without_batch_norm_are_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 5))
    with pytest.raises(OptionError, match=r"step 2 of 2, .* no batch norm with running statistics"):
        run(net, STEPS, task())


def test_a_call_without_what_it_needs_is_refused():
    net = deep()
    with pytest.raises(TaskError, match="pass a task"):
        batchnorm(copy.deepcopy(net), original=net)
    with pytest.raises(OptionError, match="original=network"):
        batchnorm(copy.deepcopy(net), task())
    with pytest.raises(OptionError, match=r"'norms.0' has 4 channels, and no such layer"):
        batchnorm(copy.deepcopy(net), task(), original=nn.Linear(2, 2))


def test_norms_that_lost_channels_are_left_and_listed():
    net = deep()
    compressed = rtn(copy.deepcopy(net), bits=3)
    compressed.norms[0] = nn.BatchNorm2d(2)
    compressed.norms[0].forward = net.norms[0].forward
    outcome = batchnorm(compressed, task(), original=net).recipe.steps[-1].outcome
    assert outcome["left"] == {"norms.0": "2 channels, and 4 channels in the original"}
    assert outcome["layers"] == 3


def test_a_network_rebuilt_from_a_file_is_refused(tmp_path):
    net = deep()
    path = save(rtn(copy.deepcopy(net), bits=4), tmp_path / "deep.tersor", example=images(2))
    with pytest.raises(ModelError, match="rebuilt from a file"):
        batchnorm(load(path), task(), original=net)
    twin = batchnorm(load(path, into=deep()), task(), original=net)
    assert twin.recipe.steps[-1].outcome["layers"] == 4


@pytest.mark.parametrize(("make", "factor"), [(zoo.resnet20, 1.8), (zoo.resnet8, 3.0)])
def test_pretrained_networks_come_back_at_equal_bytes(shared_data, make, factor):
    # bench/methods.py measures more of them, on all images.
    net = make()
    pixels, _ = zoo.cifar10("train")
    test = zoo.cifar10("test")[0][:500]
    steps = [{"method": "quantize.rtn", "options": {"bits": 4}}, {"method": "recover.batchnorm"}]
    data = classification(calibration=pixels[:128], holdout=pixels[512:640])
    quantized, recovered = run(net, steps[:1]), run(net, steps, data)

    def divergence(model):
        with decoded(model), torch.no_grad():
            return data.divergence(net(test), model(test)).mean().item()

    assert divergence(recovered) * factor < divergence(quantized)
