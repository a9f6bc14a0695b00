"""What recoveries ask of their caller, and what they say where it is missing."""

from __future__ import annotations

import copy

from torch import nn

from tersor.errors import OptionError, TaskError
from tersor.recipe import recipe_of
from tersor.task import Inputs, Task, device_of


def original_of(name: str, original: nn.Module | None) -> nn.Module:
    """The network to stay close to. name: of the method. Raises OptionError without it."""
    if original is None:
        raise OptionError(
            f"{name} compares with another network, as that before compression; use run(), which "
            f"passes it, or {name.rpartition('.')[2]}(model, task, original=network)"
        )
    return original


def beside(original: nn.Module, model: nn.Module) -> nn.Module:
    """The original, or a copy where `model` is if that is another device."""
    where = device_of(model)
    return original if device_of(original) == where else copy.deepcopy(original).to(where)


def prepared(original: nn.Module, model: nn.Module, task: Task) -> nn.Module:
    """A copy of the original after the steps of `model` that change no output, where `model` is.

    Its weights and what its layers give then match those of `model`.
    """
    # Here, because the table of techniques that run() knows has those that ask in it.
    from tersor.methods.run import run

    steps = [step for step in recipe_of(model).steps if step.method.startswith("transform.")]
    twin = run(original, steps, task) if steps else copy.deepcopy(original)
    return twin.to(device_of(model))


def held_out_of(
    name: str, task: Task | None, samples: int | None = None
) -> tuple[Task, list[Inputs]]:
    """The task, and inputs of it to judge by. Raises TaskError without any.

    samples: to use, at most; None for all that it keeps for that
    """
    if task is None:
        raise TaskError(f"{name} needs inputs to run the network on; pass a task")
    held_out = task.holdout(samples)
    if not held_out:
        raise TaskError(
            f"{name} judges itself on held-out inputs and the task has none; give it more samples, "
            "or holdout=inputs"
        )
    return task, held_out
