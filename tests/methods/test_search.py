"""The search for codes: the best of all paths, equal to the readable one, GPTQ where it is GPTQ."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tersor.forms.trellis import TAPS, points_of
from tersor.methods.effects import effect_of
from tersor.methods.search import Terms, search, search_slowly

Array = np.ndarray[Any, np.dtype[Any]]


def terms(
    rows: int, columns: int, *, along: bool = True, across: bool = True, rate: float = 0.1
) -> tuple[Terms, Array, Array]:
    """Random terms, and the curvatures of columns and rows that their effects come from."""
    rng = np.random.default_rng(rows * columns)
    mixed = [rng.normal(size=(n, 3 * n)) for n in (columns, rows)]
    inputs, outputs = (torch.from_numpy(m @ m.T / m.shape[1]) for m in mixed)
    inner, outer = effect_of(inputs, 1e-6), effect_of(outputs, 1e-6)
    bits = rng.uniform(0.2, 2, size=(8, 6)).cumsum(1).astype(np.float32)
    found = Terms(
        inner.weights if along else np.ones(columns, np.float32),
        inner.feedback if along else None,
        outer.weights if across else np.ones(rows, np.float32),
        outer.feedback if across else None,
        bits,
        rate,
    )
    return found, inputs.numpy(), outputs.numpy()


def problem(rows: int, columns: int, spread: float = 3.0) -> tuple[Array, Array]:
    rng = np.random.default_rng(columns)
    levels = (rng.normal(size=(rows, columns)) * spread).astype(np.float32)
    return levels, rng.integers(0, 4, size=levels.shape).astype(np.uint8)


@pytest.mark.parametrize("states", sorted(TAPS))
@pytest.mark.parametrize(("along", "across"), [(False, False), (True, False), (True, True)])
def test_the_compiled_search_and_the_readable_one_agree(states, along, across):
    levels, classes = problem(5, 13)
    given, _, _ = terms(5, 13, along=along, across=across)
    zeros = (np.random.default_rng(0).random(levels.shape) < 0.2).astype(np.uint8)
    fast, fast_cost = search(levels, classes, given, states=states, zeros=zeros)
    slow, slow_cost = search_slowly(levels, classes, given, states=states, zeros=zeros)
    assert (fast == slow).all()
    assert np.allclose(fast_cost, slow_cost, rtol=1e-4, atol=1e-5)
    assert (fast[zeros > 0] == 0).all()


@pytest.mark.parametrize("states", [1, 8])
def test_costs_are_the_weighted_squared_error_and_the_bits(states):
    rows, columns = 4, 10
    levels, classes = problem(rows, columns)
    given, inputs, outputs = terms(rows, columns)
    codes, costs = search(levels, classes, given, states=states)
    points = points_of(torch.from_numpy(codes), states).numpy()
    error = levels.astype(np.float64) - points
    # trace(O E I E^T), in the units in which the mean weights of both sides are 1.
    scale = _kept(inputs) * _kept(outputs)
    distortion = np.trace(outputs @ error @ inputs @ error.T) / scale
    z = points != (2 * codes if states > 1 else codes)
    rate = sum(
        given.bits[2 * classes[i] + _quantizer(codes, states)[i], min(abs(codes[i]), 5)]
        + (2 * np.log2(abs(codes[i]) - 4) if abs(codes[i]) > 5 else 0)
        for i in np.ndindex(codes.shape)
    )
    assert z.shape == codes.shape
    assert costs.sum() == pytest.approx(distortion + given.rate * rate, rel=1e-3)


def test_without_feedback_no_path_is_better():
    levels, classes = problem(1, 4)
    given, _, _ = terms(1, 4, along=False, across=False)
    codes, cost = search(levels, classes, given, states=8)
    best = min(
        _cost(np.array([path]), levels, classes, given)
        for path in itertools.product(range(-5, 6), repeat=4)
    )
    assert cost[0] == pytest.approx(best, rel=1e-5)
    assert _cost(codes, levels, classes, given) == pytest.approx(best, rel=1e-5)


def test_one_state_without_rate_is_gptq():
    # Frantar et al. 2022, algorithm 1, column by column with the whole inverse at hand.
    levels, classes = problem(6, 16)
    given, inputs, _ = terms(6, 16, across=False, rate=0.0)
    damped = inputs + 1e-6 * np.diag(inputs).mean() * np.eye(16)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, naive = levels.astype(np.float64), np.zeros(levels.shape, np.int32)
    for column in range(16):
        naive[:, column] = np.rint(left[:, column])
        error = (left[:, column] - naive[:, column]) / upper[column, column]
        left[:, column:] -= np.outer(error, upper[column, column:])
    codes, _ = search(levels, classes, given, states=1)
    assert (codes == naive).mean() == 1


def test_feedback_leaves_less_output_error_than_nearest_codes():
    # Errors of inputs that resemble each other cancel: the bound for independent ones is 1 / 12.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4)) @ rng.normal(size=(4, 24)) + 0.1 * rng.normal(size=(400, 24))
    effect = effect_of(torch.from_numpy(x.T @ x / 400), 1e-4)
    levels, classes = problem(8, 24)
    flat = np.zeros((8, 1), np.float32)
    ones = np.ones(8, np.float32)
    fed = Terms(effect.weights, effect.feedback, ones, None, flat, 0.0)
    alone = Terms(np.ones(24, np.float32), None, ones, None, flat, 0.0)
    errors = []
    for given in (fed, alone):
        codes, _ = search(levels, classes, given, states=1)
        errors.append(float((((levels - codes) @ x.T) ** 2).mean()))
    assert errors[0] < 0.35 * errors[1]


def test_a_dearer_bit_never_takes_more_bits():
    levels, classes = problem(20, 60)
    taken = []
    for rate in (0.0, 0.1, 0.4, 1.6):
        given, _, _ = terms(20, 60, along=False, across=False, rate=rate)
        codes, _ = search(levels, classes, given, states=8)
        z = _quantizer(codes, 8)
        taken.append(float(given.bits[2 * classes + z, np.minimum(np.abs(codes), 5)].sum()))
    assert taken == sorted(taken, reverse=True)


def test_sizes_and_trellises_that_do_not_fit_are_refused():
    levels, classes = problem(3, 6)
    given, _, _ = terms(3, 6)
    with pytest.raises(ValueError, match="sizes differ"):
        search(levels, classes[:2], given, states=8)
    with pytest.raises(ValueError, match="a class has no bits"):
        search(levels, classes + np.uint8(9), given, states=8)


def _kept(curvature: Array) -> float:
    damped = curvature + 1e-6 * np.diag(curvature).mean() * np.eye(len(curvature))
    return float((1 / np.diag(np.linalg.cholesky(np.linalg.inv(damped)).T) ** 2).mean())


def _quantizer(codes: Array, states: int) -> Array:
    from tersor.forms.trellis import quantizers

    if states == 1:
        return np.zeros_like(codes)
    return quantizers(torch.from_numpy(codes), states).numpy()


def _cost(codes: Array, levels: Array, classes: Array, given: Terms) -> float:
    points = points_of(torch.from_numpy(codes.astype(np.int32)), 8).numpy()
    z = _quantizer(codes.astype(np.int32), 8)
    bits = given.bits[2 * classes + z, np.minimum(np.abs(codes), 5)]
    return float((((levels - points) ** 2) * given.weights + given.rate * bits).sum())
