"""Codes to a codebook with error feedback, against slow readings of the papers."""

from itertools import pairwise

import pytest
import torch

from tersor.methods.columns import Problem
from tersor.methods.moments import Metric
from tersor.methods.share.clusters import Values
from tersor.methods.share.coding import Coding, fitted


def problem(outputs=10, inputs=24, seed=0, zeros=False):
    """A weight, and moments of inputs that resemble each other."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixed = normal(200, inputs) @ torch.linalg.qr(normal(inputs, inputs))[0]
    mixed *= torch.arange(1, inputs + 1) ** -0.5
    found = mixed @ normal(inputs, inputs)
    mask = torch.rand(outputs, inputs, generator=generator) < 0.4 if zeros else None
    weight = normal(outputs, inputs)
    return Problem.of(weight if mask is None else weight * ~mask, found.T @ found / 200, zeros=mask)


def coding(given, values, prices=None, importance=None):
    scale = given.target.abs().amax(1, keepdim=True)
    importance = torch.ones_like(scale[:, 0]) if importance is None else importance
    prices = torch.zeros_like(values) if prices is None else prices
    return Coding(given, scale, importance, Values(values, prices))


def damped(metric: Metric):
    return metric.own + metric.extra * torch.eye(len(metric.own), dtype=metric.own.dtype)


def naively(given, scale, values, prices):
    """GPTQ's equation 2, each step inverting the moments of the columns that are left."""
    weight, moments = given.target.clone(), damped(given.metric)
    codes = torch.zeros(weight.shape, dtype=torch.long)
    order = moments.diagonal().argsort(descending=True).tolist()
    for step, column in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(moments[left][:, left])
        for row in range(len(weight)):
            cost = (weight[row, column] / scale[row] - values).square() + prices
            pruned = given.zeros is not None and given.zeros[row, column]
            code = 0 if pruned else int(cost.argmin())
            codes[row, column] = code
            error = (weight[row, column] - values[code] * scale[row]) / inverse[0, 0]
            weight[row, left] -= error * inverse[0]
    return codes


VALUES = torch.tensor([0.0, -0.9, -0.35, -0.1, 0.2, 0.45, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("priced", [False, True])
def test_equals_gptq_to_a_codebook_computed_column_by_column(seed, zeros, priced):
    given = problem(seed=seed, zeros=zeros)
    prices = torch.linspace(0, 0.02, len(VALUES), dtype=torch.float64) * priced
    found = coding(given, VALUES, prices)
    found.feed_forward()
    scale = given.target.abs().amax(1)
    assert torch.equal(found.codes.long(), naively(given, scale, VALUES, prices))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighed", [False, True])
def test_fitted_values_solve_the_least_squares_of_all_rows_together(seed, weighed):
    both = [problem(seed=seed), problem(outputs=4, seed=seed + 5)]
    importance = [torch.rand(n, dtype=torch.float64) + 0.1 if weighed else None for n in (10, 4)]
    codings = [
        coding(*each[:1], VALUES, None, each[1]) for each in zip(both, importance, strict=True)
    ]
    # One column for each value; of each row the square root of what its errors count.
    left, right = [], []
    for given, found, weigh in zip(both, codings, importance, strict=True):
        found.feed_forward()
        root = torch.linalg.cholesky(damped(given.metric)).T
        for row, target in enumerate(given.target):
            factor = 1.0 if weigh is None else float(weigh[row].sqrt())
            hot = torch.nn.functional.one_hot(found.codes[row].long(), len(VALUES)).double()
            left.append(factor * root @ hot * given.target[row].abs().max())
            right.append(factor * root @ target)
    expected = torch.linalg.lstsq(torch.cat(left), torch.cat(right)).solution
    assert torch.allclose(fitted(codings, VALUES, zero=False), expected, atol=1e-4)


def test_fitted_values_worked_by_hand():
    # One input of energy 1: values become means, (1 + 3) / 2 and 6; the third, unused, stays.
    given = Problem(torch.tensor([[1.0], [3.0], [6.0]]), Metric(torch.ones(1, 1)))
    ones, book = torch.ones(3, 1), Values.free(torch.tensor([2.5, 5.0, 9.0]))
    found = Coding(given, ones, ones[:, 0], book)
    found.start(torch.tensor([[0.0], [0.0], [1.0]]))
    assert fitted([found], book.values, zero=False).tolist() == pytest.approx([2.0, 6.0, 9.0])
    # Where the first is zero and stays, only the second moves.
    assert fitted([found], book.values, zero=True).tolist() == pytest.approx([2.5, 6.0, 9.0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("zeros", [False, True])
def test_neither_fitting_nor_going_over_the_codes_makes_anything_worse(seed, zeros):
    given, book = problem(seed=seed, zeros=zeros), Values.free(VALUES)
    found = coding(given, VALUES)
    found.feed_forward()

    def error():
        dense = book.values[found.codes.long()] * found.levels.scale
        assert given.zeros is None or (dense[given.zeros] == 0).all()
        return float(given.error(dense).sum())

    errors = [error()]
    for _ in range(3):
        found.refit()
        errors.append(error())
        book = Values.free(fitted([found], book.values, zero=zeros))
        found.rebook(book)
        errors.append(error())
        found.descend(1)
        errors.append(error())
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]
