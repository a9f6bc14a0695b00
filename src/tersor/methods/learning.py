"""How techniques train: what may change, what it is judged by, and what the step reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError, OptionError, TaskError
from tersor.measure import divergence_of, evaluating, reference_outputs
from tersor.measure.running import differentiable, differentiable_recurrence
from tersor.methods.sparse import sparse_form
from tersor.recipe import Outcome
from tersor.surgery.hold import decoded, held
from tersor.surgery.walk import Patterns, vectors, walk
from tersor.task import Task, evaluation_mode
from tersor.train import (
    Fitted,
    Labels,
    Lesson,
    Lessons,
    Regime,
    Teacher,
    Training,
    TrainingLog,
    fit,
)
from tersor.train.distributed import Portion, agreed, world
from tersor.train.distributed.together import Together
from tersor.train.health import Alive
from tersor.train.lessons import check_alike

Loss = Callable[[Tensor, Lesson], Tensor]
"""A number from rows of `task.predict` and the lesson that they answer."""


def learn(
    name: str,
    model: nn.Module,
    lessons: Lessons,
    original: nn.Module | None,
    *,
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    epochs: int,
    rate: float,
    loss: Loss | None = None,
    training: Training | Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    regimes: Sequence[Regime] = (),
    log: TrainingLog | None = None,
    batch_norms: bool = True,
    shown: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Outcome:
    """Trains these parameters in place; the best state is left. Returns what to report.

    name: of the method
    original: whose held-out answers judge; None for the labels of held-out samples, and where
        there are none the last state counts as the best
    parameters: more than the network's own may be among them, as those of regressors; or groups of
        them as torch's optimizers take, with an "lr" each
    loss: by default that of the lessons
    batch_norms: whether those follow the batches that are trained, or have nothing to train
    shown: entered around each run of the network, where what is trained is to be put into it
    """
    every = list(_flat(parameters))
    chosen = {id(parameter) for parameter in every}
    task, settings = lessons.task, Training.of(training)
    loss = loss or lessons.loss
    judge, unit = _judge(name, model, task, original, shown)
    joined = log.together() if log is not None and log.together is not None else None
    if joined is not None:
        if joined.momentum:
            raise OptionError(
                f"{name}: {joined.about} brings a momentum, and so does {settings.optimizer}; give "
                "it momentum=0, or use another compressor"
            )
        lessons, judge = _divided(name, lessons, judge, regimes, joined)
        joined.trained = [*every, *(own for regime in regimes for own in regime.own)]
        # First, so that other regimes see gradients of all.
        regimes = [joined, *regimes]
    alive = Alive()
    if joined is None:
        # A process that stops alone would leave the others waiting for it.
        regimes = [*regimes, alive]

    def value(lesson: Lesson) -> Tensor:
        with (
            _modes(model, chosen, batch_norms),
            differentiable_recurrence(model),
            torch.enable_grad(),
            shown(),
        ):
            outputs = task.predict(model, lesson.inputs)
            alive.look(outputs.detach(), lesson.targets if lesson.answer is None else lesson.answer)
            return loss(outputs, lesson)

    with differentiable(every), nullcontext() if original is None else decoded(original):
        fitted = fit(
            model,
            settings.optimizing(parameters, rate),
            lessons,
            value,
            epochs=epochs,
            judge=judge,
            generator=generator or torch.Generator().manual_seed(0),
            training=settings,
            regimes=regimes,
            log=log,
        )
    for parameter in (*every, *model.parameters()):
        parameter.grad = None
    if log is not None:
        log.curves[name if log.name == "training" else log.name] = fitted.curve
    sent = {} if joined is None else {"bytes_sent": joined.traffic.sent}
    return _outcome(fitted, unit, sum(p.numel() for p in every)) | sent


def _divided(
    name: str,
    lessons: Lessons,
    judge: Callable[[], float] | None,
    regimes: Sequence[Regime],
    joined: Together,
) -> tuple[Lessons, Callable[[], float] | None]:
    """This process's rows of each batch, and a judge that all processes agree with."""
    if joined.apart and any(regime.chooses for regime in regimes):
        raise OptionError(
            f"{name} chooses by the weights, and with {type(joined).__name__} those differ between "
            "processes; let together= of the log make an Averaging"
        )
    if isinstance(lessons, Teacher):
        lessons.part = world(joined.group)
    else:
        lessons = Portion(lessons, *world(joined.group))
    return lessons, None if judge is None else agreed(judge, joined.group)


def _flat(parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]) -> Iterator[nn.Parameter]:
    for given in parameters:
        yield from given["params"] if isinstance(given, dict) else (given,)


def lessons_of(
    name: str,
    task: Task | None,
    original: nn.Module | None,
    *,
    labels: float | None = None,
    temperature: float = 1.0,
    standardize: bool = False,
    log: TrainingLog | None = None,
) -> Lessons:
    """What there is to learn from: labels, the original's answers, or both.

    labels: their share in the loss; None for half where there are labels and an original
    log: the original's answers are kept beside its checkpoints

    Raises TaskError where there is neither, or where labels are asked for and missing.
    """
    if task is None:
        raise TaskError(f"{name} needs inputs to train on; pass a task")
    if labels and not task.has_train:
        raise TaskError(
            f"{name}: labels={labels} needs labelled training data and the task has none; give it "
            "train=(inputs, targets), or use labels=0"
        )
    if original is None:
        if not task.has_train:
            raise TaskError(
                f"{name} needs labelled training data and the task has none; give it "
                "train=(inputs, targets)"
            )
        return Labels(task)
    share = labels if labels is not None else 0.5 * task.has_train
    path = None if log is None else log.path
    folder = None if path is None else path.parent / "answers"
    return Teacher(original, task, temperature, standardize, share, folder=folder)


def trainable(
    name: str, model: nn.Module, include: Patterns = None, exclude: Patterns = None
) -> list[nn.Parameter]:
    """Everything that is stored as plain or sparse floats, once. Raises OptionError without any.

    include, exclude: with them vectors that match nothing are trained too; excluded ones are not
    """
    chosen = {id(layer) for s in walk(model, include, exclude) for layer, _ in s.uses}
    left_out = [s for s in walk(model) if not any(id(layer) in chosen for layer, _ in s.uses)]
    others = {id(layer) for s in left_out for layer, _ in s.uses}
    others |= {id(form) for s in left_out if s.form is not None for form in s.form.modules()}
    kept = {s.name for s in vectors(model, None, exclude)}
    excluded = {id(getattr(*s.uses[0])) for s in vectors(model) if s.name not in kept}
    coded = {
        id(parameter)
        for _, form in held(model)
        if sparse_form(form) is not form and not form.training_only
        for parameter in form.parameters()
    }
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if id(module) in others:
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point() and parameter.numel():
                found[id(parameter)] = parameter
    left = [parameter for key, parameter in found.items() if key not in coded | excluded]
    for parameter in left:
        if parameter.dtype == torch.float16:
            raise ModelError(
                f"{type(model).__name__} has weights in float16, in which squares of gradients "
                "vanish; train model.float(), and give the task float32 inputs"
            )
    if not left:
        raise OptionError(
            f"{type(model).__name__} holds nothing but codes, so {name} has nothing to "
            "train; use recover.scales, or put this step before the quantizing one"
        )
    return left


def _judge(
    name: str,
    model: nn.Module,
    task: Task,
    original: nn.Module | None,
    shown: Callable[[], AbstractContextManager[None]],
) -> tuple[Callable[[], float] | None, str]:
    """What says how good a state is, if anything does, and the unit it says it in."""
    if original is not None:
        held_out = task.holdout()
        if not held_out:
            raise TaskError(
                f"{name} judges itself on held-out inputs and the task has none; give it more "
                "samples, or holdout=inputs"
            )
        wanted = reference_outputs(original, task, held_out)
        with evaluating(model):
            check_alike(wanted[0], task.predict(model, held_out[0]))

        def apart() -> float:
            with torch.no_grad(), shown():
                return divergence_of(model, task, held_out, wanted)

        return apart, "divergence"
    if task.validate(model) is None:
        return None, ""

    def loss() -> float:
        with shown(), decoded(model):
            found = task.validate(model)
        assert found is not None
        return found

    return loss, "loss"


def _outcome(fitted: Fitted, unit: str, trained: int) -> Outcome:
    judged = {f"{unit}_before": fitted.before, f"{unit}_after": fitted.after} if unit else {}
    return {"kept": fitted.epoch > 0, **judged, "trained": trained}


@contextmanager
def _modes(model: nn.Module, chosen: set[int], batch_norms: bool) -> Iterator[None]:
    """Batch norms as wanted, all else as it computes in use: a teacher drops nothing out."""
    with evaluation_mode(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                own = module.weight is None or id(module.weight) in chosen
                module.train(batch_norms and own)
        yield
