"""AdaRound against all roundings there are, and its pieces against the paper."""

import itertools
import math

import pytest
import torch
from torch import nn

from methods.test_columns import levels, skewed
from tersor.errors import OptionError, TaskError
from tersor.methods.columns import Problem
from tersor.methods.quantize.adaround import adaround, rounded, undecided
from tersor.surgery import walk
from tersor.task import classification


@pytest.mark.parametrize("seed", range(3))
def test_comes_near_the_best_of_all_roundings(seed):
    weight, moments = skewed(1, 10, 1.5, seed)
    problem, found = Problem.of(weight, moments), levels(weight, 3)
    scale, zero = found.spread(10)
    below = (weight / scale + zero).floor()
    errors = [
        float(problem.error(found.dense((below + torch.tensor(up)).clamp(found.low, found.high))))
        for up in itertools.product((0.0, 1.0), repeat=10)
    ]
    reached = float(problem.error(found.dense(rounded(problem, found, 400))))
    assert min(errors) - 1e-12 <= reached
    # Of 1,024 roundings at most one in ten is better.
    assert sum(error < reached - 1e-12 for error in errors) <= 102
    assert reached <= float(problem.error(found.dense(found.nearest(weight))))


def test_codes_are_beside_the_weight_and_within_the_levels():
    weight, moments = skewed(20, 30, 1.0)
    problem, found = Problem.of(weight, moments), levels(weight, 2)
    codes = rounded(problem, found, 50)
    exact = (weight / found.spread(30)[0]).clamp(found.low, found.high)
    assert ((codes - exact).abs() <= 1).all()
    assert codes.min() >= found.low
    assert codes.max() <= found.high


def test_the_regularizer_is_that_of_the_paper():
    values = [-2.0, -0.3, 0.0, 1.7]
    for beta in (2.0, 20.0):
        expected = []
        for v in values:
            h = min(1.0, max(0.0, 1.2 / (1 + math.exp(-v)) - 0.1))
            expected.append(1 - abs(2 * h - 1) ** beta)
        found = undecided(torch.tensor(values, dtype=torch.float64), beta)
        assert found.item() == pytest.approx(sum(expected) / 4)


def test_a_network_is_quantized_and_needs_data():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    task = classification(calibration=torch.randn(64, 12))
    with pytest.raises(TaskError, match=r"quantize\.adaround needs inputs"):
        adaround(net)
    adaround(net, task, bits=4, steps=20)
    assert [site.form.kind for site in walk(net)] == ["affine", "affine"]
    with pytest.raises(OptionError, match="is held as affine already"):
        adaround(net, task)
