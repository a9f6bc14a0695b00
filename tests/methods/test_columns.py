"""Codes column by column: GPTQ as the paper defines it, and what comes after it."""

import pytest
import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.methods.columns import Levels, Problem, descend, feed_forward, refit
from tersor.methods.ranges import levels_of


def skewed(outputs: int, inputs: int, power: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and moments of inputs with the spectrum 1 / i^power in random directions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    turned, _ = torch.linalg.qr(
        torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    )
    spectrum = torch.arange(1, inputs + 1, dtype=torch.float64) ** -power
    return weight, turned @ spectrum.diag() @ turned.T


def levels(weight: Tensor, bits: int, group_size: int | None = None) -> Levels:
    return levels_of(weight, bits=bits, group_size=group_size, symmetric=True)


def nearest(weight: Tensor, found: Levels) -> Tensor:
    scale, zero = found.spread(weight.shape[1])
    return (weight / scale + zero).round().clamp(found.low, found.high)


def naively(problem: Problem, found: Levels, order: list[int]) -> Tensor:
    """GPTQ's equation 2, each step inverting the moments of the columns that are left."""
    weight = problem.target.clone()
    scale, zero = found.spread(weight.shape[1])
    codes = torch.zeros_like(weight)
    for step, column in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(problem.moments[left][:, left])
        code = weight[:, column] / scale[:, column] + zero[:, column]
        codes[:, column] = code.round().clamp(found.low, found.high)
        rounded = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (weight[:, column] - rounded) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0][None]
    return codes


@pytest.mark.parametrize("group_size", [None, 16, 7])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equals_gptq_computed_column_by_column(bits, ordered, group_size):
    weight, moments = skewed(12, 40, 1.0)
    problem = Problem.of(weight, moments)
    order = moments.diagonal().argsort(descending=True) if ordered else torch.arange(40)
    found = levels(weight, bits, group_size)
    codes = feed_forward(problem, found, ordered=ordered)
    expected = naively(problem, found, order.tolist())
    assert torch.equal(codes, expected)
    assert torch.allclose(found.dense(codes), found.dense(expected), atol=1e-4)


def test_equals_rounding_to_nearest_when_inputs_do_not_resemble_each_other():
    weight, _ = skewed(16, 300, 0)
    problem = Problem.of(weight, torch.eye(300, dtype=torch.float64))
    found = levels(weight, 3)
    assert torch.equal(feed_forward(problem, found), nearest(weight, found))
    assert torch.equal(descend(problem, found, nearest(weight, found), 3), nearest(weight, found))


@pytest.mark.parametrize(("power", "most"), [(0.5, 0.90), (1.0, 0.50), (1.5, 0.15)])
def test_error_against_rounding_to_nearest(power, most):
    # Measured for this problem in advance: 0.84, 0.41 and 0.12.
    weight, moments = skewed(128, 256, power)
    problem, found = (
        Problem(weight, moments + 1e-4 * moments.diagonal().mean() * torch.eye(256)),
        (levels(weight, 3)),
    )
    fed, rounded = feed_forward(problem, found), nearest(weight, found)
    errors = [float(problem.error(found.dense(codes)).sum()) for codes in (fed, rounded)]
    assert errors[0] <= most * errors[1]


def test_two_columns_worked_by_hand():
    # The first code is 1 for 1.4, an error of 0.4; its twin takes it over, 0.4 + 0.4 * 0.9 = 0.76.
    moments = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    problem = Problem(torch.tensor([[1.4, 0.4]], dtype=torch.float64), moments)
    one = torch.ones(1, 1, dtype=torch.float64)
    found = Levels(one, torch.zeros_like(one), -7, 7, None)
    assert feed_forward(problem, found, ordered=False).tolist() == [[1.0, 1.0]]
    assert nearest(problem.target, found).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("group_size", [None, 16])
def test_going_over_the_codes_ends_where_no_single_code_can_be_better(group_size):
    weight, moments = skewed(6, 32, 1.0)
    problem = Problem.of(weight, moments)
    found = levels(weight, 3, group_size)
    codes = descend(problem, found, feed_forward(problem, found), 50)
    best = problem.error(found.dense(codes))
    assert (best <= problem.error(found.dense(feed_forward(problem, found))) + 1e-12).all()
    for column in range(32):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] = (other[:, column] + step).clamp(found.low, found.high)
            assert (problem.error(found.dense(other)) >= best - 1e-12).all()


@pytest.mark.parametrize("group_size", [None, 16, 10])
def test_fitted_scales_are_the_least_squares_ones(group_size):
    weight, moments = skewed(5, 32, 1.0)
    problem = Problem.of(weight, moments)
    found = levels(weight, 4, group_size)
    codes = feed_forward(problem, found)
    root = torch.linalg.cholesky(problem.moments)
    fitted = refit(problem, found, codes)
    size, groups = group_size or 32, found.scale.shape[1]
    for row in range(5):
        columns = torch.zeros(32, groups, dtype=torch.float64)
        for group in range(groups):
            part = slice(group * size, min((group + 1) * size, 32))
            columns[part, group] = codes[row, part]
        best = torch.linalg.lstsq(root.T @ columns, root.T @ weight[row][:, None]).solution[:, 0]
        assert torch.allclose(fitted.scale[row], best, rtol=1e-4)


def test_a_target_gives_the_originals_outputs_for_what_is_really_given():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    given = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    original = given + 0.1 * torch.randn(500, 6, generator=generator, dtype=torch.float64)
    problem = Problem.of(weight, given.T @ given / 500, original.T @ given / 500)
    best = torch.linalg.lstsq(given, original @ weight.T).solution.T
    # The damping of one percent holds it back.
    assert torch.allclose(problem.target, best, atol=2e-2)
    assert (problem.target - best).norm() < 0.05 * (weight - best).norm()
    same = Problem.of(weight, given.T @ given, given.T @ given)
    assert torch.allclose(same.target, weight, atol=1e-10)


def test_zeros_stay_zero_and_the_others_make_up_for_them():
    weight, moments = skewed(8, 64, 1.0)
    zeros = torch.rand(8, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    problem = Problem.of(weight, moments, zeros=zeros)
    # Levels so fine that rounding hardly matters: what is left is the best of the weights kept.
    fine = torch.full((8, 1), 1e-5, dtype=torch.float64)
    found = Levels(fine, torch.zeros_like(fine), -(2**30), 2**30, None)
    codes = feed_forward(problem, found)
    assert not codes[zeros].any()
    codes = descend(problem, found, codes, 500)
    assert not codes[zeros].any()
    root = torch.linalg.cholesky(problem.moments)
    for row in range(8):
        kept = ~zeros[row]
        wanted = root.T @ weight[row][:, None]
        best = torch.linalg.lstsq(root.T[:, kept], wanted).solution
        least = (wanted - root.T[:, kept] @ best).square().sum()
        assert least <= problem.error(found.dense(codes))[row] <= 1.001 * least


def test_inputs_that_never_occur_are_rounded_to_nearest():
    weight, _ = skewed(3, 8, 0)
    found = levels(weight, 4)
    problem = Problem.of(weight, torch.zeros(8, 8, dtype=torch.float64))
    assert torch.equal(feed_forward(problem, found), nearest(weight, found))
    moments = torch.eye(8, dtype=torch.float64)
    moments[3, 3] = 0
    assert torch.equal(feed_forward(Problem.of(weight, moments), found), nearest(weight, found))


def test_moments_beyond_all_measure_are_refused():
    weight = torch.ones(2, 3)
    moments = torch.full((3, 3), 3e38)
    with pytest.raises(ModelError, match="too large to work with"):
        feed_forward(Problem.of(weight, moments), levels(weight, 4))
