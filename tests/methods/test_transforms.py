"""Equalizing and smoothing: outputs stay, ranges become even, and grids lose less."""

import copy

import pytest
import torch
from torch import nn

import zoo
from surgery.nets import Conv1D
from tersor.errors import ModelError, OptionError, TaskError
from tersor.measure.flow import watch
from tersor.methods import run
from tersor.methods.quantize.static import static
from tersor.methods.transform.equalize import equalize, find_pairs
from tersor.methods.transform.smooth import smooth
from tersor.surgery.grids import scaling_of
from tersor.task import classification, regression


def images(n, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def pictures():
    return classification(calibration=images(64, 1), holdout=images(32, 2))


def rows():
    return regression(calibration=torch.randn(64, 5, 8), holdout=torch.randn(16, 5, 8))


def uneven(model, sizes=(1e-2, 1e2)):
    """The same network with channels of very different ranges."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                factor = torch.logspace(*torch.tensor(sizes).log10(), len(layer.weight))
                layer.weight *= factor.reshape(-1, *[1] * (layer.weight.dim() - 1))
                if layer.bias is not None:
                    layer.bias *= factor
    return model.eval()


def mobile():
    """Pointwise, depthwise, pointwise, with norms and ReLUs between."""
    torch.manual_seed(0)
    layers = []
    depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
    for conv in (nn.Conv2d(3, 8, 1, bias=False), depthwise, nn.Conv2d(8, 6, 1)):
        layers += [conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    with torch.no_grad():
        for seed in range(10):
            model.train()(images(32, 50 + seed))
    return model.eval()


def test_equalizing_changes_no_output_and_works_through_depthwise_layers():
    model, x = uneven(mobile()).requires_grad_(False), images(20, 3)
    done = equalize(copy.deepcopy(model), pictures())
    assert torch.allclose(done(x), model(x), rtol=1e-4, atol=1e-4 * float(model(x).abs().max()))
    outcome = done.recipe.steps[-1].outcome
    assert (outcome["pairs"], outcome["folded"]) == (2, 3)
    assert outcome["uneven_after"] < 0.3 * outcome["uneven_before"]


def test_both_sides_of_each_channel_get_the_same_range():
    done = equalize(uneven(mobile()), pictures(), rounds=200)
    first, depthwise, last = done[0].weight, done[3].weight, done[6].weight
    for made, read in (
        (first.abs().amax((1, 2, 3)), depthwise.abs().amax((1, 2, 3))),
        (depthwise.abs().amax((1, 2, 3)), last.abs().amax((0, 2, 3))),
    ):
        assert torch.allclose(made, read, rtol=1e-2)


def test_one_pair_worked_by_hand():
    # Ranges 4 and 1 of channel 0: sqrt(4 / 1) = 2 is divided out of the first layer.
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
    net[0].weight.data = torch.tensor([[4.0], [0.0]])
    net[0].bias.data = torch.tensor([1.0, 1.0])
    net[2].weight.data = torch.tensor([[1.0, 3.0]])
    equalize(net, regression(calibration=torch.randn(8, 1)))
    assert net[0].weight.tolist() == [[2.0], [0.0]]
    # Nothing makes channel 1 but its bias, so it has no range to share.
    assert net[0].bias.tolist() == [0.5, 1.0]
    assert net[2].weight.tolist() == [[2.0, 3.0]]


def test_only_what_lets_factors_pass_makes_a_pair():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(3, 3, 1) for _ in range(5))

        def forward(self, x):
            x = nn.functional.relu6(self.b(self.a(x).relu()))
            x = self.c(x).relu()
            return self.e(nn.functional.max_pool2d(self.d(x).relu(), 2)).flatten(1) + x.mean()

    net = Net().eval()
    flow = watch(net, lambda: net(images(2)))
    # ReLU6 stops b, and c is read twice.
    assert find_pairs(flow, set(net.modules())) == [(net.a, net.b), (net.d, net.e)]


def test_equalizing_helps_grids_of_real_networks(shared_data):
    """ResNet-20 at one scale per tensor and 6 bits: less divergence than without."""
    data = classification(calibration=zoo.cifar10("train")[0][:64])
    net, x = zoo.resnet20(), zoo.cifar10("test")[0][:256]
    rtn = {"method": "quantize.rtn", "options": {"bits": 6, "per_tensor": True}}
    with torch.no_grad():
        given = net(x)
        done = run(net, [{"method": "transform.equalize"}, rtn], data)
        gaps = [data.divergence(given, m(x)).mean() for m in (done, run(net, [rtn]))]
    assert gaps[0] < 0.8 * gaps[1]


class Block(nn.Module):
    """A pre-norm block with a gated feed-forward; some channels of the stream are loud."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm(8)
        self.query, self.key = nn.Linear(8, 8), Conv1D(8, 8)
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.norm.weight[1:3] *= 60
            self.up.weight[5] *= 80

    def forward(self, x):
        y = self.norm(x)
        x = x + self.query(y).sigmoid() * self.key(y).tanh()
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_smoothing_folds_into_norms_and_gated_layers(norm):
    model, data = Block(norm).eval(), rows()
    x = data.holdout()[0]
    done = smooth(copy.deepcopy(model), data, multiply=False)
    assert torch.allclose(done(x), model(x), rtol=1e-4, atol=1e-4)
    outcome = done.recipe.steps[-1].outcome
    assert outcome["folded"] == 2
    assert outcome["multiplied"] == 0
    # Layers that are fed the same share a factor, which the norm has taken.
    factor = model.norm.weight / done.norm.weight
    assert torch.allclose(done.query.weight, model.query.weight * factor, rtol=1e-4)
    assert torch.allclose(done.key.weight, model.key.weight * factor[:, None], rtol=1e-4)
    assert factor[1:3].min() > 5 * factor[3:].median()
    assert torch.allclose(done.up.bias * done.down.weight, model.up.bias * model.down.weight)
    gaps = [(static(copy.deepcopy(m), data)(x) - model(x)).detach().norm() for m in (done, model)]
    assert gaps[0] < 0.5 * gaps[1]


class PostNorm(nn.Module):
    """What the norm gives goes into the stream too, so that it can take no factor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.norm.weight[1] *= 60
            self.fc1.weight[:, 1] /= 60

    def forward(self, x):
        y = self.norm(x)
        return y + self.fc2(nn.functional.gelu(self.fc1(y)))


def test_where_nothing_takes_the_factor_the_input_is_multiplied_or_left():
    model, data = PostNorm().eval(), rows()
    x = data.holdout()[0]
    left = smooth(copy.deepcopy(model), data, multiply=False)
    assert torch.equal(left(x), model(x))
    assert left.recipe.steps[-1].outcome["left"] == 2
    done = smooth(copy.deepcopy(model), data)
    assert done.recipe.steps[-1].outcome["multiplied"] >= 1
    assert torch.allclose(done(x), model(x), rtol=1e-4, atol=1e-4)
    factor = scaling_of(done.fc1).factor
    assert torch.allclose(done.fc1.weight * factor, model.fc1.weight, rtol=1e-5)
    gaps = [(static(copy.deepcopy(m), data)(x) - model(x)).detach().norm() for m in (done, model)]
    assert gaps[0] < 0.5 * gaps[1]


def test_a_norm_that_computes_in_a_way_of_its_own_is_noticed():
    class OneMoreRMSNorm(nn.RMSNorm):
        def forward(self, x):
            return super().forward(x) / self.weight * (1 + self.weight)

    model, data = Block(OneMoreRMSNorm).eval(), rows()
    done = smooth(copy.deepcopy(model), data)
    x = data.holdout()[0]
    assert torch.allclose(done(x), model(x), rtol=1e-4, atol=1e-4)
    assert torch.allclose(done.norm.weight, model.norm.weight, rtol=1e-5)
    assert scaling_of(done.query) is scaling_of(done.key)


def test_what_cannot_be_transformed_is_refused():
    single = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    for technique in (equalize, smooth):
        with pytest.raises(TaskError, match="pass a task"):
            technique(single)
    with pytest.raises(OptionError, match="no two layers with only a ReLU or pooling"):
        equalize(single, pictures())
    with pytest.raises(OptionError, match="smooth before quantizing"):
        smooth(run(single, [{"method": "quantize.rtn"}]), pictures())
    with pytest.raises(OptionError, match="smoothed or on grids already"):
        smooth(static(copy.deepcopy(single), pictures()), pictures())
    with pytest.raises(OptionError, match="smoothed or on grids already"):
        smooth(smooth(copy.deepcopy(single), pictures()), pictures())
    with pytest.raises(OptionError, match=r"cannot follow quantize\.rtn, because it moves factors"):
        run(single, [{"method": "quantize.rtn"}, {"method": "transform.smooth"}], pictures())


def test_a_network_that_uses_a_weight_unseen_is_refused():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(self.first(x).relu()) + self.first.weight.sum()

    with pytest.raises(ModelError, match=r"transform\.equalize has changed an output of Peeking"):
        equalize(uneven(Peeking()), rows())
