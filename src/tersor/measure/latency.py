"""Latency: how long one call takes, and how two callables compare when they take turns.

Times of torch itself say how tersor's own evaluation runs; a speed claim about a deployed network
needs the exported runtime, which any zero-argument callable can be.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import nn

from tersor.errors import OptionError
from tersor.measure.figures import Figures
from tersor.measure.running import Inputs, Runner, batch_of, runner, using_threads
from tersor.measure.statistics import CONFIDENCE, RESAMPLES


@dataclass(frozen=True)
class Latency(Figures):
    """Milliseconds of one call.

    threads: of torch, while it was timed
    batch: samples in a call
    repeats: calls that were timed, after the warm-up
    """

    median_ms: float
    p95_ms: float
    minimum_ms: float
    threads: int
    batch: int
    repeats: int


@dataclass(frozen=True)
class LatencyPair(Figures):
    """Two callables timed in turn.

    ratio: median over the pairs of (time before / time after); above 1, `after` is the faster
    low, high: its 95 % bootstrap interval
    """

    before: Latency
    after: Latency
    ratio: float
    low: float
    high: float


def latency(
    model: nn.Module, inputs: Inputs, *, threads: int | None = 1, repeats: int = 50, warmup: int = 5
) -> Latency:
    """Times `model` on the batch `inputs`, decoded, in evaluation mode.

    threads: None for as many as torch uses now
    """
    with runner(model, inputs) as run:
        return time_call(run, batch_of(inputs), threads=threads, repeats=repeats, warmup=warmup)


def latency_ab(
    before: nn.Module,
    after: nn.Module,
    inputs: Inputs,
    *,
    threads: int | None = 1,
    repeats: int = 50,
    warmup: int = 5,
) -> LatencyPair:
    """Times two models in turn on the same batch, so that a busy machine slows both."""
    with runner(before, inputs) as first, runner(after, inputs) as second:
        return time_pair(
            first, second, batch_of(inputs), threads=threads, repeats=repeats, warmup=warmup
        )


def time_call(
    run: Runner, batch: int = 1, *, threads: int | None = 1, repeats: int = 50, warmup: int = 5
) -> Latency:
    """Times any call, `batch` samples each."""
    _check(repeats, warmup)
    with using_threads(threads) as used, _quiet():
        for _ in range(warmup):
            run()
        times = np.array([_milliseconds(run) for _ in range(repeats)])
    return _summary(times, used, batch)


def time_pair(
    before: Runner,
    after: Runner,
    batch: int = 1,
    *,
    threads: int | None = 1,
    repeats: int = 50,
    warmup: int = 5,
    seed: int = 0,
) -> LatencyPair:
    """Times two calls in turn; who goes first alternates."""
    _check(repeats, warmup)
    times = np.empty((repeats, 2))
    with using_threads(threads) as used, _quiet():
        for _ in range(warmup):
            before()
            after()
        for pair in range(repeats):
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                times[pair, side] = _milliseconds((before, after)[side])
    ratios = times[:, 0] / times[:, 1]
    drawn = np.random.default_rng(seed).integers(0, repeats, (RESAMPLES, repeats))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [tail, 100 - tail])
    return LatencyPair(
        _summary(times[:, 0], used, batch),
        _summary(times[:, 1], used, batch),
        float(np.median(ratios)),
        float(low),
        float(high),
    )


def _milliseconds(run: Runner) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def _summary(times: np.ndarray, threads: int, batch: int) -> Latency:
    median, p95 = np.percentile(times, [50, 95])
    return Latency(float(median), float(p95), float(times.min()), threads, batch, len(times))


def _check(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise OptionError(
            f"repeats={repeats}, warmup={warmup}; time at least 1 call after 0 or more"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    # A garbage collection in the middle would be charged to whoever runs then.
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
