"""Search: from a budget to the recipe whose written file meets it, or the proof that none does."""

from __future__ import annotations

from math import ceil, exp, log

import numpy as np

from tersor.errors import BudgetError
from tersor.plan.allocate import allocate
from tersor.plan.budget import Budget
from tersor.plan.choices import recipe_for
from tersor.plan.trial import Bench, Point
from tersor.task import Metric, Task

# The final file differs from its trial in the digits of the metrics it carries.
_MARGIN = 96
_FITS = 8
_HALVINGS = 7


def search(bench: Bench) -> Point:
    """The point that meets the budget's size and quality limits.

    With a size limit the bytes are spent on quality; with only quality limits the file is made as
    small as they allow. Raises BudgetError with how near it came and which limit binds.
    """
    if bench.budget.size is None:
        return smallest(bench)
    limit = int(bench.budget.size.resolve(bench.study.size_before))
    point = bench.judge(fit(bench, limit))
    short = shortfalls(point.metrics, bench.study.before, bench.budget, bench.study.task)
    return _otherwise(bench, point, short, limit) if short else point


def fit(bench: Bench, limit: int) -> Point:
    """The point of least loss whose file has at most `limit` bytes."""
    options = bench.study.options()
    least = sum(min(size for size, _ in choices) for choices in options)
    payload, last = limit - _MARGIN, -1
    best: Point | None = None
    nearest: Point | None = None
    for _ in range(_FITS):
        payload = max(payload, least)
        if payload == last:
            break
        point, last = propose(bench, payload), payload
        slack = limit - _MARGIN - point.bytes
        if slack < 0:
            nearest = point if nearest is None or point.bytes < nearest.bytes else nearest
        elif best is None or point.loss < best.loss:
            best = point
        # Near enough, or growing no longer helps.
        if best is not None and (best is not point or point.loss == 0 or slack < limit // 500):
            break
        # What was spent, not what was allowed: a near miss must not repeat the allocation.
        payload = slack + (payload if slack > 0 else min(payload, _spent(bench, point)))
    if best is None:
        reached = (nearest.bytes if nearest else least) + _MARGIN
        raise BudgetError(
            f"size={bench.budget.size} allows {limit:,} bytes, but the smallest file that these "
            f"methods reach takes {reached:,} bytes; the size limit binds: ask for "
            f"{_asking(bench, reached)} or more"
        )
    return best


def smallest(bench: Bench) -> Point:
    """The smallest file that meets the quality limits, by bisection over the weights' bytes."""
    options = bench.study.options()
    low = float(sum(min(size for size, _ in choices) for choices in options))
    high = float(sum(choices[0][0] for choices in options))
    best: Point | None = None
    if not bench.budget.limits_quality:
        # Neither a size nor a quality limit: the others do not depend on how weights are stored.
        return bench.judge(propose(bench, int(_lossless_like(options))))
    nearest: Point | None = None
    edges = [low, _lossless_like(options)]
    for _ in range(_HALVINGS):
        middle = exp((log(edges[0]) + log(edges[1])) / 2)
        point = bench.judge(propose(bench, ceil(middle)))
        if shortfalls(point.metrics, bench.study.before, bench.budget, bench.study.task):
            edges[0], nearest = middle, point
        else:
            edges[1], best = middle, point if best is None or point.bytes < best.bytes else best
    if best is None:
        for payload in (edges[1], high):
            point = bench.judge(propose(bench, int(payload)))
            short = shortfalls(point.metrics, bench.study.before, bench.budget, bench.study.task)
            if not short:
                return point
            nearest = point
        short = shortfalls(
            nearest.metrics if nearest else {}, bench.study.before, bench.budget, bench.study.task
        )
        raise BudgetError(
            f"no file meets the budget {bench.budget}: at {nearest.bytes if nearest else 0:,} "
            f"bytes {short}; "
            "that limit binds even with the weights unchanged, so relax it"
        )
    return best


def propose(bench: Bench, payload: int) -> Point:
    """The allocation of least loss within `payload` bytes of weights, written to a file."""
    options = bench.study.options()
    taken = allocate(options, payload)
    picked = [
        (site, choices[t])
        for site, choices, t in zip(bench.study.sites, bench.study.choices, taken, strict=True)
    ]
    recipe = recipe_for(picked)
    if recipe and bench.study.corrects_norms:
        recipe.append({"method": "recover.batchnorm", "options": {}})
    loss = sum(choices[t][1] for choices, t in zip(options, taken, strict=True))
    return bench.size(recipe, loss, {site.name: choice.label for site, choice in picked})


def front(bench: Bench, point: Point, steps: int = 10) -> list[tuple[int, float]]:
    """(bytes, loss) that the allocation expects for files from the smallest to 8-bit codes."""
    options = bench.study.options()
    least = sum(min(size for size, _ in choices) for choices in options)
    rest = point.bytes - _spent(bench, point)
    found = []
    for payload in np.geomspace(least, max(least, _lossless_like(options)), steps):
        # Upwards: the logarithm's last digit must not make the least too little.
        taken = allocate(options, ceil(payload))
        picked = [choices[t] for choices, t in zip(options, taken, strict=True)]
        found.append((rest + sum(size for size, _ in picked), sum(loss for _, loss in picked)))
    return found


def _spent(bench: Bench, point: Point) -> int:
    """Bytes of the weights as they were chosen for `point`."""
    study = bench.study
    return sum(
        size
        for site, choices, sizes in zip(study.sites, study.choices, study.sizes, strict=True)
        for choice, size in zip(choices, sizes, strict=True)
        if choice.label == point.labels[site.name]
    )


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


def _otherwise(bench: Bench, point: Point, short: str, limit: int) -> Point:
    """The smallest file that keeps the quality, if that fits after all.

    Metrics on few samples are noisy: a plan of more loss now and then keeps what one of less lost.
    Raises BudgetError saying how near both came.
    """
    said = f"at {point.bytes:,} bytes ({point.bytes / bench.study.size_before:.3f}x) {short}"
    try:
        enough = smallest(bench)
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


def _lossless_like(options: list[list[tuple[int, float]]]) -> float:
    """Bytes with every weight at its best choice below the unchanged one (8-bit codes, usually)."""
    return float(sum(min(choices[1:] or choices, key=lambda c: c[1])[0] for choices in options))
