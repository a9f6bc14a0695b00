"""Distillation: the whole network is trained to answer as it did before it was compressed.

After cutting, pruning or low rank, whenever there are more inputs than a few hundred: nothing else
takes back as much. No labels are used. It needs minutes where other recoveries need seconds, and
what is quantized already stays: train before, or use `recover.scales` behind.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2 and eq. 4 for the temperature's
square.
Differs from the paper: labels play no part; for sentence pairs and numbers the divergence is the
task's own; zeros of pruned weights stay zero, and their places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import OptionError
from tersor.measure import divergence_of, reference_outputs
from tersor.measure.running import differentiable
from tersor.methods.asked import held_out_of, original_of
from tersor.methods.sparse import sparse_form
from tersor.recipe import Outcome, method
from tersor.surgery.hold import decoded, held
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task, evaluation_mode
from tersor.train import Lesson, Teacher, fit


@method
def distill(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    epochs: Annotated[int, Field(ge=1)] = 3,
    rate: Annotated[float, Field(gt=0, le=1)] = 5e-4,
    temperature: Annotated[float, Field(gt=0)] = 2.0,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains everything that is stored as plain or sparse floats, in place.

    original: the network before compression; `run` passes the one it was given
    epochs: passes over the training inputs of the task, or its calibration inputs if it has none
    rate: the highest, of Adam with half a cosine
    temperature: what logits are divided by, for classes
    generator: draws the order of the inputs
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    The best state on held-out inputs is kept, be it the start; the step's outcome says whether
    anything changed, with the divergence before and after. Raises OptionError where nothing can be
    trained, TaskError without data, ModelError where training does not stay finite.
    """
    task, held_out = held_out_of("recover.distill", task)
    original = original_of("recover.distill", original)
    parameters = _parameters(model, include, exclude)
    lessons = Teacher(original, task, temperature)
    wanted = reference_outputs(original, task, held_out)

    def loss(lesson: Lesson) -> Tensor:
        with _learning(model), torch.enable_grad():
            return lessons.loss(task.predict(model, lesson.inputs), lesson)

    def judge() -> float:
        return divergence_of(model, task, held_out, wanted)

    with differentiable(parameters), decoded(original):
        fitted = fit(
            model,
            torch.optim.Adam(parameters, lr=rate),
            lessons,
            loss,
            epochs=epochs,
            judge=judge,
            generator=generator or torch.Generator().manual_seed(0),
        )
    for parameter in parameters:
        parameter.grad = None
    return model, {
        "kept": fitted.epoch > 0,
        "divergence_before": fitted.before,
        "divergence_after": fitted.after,
        "trained": sum(parameter.numel() for parameter in parameters),
    }


def _parameters(model: nn.Module, include: Patterns, exclude: Patterns) -> list[nn.Parameter]:
    """Everything to train, once. Raises OptionError where there is nothing."""
    chosen = {id(layer) for s in walk(model, include, exclude) for layer, _ in s.uses}
    others = {id(layer) for s in walk(model) for layer, _ in s.uses} - chosen
    coded = {
        id(parameter)
        for _, form in held(model)
        if sparse_form(form) is not form
        for parameter in form.parameters()
    }
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if id(module) in others:
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point() and parameter.numel():
                found[id(parameter)] = parameter
    left = [parameter for key, parameter in found.items() if key not in coded]
    if not left:
        raise OptionError(
            f"{type(model).__name__} holds nothing but codes, so recover.distill has nothing to "
            "train; use recover.scales, or put this step before the quantizing one"
        )
    return left


@contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
    """Batch norms follow the batches; nothing is dropped out, for the teacher drops nothing."""
    with evaluation_mode(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        yield
