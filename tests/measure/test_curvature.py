"""Curvature: the factors are what a loop over samples gives, and predict divergence."""

import pytest
import torch
from torch import Tensor, nn

from surgery.nets import NETS, make
from tersor.measure.curvature import curvature
from tersor.surgery import walk
from tersor.surgery.hold import bake
from tersor.surgery.walk import vectors
from tersor.task import Task, classification, regression


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def found(net: nn.Module, task: Task, draws: int = 1):
    return curvature(net, task, task.calibration(), [*walk(net), *vectors(net)], draws=draws)


class Squares(nn.Module):
    """Outputs linear in the weight, so that the divergence is exactly quadratic."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_inputs_are_the_second_moments_of_what_a_weight_meets():
    torch.manual_seed(0)
    net, x = Squares().eval(), noise(40, 5)
    task = regression(calibration=x, holdout=x, batch_size=7)
    curves = found(net, task)
    met = {"first.weight": x, "second.weight": net.first(x).detach()}
    for name, rows in met.items():
        naive = sum(torch.outer(row, row) for row in rows.double()) / len(rows)
        assert torch.allclose(curves[name].inputs[0], naive, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2, "groups": 2},
        {"padding": 1, "groups": 4},
    ],
    ids=["strided", "dilated groups", "depthwise"],
)
@pytest.mark.parametrize("flat", [1, 2])
def test_moments_of_a_convolution_give_the_energy_of_its_output(options, flat):
    torch.manual_seed(0)
    kind, pool = (nn.Conv1d, (0, 2)) if flat == 1 else (nn.Conv2d, (0, 2, 3))
    layer = kind(4, 8, 3, bias=False, **options)
    x = noise(6, 4, *[5] * flat)
    net = nn.Sequential(nn.Identity(), layer, nn.Flatten()).eval()
    curve = found(net, regression(calibration=x, holdout=x, batch_size=4))["1.weight"]
    outputs = layer(x).detach().double()
    weight = layer.weight.detach().double().reshape(len(curve.inputs), -1, curve.inputs.shape[1])
    energy = torch.einsum("goi,gij,goj->go", weight, curve.inputs, weight).reshape(-1)
    assert torch.allclose(energy, outputs.square().mean(pool), rtol=1e-4)


def test_own_curvature_of_a_classifier_is_its_fisher_information():
    # One layer: the gradient of its outputs is probabilities minus label, of which the second
    # moment is diag(p) - p p^T; an element of the weight has x_i^2 p_o (1 - p_o).
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 3)).eval(), noise(400, 6)
    task = classification(calibration=x, holdout=x[:2], batch_size=20)
    p = net(x).softmax(1).double().detach()
    exact = float((x.double().square().mean(1) * (p * (1 - p)).mean(1)).mean())
    assert found(net, task, draws=20)["0.weight"].own == pytest.approx(exact, rel=0.15)


def test_own_curvature_predicts_the_divergence_of_small_errors():
    torch.manual_seed(1)
    net, x = Squares().eval(), noise(300, 5)
    task = regression(calibration=x, holdout=x, batch_size=100)
    curves = found(net, task, draws=20)
    reference = net(x).detach()
    for name, weight in net.named_parameters():
        errors = []
        for seed in range(60):
            change = 1e-3 * noise(*weight.shape, seed=seed)
            weight.data += change
            errors.append(float(task.divergence(reference, net(x).detach()).mean()))
            weight.data -= change
        measured = sum(errors) / len(errors)
        expected = 0.5 * curves[name].own * weight.numel() * 1e-6
        assert measured == pytest.approx(expected, rel=0.35)


def test_both_factors_predict_what_a_correlated_error_does():
    torch.manual_seed(0)
    net, x = Squares().eval(), noise(400, 5) @ noise(5, 5, seed=3)
    task = regression(calibration=x, holdout=x, batch_size=100)
    curve = found(net, task, draws=20)["second.weight"]
    reference = net(x).detach()
    for seed in range(3):
        change = 1e-3 * noise(3, 4, seed=seed)
        net.second.weight.data += change
        measured = float(task.divergence(reference, net(x).detach()).mean())
        net.second.weight.data -= change
        wide = change.double()
        # The variance of the outputs belongs to a batch, and so do the gradients.
        expected = 0.5 * float(torch.trace(curve.outputs[0] @ wide @ curve.inputs[0] @ wide.T))
        assert measured == pytest.approx(expected, rel=0.35)


def test_an_embedding_is_known_by_the_gradients_of_what_is_looked_up():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3)).eval()
    ids = torch.randint(0, 9, (50, 2), generator=torch.Generator().manual_seed(0))
    curve = found(net, classification(calibration=ids, holdout=ids))["0.weight"]
    assert curve.inputs.shape == (1, 4, 4)
    assert curve.outputs is None
    assert (torch.linalg.eigvalsh(curve.inputs[0]) > 0).all()


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_layer_is_seen_and_left_as_it_was(name):
    net, x = make(name)
    for site in walk(net):
        for layer, attribute in site.uses:
            bake(layer, attribute)
    before = {n: (p.clone(), p.requires_grad) for n, p in net.named_parameters()}
    task = regression(calibration=x, holdout=x)
    curves = found(net.eval(), task)
    for site in walk(net):
        curve = curves[site.name]
        assert curve.own >= 0
        if site.kind != "ConvTranspose2d":
            assert curve.inputs is not None, site.name
    for n, p in net.named_parameters():
        assert torch.equal(p, before[n][0])
        assert p.requires_grad == before[n][1]
        assert p.grad is None


def test_the_same_data_give_the_same_curvature():
    net, x = Squares().eval(), noise(30, 5)
    task = regression(calibration=x, holdout=x)
    one, two = found(net, task), found(net, task)
    assert all(one[name].own == two[name].own for name in one)
    assert torch.equal(one["second.weight"].outputs, two["second.weight"].outputs)


@pytest.mark.parametrize("make_task", [classification, regression])
def test_scores_have_the_curvature_of_the_divergence(make_task):
    # Mean of g g^T over draws against the second derivative of the divergence, by autograd.
    outputs, x = noise(6, 3), noise(6, 2)
    task = make_task(calibration=x, holdout=x)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(6, 3, 3)
    for _ in range(4000):
        leaf = outputs.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(task.score(leaf, generator), leaf)
        total += torch.einsum("bi,bj->bij", g, g)
    hessian = torch.autograd.functional.hessian(
        lambda moved: task.divergence(outputs, moved).sum(), outputs.clone()
    )
    exact = torch.stack([hessian[i, :, i] for i in range(6)])
    assert (total / 4000 - exact).abs().max() < 0.08 * exact.abs().max() + 0.01
