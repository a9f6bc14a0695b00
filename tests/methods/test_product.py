"""Product quantization: k-means of sub-vectors, by what the layer's outputs lose."""

import copy

import pytest
import torch
from torch import nn

from methods.test_coding import damped, problem
from surgery.nets import NETS, make
from tersor.errors import OptionError
from tersor.forms import ProductCodebook
from tersor.measure import divergence_of, reference_outputs
from tersor.methods import run
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.methods.share.blocks import Blocks, clustered, fitted, nearest
from tersor.methods.share.product import product
from tersor.surgery import walk
from tersor.task import classification, regression


def data(name, n, seed):
    example, generator = make(name)[1], torch.Generator().manual_seed(seed)
    shape = (n, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(16, shape, generator=generator)


def task_for(name):
    return regression(calibration=data(name, 64, 1), holdout=data(name, 32, 2))


def blocks(outputs=10, inputs=24, length=4, seed=0, weighed=False):
    importance = torch.ones(outputs, dtype=torch.float64)
    if weighed:
        importance += torch.rand(outputs, dtype=torch.float64)
    return Blocks(problem(outputs, inputs, seed), length, importance)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("length", [None, 1, 3, 64])
@pytest.mark.parametrize("given", [False, True])
def test_each_layer_has_a_table_and_no_more_values_than_asked_for(name, length, given):
    net, _ = make(name)
    product(net, task_for(name) if given else None, values=8, length=length)
    for site in walk(net):
        form, shape = site.form, site.weight.shape
        inputs = site.weight.numel() // shape[site.axis]
        assert isinstance(form, ProductCodebook)
        kernel = torch.Size(shape[2:]).numel()
        wanted = length or (kernel if 1 < kernel <= 9 else 4)
        assert form.values.shape[1] == min(wanted, inputs)
        assert len(form.values) <= min(8, max(1, form.codes.numel() // 8))
        # Frequent codes are small, and none is idle.
        uses = form.codes.flatten().long().bincount()
        assert (uses.diff() <= 0).all()
        assert (uses > 0).all()


def test_two_kernels_worked_by_hand():
    # Sixteen 1 x 2 kernels, half near (1, 1) and half near (5, -5): means (1, 1) and (5, -5).
    layer = nn.Conv2d(4, 4, (1, 2), bias=False)
    near = torch.tensor([[[1.0, 1.0]], [[5.0, -5.0]]]).repeat(8, 1, 1).reshape(4, 4, 1, 2)
    wobble = torch.tensor([0.1, 0.1, -0.1, -0.1])[:, None, None, None]
    layer.weight.data = near + wobble
    product(layer, values=2)
    assert torch.allclose(layer.weight, near, atol=2e-3)
    assert layer.weight_form.codes.tolist() in ([[0, 1, 0, 1]] * 4, [[1, 0, 1, 0]] * 4)


def naive_clusters(groups, values):
    """Equations 3 to 5: each to its nearest by its place's metric, each value to its optimum."""
    while True:
        owners = []
        for each in groups:
            vectors, metrics = each.vectors, each.metrics
            for row in range(vectors.shape[0]):
                for place in range(vectors.shape[1]):
                    errors = vectors[row, place] - values
                    owners.append(int(((errors @ metrics[place]) * errors).sum(1).argmin()))
        assert set(owners) == set(range(len(values)))
        moved = torch.zeros_like(values)
        for code in range(len(values)):
            system, wanted, index = 0, 0, 0
            for each in groups:
                for row in range(each.vectors.shape[0]):
                    for place in range(each.places):
                        if owners[index] == code:
                            metric = each.metrics[place] * each.importance[row]
                            system, wanted = (
                                system + metric,
                                wanted + metric @ each.vectors[row, place],
                            )
                        index += 1
            moved[code] = torch.linalg.solve(system, wanted)
        if torch.allclose(moved, values, rtol=0, atol=1e-12):
            return values, owners
        values = moved


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighed", [False, True])
def test_clusters_equal_a_slow_search(seed, weighed):
    groups = [blocks(seed=seed, weighed=weighed), blocks(4, seed=seed + 7)]
    vectors = torch.cat([each.vectors.flatten(0, 1) for each in groups])
    start = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:4]]
    expected, owners = naive_clusters(groups, start)
    found = clustered(groups, start)
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.cat([each.codes.flatten() for each in groups]).tolist() == owners


@pytest.mark.parametrize("inputs", [24, 22])
@pytest.mark.parametrize("seed", range(2))
def test_codes_fed_forward_equal_a_slow_search(inputs, seed):
    # Each block takes the value for which its error costs least after the later ones' best answer.
    given, length = problem(6, inputs, seed), 4
    found = Blocks(given, length, torch.ones(6, dtype=torch.float64))
    values = torch.randn(9, length, generator=torch.Generator().manual_seed(seed)).double()
    found.feed_forward(values)
    moments = torch.zeros(found.places * length, found.places * length, dtype=torch.float64)
    moments[:inputs, :inputs] = damped(given.metric)
    moments.diagonal()[inputs:] = 1e-6 * moments.diagonal()[:inputs].mean()
    for row in range(6):
        error = torch.zeros(found.places * length, dtype=torch.float64)
        for place in range(found.places):
            here, later = (
                slice(place * length, (place + 1) * length),
                slice((place + 1) * length, None),
            )
            costs = []
            for value in values:
                tried = error.clone()
                tried[here] = found.target[row, here] - value
                done, left = slice(0, here.stop), moments[later, later]
                tried[later] = -torch.linalg.solve(left, moments[later, done] @ tried[done])
                costs.append(float(tried @ moments @ tried))
            best = int(torch.tensor(costs).argmin())
            assert int(found.codes[row, place]) == best
            error[here] = found.target[row, here] - values[best]


@pytest.mark.parametrize("seed", range(3))
def test_fitting_and_going_over_the_codes_make_nothing_worse(seed):
    each = blocks(seed=seed, weighed=True)
    values = clustered([each], each.vectors.flatten(0, 1)[:8].clone())
    each.feed_forward(values)

    def error():
        apart = each.target - each.dense(values)
        return float(((apart @ each._moments) * apart).sum(1) @ each.importance)

    errors = [error()]
    for _ in range(3):
        values = fitted([each], values)
        errors.append(error())
        each.descend(values)
        errors.append(error())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_fitted_values_solve_the_least_squares():
    each = blocks(6, 8, 2)
    each.codes = torch.randint(3, each.codes.shape, generator=torch.Generator().manual_seed(0))
    # Each row: its sub-vectors are columns of a table laid out flat, (3 * 2) unknowns.
    root, left = torch.linalg.cholesky(each._moments).T, []
    for codes in each.codes.tolist():
        layout = torch.zeros(8, 6, dtype=torch.float64)
        for place, code in enumerate(codes):
            for i in range(2):
                layout[2 * place + i, 2 * code + i] = 1
        left.append(root @ layout)
    wanted = torch.cat([root @ row for row in each.target])
    expected = torch.linalg.lstsq(torch.cat(left), wanted).solution.reshape(3, 2)
    found = fitted([each], torch.zeros(3, 2, dtype=torch.float64))
    assert torch.allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize("n", [1, 50])
def test_the_nearest_is_the_first_of_least_cost(n):
    generator = torch.Generator().manual_seed(0)
    vectors, values = torch.randn(n, 3, generator=generator), torch.randn(5, 3, generator=generator)
    values = torch.cat((values, values))
    root = torch.randn(3, 3, generator=generator)
    errors = vectors[:, None] - values
    cost = ((errors @ (root @ root.T)) * errors).sum(-1)[:, :5]
    assert torch.equal(nearest(vectors, values, root @ root.T), cost.argmin(1))


def trained():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
    )
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
    x = x * torch.arange(1, 17) ** -0.7
    return net.eval(), classification(calibration=x[:384], holdout=x[384:])


def test_inputs_and_training_bring_answers_closer():
    net, task = trained()
    batches = task.holdout()
    wanted = reference_outputs(net, task, batches)
    blind, seeing = (
        product(copy.deepcopy(net), given, values=64, length=2) for given in (None, task)
    )
    assert divergence_of(seeing, task, batches, wanted) < 0.7 * divergence_of(
        blind, task, batches, wanted
    )
    tuned = run(
        seeing, [{"method": "recover.scales", "options": {"epochs": 5}}], task, original=net
    )
    outcome = tuned.recipe.steps[-1].outcome
    assert outcome["divergence_after"] < 0.9 * outcome["divergence_before"]
    for old, new in zip(walk(seeing), walk(tuned), strict=True):
        assert torch.equal(old.form.codes, new.form.codes)
        assert new.form.values.dtype == torch.float16


def test_what_cannot_be_shared_is_refused():
    net, _ = make("linear")
    with pytest.raises(OptionError, match=r'"0\.weight" of shape \(6, 8\) is held as affine'):
        product(rtn(copy.deepcopy(net)))
    with pytest.raises(OptionError, match=r'"0\.weight" of shape \(6, 8\) is pruned'):
        product(magnitude(copy.deepcopy(net), sparsity=0.5))
    for option in ({"values": 1}, {"values": 4097}, {"length": 0}, {"length": 65}):
        with pytest.raises(OptionError, match=f"{next(iter(option))}="):
            product(net, **option)
