"""Running a recipe: all steps are checked before the first one starts; the model is copied once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from tersor.errors import CompressError, OptionError
from tersor.methods.effects import Known
from tersor.methods.order import check_order
from tersor.methods.table import TABLE
from tersor.recipe import Recipe, Step, check_options, recipe_of
from tersor.surgery.structure import structure_of
from tersor.surgery.walk import check_finite
from tersor.task import Task
from tersor.train import Training, TrainingLog
from tersor.train.memory import hash_of

Steps = Recipe | Sequence[Step | dict[str, Any]]


def run(
    model: nn.Module,
    recipe: Steps,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    known: Known | None = None,
    log: TrainingLog | None = None,
) -> nn.Module:
    """Applies a recipe to a copy of `model` and returns the copy; `model` stays as it is.

    recipe: a Recipe, or a list of steps such as {"method": "quantize.rtn", "options": {"bits": 4}}
    task: data for the steps that ask for it
    original: the network to stay close to, where that is not `model`
    known: what was found out about `model` with `task`, for a first step that asks for it (`look`
        of quantize.entropy): running many recipes then does not find it out each time
    log: where steps that train show how far they are, and keep themselves: the same call with the
        same folder goes on where it was killed

    Raises OptionError before anything is done for an unknown method or option, a value that does
    not fit, or an order that cannot work. An error inside a step says which step it was.
    """
    steps = _steps(recipe)
    if not steps:
        raise OptionError("the recipe has no steps; give at least one")
    check(steps, before=[step.method for step in recipe_of(model).steps])
    _check_plain(model)
    check_finite(model)
    out, start = copy.deepcopy(model), model if original is None else original
    mark = "" if original is None else _mark(original)
    layers: nn.Module | None = None
    for number, step in enumerate(steps, 1):
        function = TABLE[step.method]
        where = _where(number, steps)
        options, asked = dict(step.options), signature(function).parameters
        if layers is None and number > 1 and _keeps_layers(step) and _changed_layers(out, start):
            layers = copy.deepcopy(out)
        if "original" in asked:
            options["original"] = layers if layers and step.method in _BY_LAYER else start
        # Later steps see another network.
        if "known" in asked and number == 1:
            options["known"] = known
        if "log" in asked and log is not None:
            log.name = f"{number}-{step.method}"
            options["log"] = log
        try:
            out = function(out, task, **options)
        except CompressError as error:
            error.args = (f"{where}: {error}",)
            raise
        except Exception as error:
            error.add_note(f"in {where}")
            raise
        if original is not None and "original" in asked:
            recipe_of(out).steps[-1].outcome["original"] = mark
    return out


# Recoveries that compare layer by layer: what their layers should give is what they gave before
# they were pruned or quantized, but behind the steps that gave them other shapes.
_BY_LAYER = {"recover.polish", "recover.batchnorm", "recover.bias", "recover.lqer"}


def _keeps_layers(step: Step) -> bool:
    return step.method.startswith(("prune.", "quantize.", "share.")) and step.method not in (
        "share.layers",
    )


def _changed_layers(model: nn.Module, original: nn.Module) -> bool:
    return structure_of(model) != structure_of(original)


def _check_plain(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod"):
        raise OptionError(
            f"{type(model).__name__} wraps a compiled network, whose layers cannot be changed; "
            "pass the network itself, model._orig_mod, and compile what comes of it"
        )


def replay(
    model: nn.Module,
    recipe: Steps | str | Path,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
) -> nn.Module:
    """Does to `model` again what a recipe says: the same model and task give the same bits.

    recipe: the recipe, or a file that `read_recipe` reads
    original: the other network that its steps learned from or stayed close to, if there was one

    Raises OptionError, beside what `run` raises, where that network is missing or is another one.
    """
    steps = _steps(read_recipe(recipe) if isinstance(recipe, str | Path) else recipe)
    found = None if original is None else _mark(original)
    for number, step in enumerate(steps, 1):
        wanted = step.outcome.get("original")
        if wanted is not None and wanted != found:
            raise OptionError(
                f"{_where(number, steps)} was done with original={wanted}, not with "
                f"{found or 'the network itself'}; pass the same one"
            )
    return run(model, steps, task, original=original)


def _mark(original: nn.Module) -> str:
    return f"{type(original).__name__} {hash_of(original)[:12]}"


def read_recipe(path: str | Path) -> Recipe:
    """The steps noted in a .tersor file, or listed in a .json or .yaml file. Raises OptionError."""
    path = Path(path)
    if path.suffix == ".tersor":
        from tersor.codec import read_header

        return Recipe.from_json(read_header(path).recipe)
    try:
        # JSON is YAML too.
        return Recipe.from_json(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionError(f"the recipe {path} cannot be read: {error}") from error


def check(steps: Sequence[Step], *, before: Sequence[str] = ()) -> None:
    """Raises OptionError unless every step can be run, in this order."""
    for number, step in enumerate(steps, 1):
        if step.method not in TABLE:
            near = get_close_matches(step.method, TABLE, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(
                f"step {number} of {len(steps)}: there is no method {step.method!r}; {hint}"
                f"The methods are {sorted(TABLE)}"
            )
        try:
            check_options(TABLE[step.method], step.options)
            Training.of(step.options.get("training"))
        except OptionError as error:
            raise OptionError(f"{_where(number, steps)}: {error}") from None
    check_order(before, [step.method for step in steps])


def _steps(recipe: Steps) -> list[Step]:
    if isinstance(recipe, Recipe):
        return recipe.steps
    if isinstance(recipe, str | dict) or not isinstance(recipe, Sequence):
        raise OptionError(f"a recipe is a list of steps, not {type(recipe).__name__}")
    plain = [
        {"method": s.method, "options": s.options} if isinstance(s, Step) else s for s in recipe
    ]
    return Recipe.from_json(plain).steps


def _where(number: int, steps: Sequence[Step]) -> str:
    return f"step {number} of {len(steps)}, {steps[number - 1].method}"
