"""Recipes: what was done to a model, in order, as plain data that can be stored and replayed.

`@method` turns a function `(model, task=None, *, options) -> model` into a technique: it checks the
options against the function's own annotations and the model for NaN, fills in the defaults, calls
it, and notes the step on `model.recipe`. It registers nothing; `methods/table.py` is the one list
of techniques.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, cast, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from tersor.errors import OptionError
from tersor.surgery.walk import check_finite

P = ParamSpec("P")
Outcome = dict[str, Any]

# What a caller or `run` hands to a method and no recipe holds: the data, the network as it was,
# what was found out about it before, and where trainings show and keep themselves.
GIVEN = frozenset({"task", "original", "known", "log"})


@dataclass(frozen=True)
class Step:
    """One technique applied.

    method: its name, "quantize.rtn"
    options: all its options, defaults included
    outcome: what it reported about itself, {"kept": False, ...}; replaying ignores it
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=dict)


@dataclass
class Recipe:
    """The steps applied so far."""

    steps: list[Step] = field(default_factory=list)

    def as_json(self) -> list[dict[str, Any]]:
        """[{"method": "quantize.rtn", "options": {...}}, ...], and "outcome" where there is one."""
        return [
            {"method": step.method, "options": dict(step.options)}
            | ({"outcome": dict(step.outcome)} if step.outcome else {})
            for step in self.steps
        ]

    @classmethod
    def from_json(cls, data: Any) -> Recipe:
        """The inverse of `as_json`. Raises OptionError on anything else."""
        if not isinstance(data, list):
            raise OptionError(f"a recipe is a list of steps, not {type(data).__name__}")
        return cls([_step(number, entry) for number, entry in enumerate(data, 1)])


def _step(number: int, entry: Any) -> Step:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("method"), str)
        or entry.keys() - {"method", "options", "outcome"}
    ):
        raise OptionError(
            f"step {number} of the recipe is {entry!r}; a step is "
            '{"method": "quantize.rtn", "options": {"bits": 4}}'
        )
    for part in ("options", "outcome"):
        if not isinstance(entry.get(part) or {}, dict):
            raise OptionError(
                f"step {number}, {entry['method']}: {part}={entry[part]!r} is not a mapping"
            )
    return Step(entry["method"], dict(entry.get("options") or {}), dict(entry.get("outcome") or {}))


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe noted on `model`, an empty one for an untouched model."""
    recipe = getattr(model, "recipe", None)
    return recipe if isinstance(recipe, Recipe) else Recipe()


def method(
    function: Callable[Concatenate[nn.Module, P], nn.Module | tuple[nn.Module, Outcome]],
) -> Callable[Concatenate[nn.Module, P], nn.Module]:
    """Makes a function a technique that notes itself on the model. See the module's docstring.

    A function that has something to report returns (model, outcome), outcome of plain JSON values.
    An option `generator: torch.Generator | None` also takes a seed; the recipe keeps the seed.
    """
    name = name_of(function)

    @wraps(function)
    def apply(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> nn.Module:
        try:
            check_options(function, {k: v for k, v in kwargs.items() if k not in GIVEN})
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from None
        used = {**defaults_of(function), **{k: v for k, v in kwargs.items() if k not in GIVEN}}
        if "generator" in used:
            used["generator"] = _seed(used["generator"])
            kwargs["generator"] = torch.Generator().manual_seed(used["generator"])
        if (log := kwargs.get("log")) is not None:
            # What tells this training from others, in a loss that no checkpoint can look into.
            log.about = repr(used)  # type: ignore[attr-defined]
        check_finite(model)
        steps = list(recipe_of(model).steps)
        done = function(model, *args, **kwargs)
        out, outcome = done if isinstance(done, tuple) else (done, {})
        step = Step(name, {key: _plain(value) for key, value in used.items()}, outcome)
        out.recipe = Recipe([*steps, step])  # type: ignore[assignment]
        return out

    return cast("Callable[Concatenate[nn.Module, P], nn.Module]", apply)


def name_of(function: Callable[..., Any]) -> str:
    """ "quantize.rtn" for tersor/methods/quantize/rtn.py; "package.module.function" elsewhere."""
    family = function.__module__.removeprefix("tersor.methods.")
    return (
        family
        if family.rpartition(".")[2] == function.__name__
        else f"{family}.{function.__name__}"
    )


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The options of a method with their defaults, in the order of its signature."""
    return {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN
    }


def check_options(function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raises OptionError for an unknown option or one that its annotation does not allow."""
    known = _adapters(inspect.unwrap(function))
    for option, value in options.items():
        if option not in known:
            near = get_close_matches(option, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise OptionError(
                f"there is no option {option!r}{hint} The options are {sorted(known)}"
            )
        if option == "generator" and isinstance(value, int):
            continue
        try:
            known[option].validate_python(value)
        except ValidationError as error:
            reasons = dict.fromkeys(e["msg"].removeprefix("Input ") for e in error.errors())
            raise OptionError(f"{option}={value!r} {' or '.join(reasons)}") from None


@cache
def _adapters(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(function, include_extras=True)
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True)
    return {name: TypeAdapter(hints[name], config=strict) for name in defaults_of(function)}


def _seed(generator: torch.Generator | int | None) -> int:
    # Drawn, not read: a generator that was used before still replays from this one number.
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**62, (), generator=generator))
    return generator or 0


def _plain(value: Any) -> Any:
    """An option as JSON knows it: a tuple as a list."""
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
