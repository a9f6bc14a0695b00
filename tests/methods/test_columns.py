"""Codes column by column: GPTQ as the paper defines it, and what comes after it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.methods import columns
from tersor.methods.columns import Levels, Problem, Rounding
from tersor.methods.moments import Metric, unit_lower
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.gptq import gptq
from tersor.methods.quantize.qronos import qronos
from tersor.methods.ranges import levels_of
from tersor.surgery import walk
from tersor.task import classification


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


def fed(problem: Problem, found: Levels) -> Tensor:
    rounding = Rounding(problem, found)
    rounding.feed_forward()
    return rounding.codes


def descended(problem: Problem, found: Levels, codes: Tensor, sweeps: int) -> Tensor:
    rounding = Rounding(problem, found)
    rounding.start(codes)
    rounding.descend(sweeps)
    return rounding.codes


def damped(problem: Problem) -> Tensor:
    moments = problem.metric.own
    return moments + problem.metric.extra * torch.eye(len(moments), dtype=moments.dtype)


def naively(problem: Problem, found: Levels, order: list[int]) -> Tensor:
    """GPTQ's equation 2, each step inverting the moments of the columns that are left."""
    weight, moments = problem.target.clone(), damped(problem)
    scale, zero = found.spread(weight.shape[1])
    codes = torch.zeros_like(weight)
    for step, column in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(moments[left][:, left])
        code = weight[:, column] / scale[:, column] + zero[:, column]
        codes[:, column] = code.round().clamp(found.low, found.high)
        rounded = (codes[:, column] - zero[:, column]) * scale[:, column]
        error = (weight[:, column] - rounded) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0][None]
    return codes


@pytest.mark.parametrize("group_size", [None, 16, 7])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equals_gptq_computed_column_by_column(bits, group_size):
    weight, moments = skewed(12, 40, 1.0)
    problem = Problem.of(weight, moments)
    order = moments.diagonal().argsort(descending=True)
    found = levels(weight, bits, group_size)
    codes = fed(problem, found)
    expected = naively(problem, found, order.tolist())
    assert torch.equal(codes, expected)
    assert torch.allclose(found.dense(codes), found.dense(expected), atol=1e-4)


def test_equals_rounding_to_nearest_when_inputs_do_not_resemble_each_other():
    weight, _ = skewed(16, 300, 0)
    problem = Problem.of(weight, torch.eye(300, dtype=torch.float64))
    found = levels(weight, 3)
    assert torch.equal(fed(problem, found), found.nearest(weight))
    assert torch.equal(descended(problem, found, found.nearest(weight), 3), found.nearest(weight))


@pytest.mark.parametrize(("power", "most"), [(0.5, 0.90), (1.0, 0.50), (1.5, 0.15)])
def test_error_against_rounding_to_nearest(power, most):
    # Measured for this problem in advance: 0.84, 0.41 and 0.12.
    weight, moments = skewed(128, 256, power)
    problem = Problem(weight, Metric(moments, 1e-4 * float(moments.diagonal().mean())))
    found = levels(weight, 3)
    both = fed(problem, found), found.nearest(weight)
    errors = [float(problem.error(found.dense(codes)).sum()) for codes in both]
    assert errors[0] <= most * errors[1]


def test_two_columns_worked_by_hand():
    # The first code is 1 for 1.4, an error of 0.4; its twin takes it over, 0.4 + 0.4 * 0.9 = 0.76.
    # The first has a little more energy, so that it comes first.
    moments = torch.tensor([[1.001, 0.9], [0.9, 1.0]], dtype=torch.float64)
    problem = Problem(torch.tensor([[1.4, 0.4]], dtype=torch.float64), Metric(moments))
    one = torch.ones(1, 1, dtype=torch.float64)
    found = Levels(one, torch.zeros_like(one), -7, 7, None)
    assert fed(problem, found).tolist() == [[1.0, 1.0]]
    assert found.nearest(problem.target).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("group_size", [None, 16])
def test_going_over_the_codes_ends_where_no_single_code_can_be_better(group_size):
    weight, moments = skewed(6, 32, 1.0)
    problem = Problem.of(weight, moments)
    found = levels(weight, 3, group_size)
    codes = descended(problem, found, fed(problem, found), 50)
    best = problem.error(found.dense(codes))
    assert (best <= problem.error(found.dense(fed(problem, found))) + 1e-12).all()
    for column in range(32):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] = (other[:, column] + step).clamp(found.low, found.high)
            assert (problem.error(found.dense(other)) >= best - 1e-12).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", [None, 16, 10])
def test_fitted_scales_are_the_least_squares_ones_unless_storing_them_makes_them_worse(
    bits, group_size
):
    weight, moments = skewed(20, 32, 1.0)
    problem = Problem.of(weight, moments)
    found = levels(weight, bits, group_size)
    rounding = Rounding(problem, found)
    rounding.feed_forward()
    codes = rounding.codes
    rounding.refit()
    size, groups = group_size or 32, found.scale.shape[1]
    best = torch.empty(20, groups, dtype=torch.float64)
    root = torch.linalg.cholesky(damped(problem))
    for row in range(20):
        apart = torch.zeros(32, groups, dtype=torch.float64)
        for group in range(groups):
            part = slice(group * size, min((group + 1) * size, 32))
            apart[part, group] = codes[row, part]
        solved = torch.linalg.lstsq(root.T @ apart, root.T @ weight[row][:, None]).solution
        best[row] = solved[:, 0].to(torch.bfloat16)
    costs = [
        problem.error(replace(found, scale=scale).dense(codes)) for scale in (best, found.scale)
    ]
    better = (costs[0] < costs[1])[:, None]
    assert better.sum() >= 10
    assert torch.equal(rounding.levels.scale, torch.where(better, best, found.scale))
    # What a sweep starts from is that of the new scales.
    after = descended(problem, rounding.levels, codes, 3)
    rounding.descend(3)
    assert torch.equal(rounding.codes, after)


def test_many_rows_give_the_same_as_few():
    weight, moments = skewed(9, 24, 1.0)
    zeros = torch.rand(9, 24, generator=torch.Generator().manual_seed(1)) < 0.3
    problem = Problem.of(weight, moments, zeros=zeros)
    found = levels(weight, 3)
    parts = [Problem(weight[n : n + 2], problem.metric, zeros[n : n + 2]) for n in range(0, 9, 2)]
    assert len(list(problem.split(None))) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_AT_ONCE", 50)
        split = list(problem.split(None))
        assert len(list(problem.split(3))) == 9
    for part, expected in zip(split, parts, strict=True):
        assert torch.equal(part.target, expected.target)
        assert torch.equal(part.zeros, expected.zeros)
    whole, each = fed(problem, found), []
    for n, part in enumerate(split):
        few = slice(2 * n, 2 * n + 2)
        each.append(fed(part, replace(found, scale=found.scale[few], zero=found.zero[few])))
    assert torch.equal(torch.cat(each), whole)


def test_factors_multiply_to_the_moments_and_solve():
    _, moments = skewed(1, 20, 1.5)
    lower, pivots = unit_lower(moments.clone())
    assert torch.allclose(lower @ pivots.diag() @ lower.T, moments, atol=1e-14)
    assert torch.equal(lower.diagonal(), torch.ones(20, dtype=torch.float64))
    assert torch.equal(lower, lower.tril())
    metric = Metric(moments, 0.01)
    pulls = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = moments + 0.01 * torch.eye(20, dtype=torch.float64)
    assert torch.allclose(metric.solve(pulls) @ whole, pulls, atol=1e-12)
    assert torch.allclose(metric.of(pulls), ((pulls @ whole) * pulls).sum(1), atol=1e-12)


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
    codes = fed(problem, found)
    assert not codes[zeros].any()
    codes = descended(problem, found, codes, 500)
    assert not codes[zeros].any()
    root = torch.linalg.cholesky(damped(problem))
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
    assert torch.equal(fed(problem, found), found.nearest(weight))
    moments = torch.eye(8, dtype=torch.float64)
    moments[3, 3] = 0
    assert torch.equal(fed(Problem.of(weight, moments), found), found.nearest(weight))


def test_moments_beyond_all_measure_are_refused():
    weight = torch.ones(2, 3)
    moments = torch.full((3, 3), 3e38)
    with pytest.raises(ModelError, match="too large to work with"):
        fed(Problem.of(weight, moments), levels(weight, 4))


@pytest.mark.parametrize("original", [False, True])
def test_a_network_on_which_it_fails_halfway_says_which_weights_are_done(original):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    magnitude(net, sparsity=0.5, include="2")
    net[0].bias.data[0] = 3e38
    before = [site.weight.clone() for site in walk(net)]
    with pytest.raises(ModelError, match=r'"1\.weight" of shape \(8, 8\) is given .* not finite'):
        (qronos if original else gptq)(net, classification(calibration=torch.randn(32, 8)))
    assert [site.form and site.form.kind for site in walk(net)] == ["affine", None, "bitmask"]
    assert all(torch.equal(s.weight, w) for s, w in zip(walk(net)[1:], before[1:], strict=True))
