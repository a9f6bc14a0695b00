"""Distillation without data: inputs are dreamt up from what the teacher's batch norms remember.

Noise is changed until the teacher is sure of a class and its batch norms see the means and
variances that they saw in training; a student then learns the teacher's answers to it. For
convolutional networks whose data is lost or secret. Any real inputs, even of another kind and
without labels, are cheaper and better: then use `distill.logits`.

Source: Yin et al. 2020 (DeepInversion), arXiv:1912.08795, eqs. 2 to 4.
Differs from the paper: inputs are neither shifted nor mirrored meanwhile, they are dreamt up once
and not in competition with the student, and the student learns from answers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError, TaskError
from tersor.measure import evaluating
from tersor.measure.running import differentiable_recurrence
from tersor.methods.asked import original_of
from tersor.methods.learning import learn, lessons_of, trainable
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task, classification
from tersor.train import TrainingLog

_BATCH = 64
"""Inputs that are dreamt up together; their means and variances are what batch norms compare."""
_HELD_OUT = 4
"""One in so many judges, and is never learned from."""
_RATE = 0.05
_STATISTICS, _VARIATION, _LENGTH = 10.0, 2.5e-5, 3e-8
"""Weights of batch norms, total variation and squared length: the paper's for CIFAR-10."""


@method
def data_free(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    epochs: Annotated[int, Field(ge=1)] = 3,
    rate: Annotated[float, Field(gt=0, le=1)] = 5e-4,
    temperature: Annotated[float, Field(gt=0)] = 2.0,
    inputs: Annotated[int, Field(ge=8)] = 512,
    steps: Annotated[int, Field(ge=1)] = 200,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains everything that is stored as plain or sparse floats, in place.

    original: the teacher; `run` passes the network it was given, or its own `original`
    epochs: passes over the inputs that were dreamt up
    rate: the highest
    temperature: what logits are divided by
    inputs: how many are dreamt up; a quarter of them judges
    steps: of changing each of them
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the noise, classes and the order of the inputs
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    Of the task only the shape of an input is used. The best state on inputs that were dreamt up and
    held back is kept, be it the start; the outcome is that of `distill.logits` on them, and the
    share of inputs of which the teacher says what they were meant to be. Raises ModelError for a
    teacher without batch norms, TaskError unless inputs are numbers and outputs classes, and else
    as `distill.logits` does.
    """
    original = original_of("distill.data_free", original)
    like = _like(task, original)
    generator = generator or torch.Generator().manual_seed(0)
    parameters = trainable("distill.data_free", model, include, exclude)
    dreams = dream(original, like, inputs, steps, generator)
    held_out = inputs // _HELD_OUT
    dreamt = classification(
        train=(dreams.inputs[held_out:], dreams.classes[held_out:]),
        holdout=dreams.inputs[:held_out],
        batch_size=_BATCH,
    )
    outcome = learn(
        "distill.data_free",
        model,
        lessons_of("distill.data_free", dreamt, original, labels=0.0, temperature=temperature),
        original,
        parameters=parameters,
        epochs=epochs,
        rate=rate,
        training=training,
        generator=generator,
        log=log,
    )
    return model, {**outcome, "as_meant": dreams.as_meant}


@dataclass(frozen=True)
class Dreams:
    """What was dreamt up.

    inputs: (n, ...)
    classes: (n,), which each was meant to be
    as_meant: share of which the teacher says so, 0 to 1
    """

    inputs: Tensor
    classes: Tensor
    as_meant: float


def dream(
    teacher: nn.Module, like: Tensor, count: int, steps: int, generator: torch.Generator
) -> Dreams:
    """Inputs on which the teacher is sure, and its batch norms see what they saw in training.

    like: (1, ...), of the shape of each
    """
    judge = classification(calibration=like)
    found, right = [], 0
    meant = torch.arange(count)
    with evaluating(teacher), differentiable_recurrence(teacher), _watched(teacher) as seen:
        classes = judge.predict(teacher, like).shape[1]
        for start in range(0, count, _BATCH):
            wanted = meant[start : start + _BATCH] % classes
            guess = torch.randn(len(wanted), *like.shape[1:], generator=generator).to(like.device)
            guess.requires_grad_()
            optimizer = torch.optim.Adam([guess], lr=_RATE, betas=(0.5, 0.9))
            for _ in range(steps):
                with torch.enable_grad():
                    seen.clear()
                    said = judge.predict(teacher, guess)
                    value = functional.cross_entropy(said, wanted.to(said.device))
                    value = value + _STATISTICS * torch.stack(seen).sum() + plain(guess)
                (guess.grad,) = torch.autograd.grad(value, guess)
                optimizer.step()
            found.append(guess.detach())
            right += int((judge.predict(teacher, guess).argmax(1).cpu() == wanted).sum())
    # Batches go through all classes in turn; what is held back should too, and be no one batch.
    order = torch.randperm(count, generator=generator)
    return Dreams(torch.cat(found)[order], meant[order] % classes, right / count)


def strange(given: Tensor, norm: _BatchNorm) -> Tensor:
    """How far means and variances of (n, channels, ...) are from those in training, eq. 4."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    channels = given.transpose(0, 1).flatten(1)
    mean, variance = channels.mean(1), channels.var(1, correction=0)
    apart: Tensor = torch.linalg.vector_norm(mean - norm.running_mean)
    spread: Tensor = torch.linalg.vector_norm(variance - norm.running_var)
    return apart + spread


def plain(inputs: Tensor) -> Tensor:
    """The prior of eq. 2: total variation over neighbouring places, and squared length."""
    steps = [torch.diff(inputs, dim=axis) for axis in range(2, inputs.dim())]
    variation = sum((torch.linalg.vector_norm(step) for step in steps), inputs.new_zeros(()))
    return _VARIATION * variation + _LENGTH * inputs.square().sum()


@contextmanager
def _watched(teacher: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, each batch norm that runs adds how strange its inputs are."""
    seen: list[Tensor] = []

    def note(norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        seen.append(strange(args[0], norm))

    with ExitStack() as stack:
        for norm in _norms(teacher):
            stack.callback(norm.register_forward_pre_hook(note).remove)
        yield seen


def _norms(teacher: nn.Module) -> Sequence[_BatchNorm]:
    return [
        module
        for module in teacher.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def _like(task: Task | None, teacher: nn.Module) -> Tensor:
    """One input, of which only the shape is used. Raises where nothing can be dreamt up."""
    if task is None:
        raise TaskError(
            "distill.data_free must know the shape of an input; pass a task, as "
            "classification(calibration=torch.zeros(1, 3, 32, 32))"
        )
    if not _norms(teacher):
        raise ModelError(
            f"distill.data_free dreams up what batch norms remember, and the teacher, "
            f"{type(teacher).__name__}, has none with statistics; use distill.logits on any inputs"
        )
    given = task.example(1)
    if task.kind != "classification" or not (
        isinstance(given, Tensor) and given.is_floating_point()
    ):
        what = "several tensors" if not isinstance(given, Tensor) else str(given.dtype)
        raise TaskError(
            f"distill.data_free dreams up one tensor of numbers for each class, and this is a task "
            f"of {task.kind} on {what}; use distill.logits with any inputs"
        )
    return given[:1]
