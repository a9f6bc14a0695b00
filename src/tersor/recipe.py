"""Recipes: what was done to a model, in order, as plain data that can be stored and replayed.

`@method` turns a function `(model, task=None, *, options) -> model` into a technique: it checks the
options' names, fills in the defaults, calls it, and notes the step on `model.recipe`. It registers
nothing; `methods/table.py` is the one list of techniques.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import torch
from torch import nn

from tersor.errors import OptionError

P = ParamSpec("P")


@dataclass(frozen=True)
class Step:
    """One technique applied: its name ("quantize.rtn") and all its options, defaults included."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recipe:
    """The steps applied so far."""

    steps: list[Step] = field(default_factory=list)

    def as_json(self) -> list[dict[str, Any]]:
        """[{"method": "quantize.rtn", "options": {...}}, ...]."""
        return [{"method": s.method, "options": dict(s.options)} for s in self.steps]

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """The inverse of `as_json`. Raises OptionError on anything else."""
        if not isinstance(data, list):
            raise OptionError(f"a recipe is a list of steps, not {type(data).__name__}")
        steps = []
        for number, entry in enumerate(data, 1):
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("method"), str)
                or entry.keys() - {"method", "options"}
            ):
                raise OptionError(
                    f"step {number} of the recipe is {entry!r}; a step is "
                    '{"method": "quantize.rtn", "options": {"bits": 4}}'
                )
            options = entry.get("options") or {}
            if not isinstance(options, dict):
                raise OptionError(
                    f"step {number}, {entry['method']}: options={options!r} is not a mapping"
                )
            steps.append(Step(entry["method"], dict(options)))
        return cls(steps)


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe noted on `model`, an empty one for an untouched model."""
    recipe = getattr(model, "recipe", None)
    return recipe if isinstance(recipe, Recipe) else Recipe()


def method(
    function: Callable[Concatenate[nn.Module, P], nn.Module],
) -> Callable[Concatenate[nn.Module, P], nn.Module]:
    """Makes a function a technique that notes itself on the model. See the module's docstring."""
    signature = inspect.signature(function)
    name = name_of(function)
    options = {p.name: p.default for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}

    @wraps(function)
    def apply(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> nn.Module:
        unknown = kwargs.keys() - options.keys() - {"task"}
        if unknown:
            raise OptionError(
                f"{name} has no option {sorted(unknown)}; its options are {sorted(options)}"
            )
        steps = list(recipe_of(model).steps)
        out = function(model, *args, **kwargs)
        used = {key: _plain(kwargs.get(key, default)) for key, default in options.items()}
        out.recipe = Recipe([*steps, Step(name, used)])  # type: ignore[assignment]
        return out

    return apply


def name_of(function: Callable[..., Any]) -> str:
    """ "quantize.rtn" for tersor/methods/quantize/rtn.py; a third party's "package.module.function"."""
    family = function.__module__.removeprefix("tersor.methods.")
    return (
        family
        if family.rpartition(".")[2] == function.__name__
        else f"{family}.{function.__name__}"
    )


def _plain(value: Any) -> Any:
    """An option as JSON knows it: a generator as its seed, a tuple as a list."""
    if isinstance(value, torch.Generator):
        return value.initial_seed()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
