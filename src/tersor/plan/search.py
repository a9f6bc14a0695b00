"""Search: from a budget to the recipe whose written file meets it, or the proof that none does."""

from __future__ import annotations

from math import ceil, exp, inf, log

import numpy as np

from tersor.errors import BudgetError
from tersor.plan.budget import Budget
from tersor.plan.route import Route
from tersor.plan.trial import Bench, Point
from tersor.task import Metric, Task

# The final file differs from its trial in the digits of the metrics it carries.
_MARGIN = 96
_FITS = 8
_HALVINGS = 8


def search(bench: Bench, route: Route) -> Point:
    """The point that meets the budget's size and quality limits.

    With a size limit the bytes are spent on quality; with only quality limits the file is made as
    small as they allow. Raises BudgetError with how near it came and which limit binds.
    """
    if bench.budget.size is None:
        return smallest(bench, route)
    limit = int(bench.budget.size.resolve(bench.study.size_before))
    point = bench.judge(fit(bench, route, limit))
    short = _short(bench, point)
    return _otherwise(bench, route, point, short, limit) if short else point


def fit(bench: Bench, route: Route, limit: int) -> Point:
    """The point that spends most of a file of at most `limit` bytes: a secant over written ones."""
    goal = limit - _MARGIN
    near = max(limit // 200 - _MARGIN, limit // 500)
    payload, tried = float(goal), list[Point]()
    while len(tried) < _FITS:
        plan = route.propose(int(min(max(payload, route.least), route.most)))
        if any(plan.recipe == point.plan.recipe for point in tried):
            break
        point = bench.attempt(plan)
        tried.append(point)
        # Near enough, or more bytes would not help.
        if point.bytes <= goal and (goal - point.bytes <= near or plan.expected == 0):
            break
        # Towards the middle of what is near enough: sizes scatter by a fraction of a percent.
        payload = _next(tried, goal, goal - near // 2)
    fitting = [point for point in tried if point.bytes <= goal]
    if not fitting:
        reached = min(point.bytes for point in tried) + _MARGIN
        raise BudgetError(
            f"size={bench.budget.size} allows {limit:,} bytes, but the smallest file that these "
            f"methods reach takes {reached:,} bytes; the size limit binds: ask for "
            f"{_asking(bench, reached)} or more"
        )
    return max(fitting, key=lambda point: point.plan.spent)


def _next(tried: list[Point], goal: int, aim: int) -> float:
    """Bytes of weights for which the file should have `aim` bytes, by what was tried."""
    last = tried[-1]
    # Of neighbours the sizes differ by chance.
    chance, slope = last.plan.spent / 50, 1.0
    for other in reversed(tried[:-1]):
        apart = last.plan.spent - other.plan.spent
        if abs(apart) > chance:
            slope = min(max((last.bytes - other.bytes) / apart, 0.25), 4.0)
            break
    payload = last.plan.spent + (aim - last.bytes) / slope
    below = max((p.plan.spent for p in tried if p.bytes <= goal), default=-inf)
    above = min((p.plan.spent for p in tried if p.bytes > goal), default=inf)
    if below < payload < above or above - below < chance:
        return payload
    return (below + above) / 2 if above < inf else below + 1


def smallest(bench: Bench, route: Route) -> Point:
    """The smallest file that meets the quality limits, by bisection over the weights' bytes."""
    if not bench.budget.limits_quality:
        # Neither a size nor a quality limit: the others do not depend on how weights are stored.
        return bench.judge(bench.attempt(route.propose(route.ample)))
    best: Point | None = None
    low, high = log(route.least), log(route.ample)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        point = bench.judge(bench.attempt(route.propose(ceil(exp(middle)))))
        if _short(bench, point):
            low = middle
        else:
            high, best = middle, point if best is None or point.bytes < best.bytes else best
    if best is not None:
        return best
    for payload in (route.ample, route.most):
        point = bench.judge(bench.attempt(route.propose(payload)))
        if not (short := _short(bench, point)):
            return point
    raise BudgetError(
        f"no file meets the budget {bench.budget}: at {point.bytes:,} bytes {short}; "
        "that limit binds even with the weights unchanged, so relax it"
    )


def front(route: Route, point: Point, steps: int = 10) -> list[tuple[int, float]]:
    """(bytes, divergence) that the route expects of files from the least to ample ones."""
    rest = point.bytes - point.plan.spent
    # Upwards: the logarithm's last digit must not make the least too little.
    payloads = [ceil(p) for p in np.geomspace(route.least, max(route.least, route.ample), steps)]
    plans = [route.propose(payload) for payload in payloads]
    return [(rest + p.spent, p.expected) for p in plans if p.expected is not None]


def _short(bench: Bench, point: Point) -> str:
    return shortfalls(point.metrics, bench.study.before, bench.budget, bench.study.task)


def shortfalls(
    metrics: dict[str, float], before: dict[str, float], budget: Budget, task: Task | None
) -> str:
    """A sentence on every quality limit that is not met, empty when all are."""
    if task is None or not metrics:
        return ""
    said = []
    for name, bound in quality_limits(before, budget, task).items():
        metric = task.metrics[name]
        if not quality_kept(metric, metrics[name], bound):
            side = "at least" if metric.higher_is_better else "at most"
            said.append(
                f"{name} is {metrics[name]:.4g} and must be {side} {bound:.4g} "
                f"(it was {before[name]:.4g})"
            )
    return " and ".join(said)


def quality_kept(metric: Metric, value: float, bound: float) -> bool:
    """True where a metric is on the right side of its bound, or on it but for rounding."""
    margin = 1e-9 * max(1.0, abs(bound))
    return value >= bound - margin if metric.higher_is_better else value <= bound + margin


def quality_limits(before: dict[str, float], budget: Budget, task: Task) -> dict[str, float]:
    """The value that each limited metric must keep."""
    limits = {**budget.at_least, **budget.at_most}
    if budget.drop is not None:
        name = next(iter(task.metrics))
        sign = -1 if task.metrics[name].higher_is_better else 1
        floor = before[name] + sign * budget.drop.resolve(abs(before[name]))
        tighter = max if sign < 0 else min
        limits[name] = tighter(floor, limits.get(name, floor))
    return limits


def _otherwise(bench: Bench, route: Route, point: Point, short: str, limit: int) -> Point:
    """The smallest file that keeps the quality, if that fits after all.

    Metrics on few samples are noisy: a plan of more loss now and then keeps what one of less lost.
    Raises BudgetError saying how near both came.
    """
    said = f"at {point.bytes:,} bytes ({point.bytes / bench.study.size_before:.3f}x) {short}"
    try:
        enough = smallest(bench, route)
    except BudgetError as error:
        raise BudgetError(
            f"{said}; no size met the quality limits, so they bind: relax them"
        ) from error
    if enough.bytes + _MARGIN <= limit:
        return enough
    raise BudgetError(
        f"{said}; the size limit binds: the smallest file found that keeps the quality has "
        f"{enough.bytes:,} bytes: ask for {_asking(bench, enough.bytes + _MARGIN)} or relax the "
        "quality limit"
    )


def _asking(bench: Bench, size: int) -> str:
    if size >= bench.study.size_before:
        # A network of a few kilobytes: the file's own structure outweighs it.
        return f"size={size}"
    # One thousandth above: the budget's own text is in the file, and may be longer then.
    return f"size={(ceil(1000 * size / bench.study.size_before) + 1) / 1000:.3f}x"
