"""What can be refused before anything is measured, and a budget that the original itself fails."""

from __future__ import annotations

from typing import Any

from torch import nn

from tersor.codec import check_profile
from tersor.errors import BudgetError, ModelError, OptionError, TaskError
from tersor.export import require
from tersor.methods.run import check
from tersor.plan.budget import Budget
from tersor.plan.search import quality_kept
from tersor.recipe import Recipe, recipe_of
from tersor.surgery.walk import check_finite
from tersor.task import Task


def check_job(
    model: nn.Module,
    task: Task | None,
    budget: Budget,
    *,
    example: Any,
    recipe: Any,
    profile: str,
    seed: int,
) -> None:
    """Raises an error for a model, a task, a budget or a recipe that cannot be used together."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module; pass the network itself"
        )
    if task is not None and not isinstance(task, Task):
        raise TaskError(
            f"the task is a {type(task).__name__}, not a tersor.Task; make one with tersor.task, "
            "for example classification(test=(inputs, labels))"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise OptionError(f"seed={seed!r} must be a whole number, 0 or more")
    check_profile(profile)
    check_finite(model)
    _check_budget(budget, task)
    if budget.target is not None:
        _check_target(budget.target, has_example=task is not None or example is not None)
    if recipe is not None:
        steps = Recipe.from_json(recipe).steps
        if not steps:
            raise OptionError("the recipe has no steps; leave it out to have one searched for")
        check(steps, before=[step.method for step in recipe_of(model).steps])


def check_reach(budget: Budget, before: dict[str, float], task: Task | None) -> None:
    """Raises BudgetError for a bound on a metric that the original itself does not keep."""
    for sign, bounds in ((">=", budget.at_least), ("<=", budget.at_most)):
        for name, bound in bounds.items():
            if task and not quality_kept(task.metrics[name], before[name], bound):
                raise BudgetError(
                    f"{name}{sign}{bound:g} in the budget is out of reach: the original model "
                    f"itself has {before[name]:.4g}; ask for less than that"
                )


def _check_budget(budget: Budget, task: Task | None) -> None:
    asked = str(budget)
    measured = budget.limits_quality or budget.latency_ms or budget.memory or budget.macs
    if task is None and measured:
        raise TaskError(
            f"the budget {asked} needs data to measure it on; give a task (--data), or ask for "
            "size= alone"
        )
    if task is not None and budget.limits_quality and not task.has_test:
        raise TaskError(
            f"the budget {asked} limits a metric, which needs labelled test data, and the task has "
            "none; give test data, or ask for size= alone"
        )
    known = task.metrics if task else {}
    for sign, bounds in ((">=", budget.at_least), ("<=", budget.at_most)):
        for name, bound in bounds.items():
            asked = f"{name}{sign}{bound:g} in the budget"
            if name not in known:
                raise BudgetError(f"{asked} names no metric of the task; it has {list(known)}")
            if known[name].higher_is_better != (sign == ">="):
                better, other = ("high", ">=") if sign == "<=" else ("low", "<=")
                raise BudgetError(
                    f"{asked} asks for a worse model, since {name} should be {better}; write "
                    f"{name}{other}{bound:g}"
                )


def _check_target(target: str, *, has_example: bool) -> None:
    if not has_example:
        raise OptionError(
            f"target={target} needs example inputs to export with; give a task (--data), or "
            "example="
        )
    require(check=True)
