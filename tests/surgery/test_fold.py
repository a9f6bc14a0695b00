"""Folding changes outputs by rounding only, and stays away from what it cannot prove."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import zoo
from tersor.errors import ModelError
from tersor.forms import Affine
from tersor.surgery import fold, hold
from tersor.surgery.fold import absorb_statistics


def settled(model, seed=0):
    """Gives every batch norm statistics and weights that are far from doing nothing."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.2, 3.0, generator=generator)
            if norm.affine:
                with torch.no_grad():
                    norm.weight.normal_(generator=generator)
                    norm.bias.normal_(generator=generator)
    return model.eval()


PAIRS = {
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "linear without bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "conv2d with same padding": (
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.BatchNorm2d(6),
        (2, 4, 9, 9),
    ),
    "conv2d with circular padding": (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(6),
        (2, 4, 9, 9),
    ),
    "grouped conv2d": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "depthwise conv2d": (nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), (2, 6, 9, 9)),
    "conv3d": (nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), (2, 2, 4, 4, 4)),
    "transposed conv1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed conv2d": (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "grouped transposed conv2d": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6),
        (2, 4, 5, 5),
    ),
    "transposed conv3d": (nn.ConvTranspose3d(2, 6, 2), nn.BatchNorm3d(6), (2, 2, 3, 3, 3)),
    "norm without weights": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_outputs_stay_within_rounding(name):
    layer, norm, shape = PAIRS[name]
    model = settled(nn.Sequential(layer, norm, nn.ReLU()))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(x)
        done = fold(model, x)
        after = model(x)
    assert done.pairs == (("0", "1"),)
    assert done.skipped == {}
    assert isinstance(model[1], nn.Identity)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_folding_worked_by_hand():
    # y = 3 (5 x + 4 - 2) / sqrt(3.5 + 0.5) + 1 = 7.5 x + 4
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=0.5)).eval()
    with torch.no_grad():
        model[0].weight.fill_(5), model[0].bias.fill_(4)
        model[1].weight.fill_(3), model[1].bias.fill_(1)
        model[1].running_mean.fill_(2), model[1].running_var.fill_(3.5)
    fold(model, torch.ones(2, 1))
    assert model[0].weight.item() == pytest.approx(7.5)
    assert model[0].bias.item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("make", "size", "pairs"),
    [
        (lambda: zoo.CifarResNet(20), 32, 19),
        (zoo.ResNet8, 32, 7),
        (lambda: zoo.MobileNetV1(0.25), 64, 27),
        (zoo.ResNet50, 64, 53),
    ],
)
def test_every_batch_norm_of_real_architectures_folds(make, size, pairs):
    torch.manual_seed(0)
    # Gains near 1, or fifty random layers in a row would overflow.
    model = make()
    model.train()
    x = torch.rand(4, 3, size, size)
    with torch.no_grad():
        model(x)
        model.eval()
        before = model(x)
        done = fold(model, x)
        after = model(x)
    assert (len(done.pairs), done.skipped) == (pairs, {})
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


def test_pretrained_resnet20_keeps_every_decision(shared_data):
    model = zoo.resnet20()
    x, _ = zoo.cifar10("test")
    with torch.no_grad():
        before = model(x[:256])
        assert len(fold(model, x[:2]).pairs) == 19
        after = model(x[:256])
    assert torch.equal(after.argmax(1), before.argmax(1))
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


class Branching(nn.Module):
    """The convolution's output goes around the batch norm too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


class Twice(nn.Module):
    """One convolution before two batch norms."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm2(self.conv(self.norm1(self.conv(x))))


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv2(self.norm(self.conv1(x))))


class TiedConvs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.conv2.weight = self.conv1.weight
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv2(self.norm(self.conv1(x)))


class WeightReadElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.weight.mean()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv(x)


def held():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    hold(model[0], "weight", Affine.encode(model[0].weight, bits=8))
    return model


IMAGE = (2, 4, 5, 5)
KEPT = {
    "read elsewhere": (Branching, IMAGE, {"norm": "is read by"}),
    "one layer, two norms": (Twice, IMAGE, {"norm1": "used 2 times", "norm2": "used 2 times"}),
    "one norm, two layers": (SharedNorm, IMAGE, {"norm": "used 2 times"}),
    "weight of two layers": (TiedConvs, IMAGE, {"norm": "used"}),
    "weight read elsewhere": (WeightReadElsewhere, IMAGE, {"norm": "used 2 times"}),
    "not run": (Unused, IMAGE, {"norm": "used 0 times"}),
    "held by a form": (held, IMAGE, {"1": "fold before compressing"}),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
        IMAGE,
        {"1": "fold before compressing"},
    ),
    "after an activation": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        IMAGE,
        {"2": "not from one layer"},
    ),
    "first of all": (lambda: nn.Sequential(nn.BatchNorm2d(4)), IMAGE, {"0": "not from one layer"}),
    "batch statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
        {"1": "used 0 times"},
    ),
    # A sequence of 6 steps and 6 channels: the batch norm's channels are the steps.
    "linear over a sequence": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)),
        (5, 6, 4),
        {"1": "not the second dimension"},
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_proven_stays(name):
    make, shape, reasons = KEPT[name]
    model = settled(make())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(x)
        done = fold(model, x)
        assert torch.equal(model(x), before)
    assert done.pairs == ()
    assert done.skipped.keys() == reasons.keys()
    for path, reason in reasons.items():
        assert reason in done.skipped[path]


def test_modes_and_gradients_stay_as_they_were():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    model[0].weight.requires_grad_(False)
    model.train()
    model[2].eval()
    fold(model, torch.rand(IMAGE))
    assert [m.training for m in model] == [True, True, False]
    assert not model[0].weight.requires_grad


def test_keyword_and_several_inputs_are_traced():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, shift):
            return self.norm(self.conv(x)) + shift

    x, shift = torch.rand(IMAGE), torch.rand(1)
    assert fold(Both().eval(), (x, shift)).pairs == (("conv", "norm"),)
    assert fold(Both().eval(), {"shift": shift, "x": x}).pairs == (("conv", "norm"),)


def test_a_network_without_batch_norm_needs_no_trace():
    assert fold(nn.Linear(2, 2), torch.rand(3, 7)).pairs == ()


def test_a_network_that_cannot_be_traced_is_refused():
    class Undecided(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    model = Undecided()
    with pytest.raises(ModelError, match=r"Undecided cannot be traced.*without folding"):
        fold(model, torch.rand(IMAGE))
    assert type(model.norm) is nn.BatchNorm2d


def test_absorbed_statistics_leave_the_outputs_and_no_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)
    ).train()
    for _ in range(5):
        model(torch.rand(8, *IMAGE[1:]) * 3 + 1)
    model.eval()
    before = model(torch.rand(IMAGE, generator=torch.Generator().manual_seed(0)))
    assert absorb_statistics(model) == 2
    after = model(torch.rand(IMAGE, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-5)
    assert not model[1].running_mean.any()
    # A second time finds nothing left to move.
    scale = model[1].weight.clone()
    absorb_statistics(model)
    assert torch.allclose(model[1].weight, scale, rtol=1e-6)


def test_norms_that_cannot_take_their_statistics_are_left_alone():
    shared = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    shared[1].weight = shared[0].weight
    bare = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(*shared, *bare).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert absorb_statistics(model) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
