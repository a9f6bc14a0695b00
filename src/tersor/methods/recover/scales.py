"""Scales-only tuning: codes stay, their scales learn to give the original's outputs again.

The cheapest recovery by training: a few hundred unlabelled inputs, no byte more, minutes at most.
For every quantized network, after its last compressing step; most where scales are many (groups)
and bits are few. For batch norms that saw other inputs before, `recover.batchnorm` first.

Source: MLX-LM's distilled weight quantization (DWQ, 2025), for training scales alone against the
original's outputs; Han, Mao, Dally 2016 (Deep Compression), arXiv:1510.00149, section 3.3, for
shared values; Bengio, Leonard, Courville 2013, arXiv:1308.3432, for gradients that pass
rounding unchanged.
Differs: scales move by factors, the task's divergence is what becomes small, and biases and norms
may be trained along. What is trained is rounded as it will be stored.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from tersor.errors import OptionError
from tersor.forms import Form, Trellis
from tersor.measure.running import unfused
from tersor.methods.asked import held_out_of, original_of
from tersor.methods.learning import learn, lessons_of
from tersor.methods.tuning import Trained, Tuned, TunedNumbers, shown
from tersor.recipe import Outcome, method
from tersor.surgery.hold import held
from tersor.surgery.walk import vectors as vectors_of
from tersor.task import Task
from tersor.train import Lessons, TrainingLog, answers


@method
def scales(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    epochs: Annotated[int, Field(ge=1)] = 10,
    rate: Annotated[float, Field(gt=0, le=1)] = 0.005,
    on: Literal["calibration", "train"] = "calibration",
    samples: Annotated[int, Field(ge=1)] = 512,
    vectors: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, Outcome]:
    """Trains the float parts of every form, in place: scales, steps and shared values.

    original: the network before compression; `run` passes the one it was given
    epochs: passes over the inputs
    rate: the highest, of Adam; a scale changes by about this share in a step
    on: "calibration" inputs, whose answers by the original are the target; or the "train" data,
        whose labels count half
    samples: calibration inputs to use, at most; what is kept is judged on held-out ones
    vectors: whether biases, and scales and shifts of norms, are trained too; those that are
        numbers on a grid are rounded to it
    generator: draws the order of the inputs

    The best state on held-out inputs is kept, be it the start; the step's outcome says whether
    anything changed, with the divergence before and after. Raises OptionError for a network without
    such parts, TaskError without data, ModelError where training does not stay finite.
    """
    task, _ = held_out_of("recover.scales", task)
    original = original_of("recover.scales", original)
    tuned = _tuned(model, vectors=vectors)
    lessons: Lessons = answers(original, task, task.calibration(samples))
    if on == "train":
        lessons = lessons_of("recover.scales", task, original, labels=0.5)
    with unfused():
        outcome = learn(
            "recover.scales",
            model,
            lessons,
            original,
            parameters=[each.change for each in tuned],
            epochs=epochs,
            rate=rate,
            generator=generator,
            log=log,
            batch_norms=False,
            shown=partial(shown, tuned),
        )
    for each in tuned:
        each.store()
    return model, outcome


def _tuned(model: nn.Module, *, vectors: bool) -> list[Trained]:
    """Everything to train, once. Raises OptionError where no form has any."""
    outer = dict.fromkeys(form for _, form in held(model))
    numbers = [form for form in outer if vectors and _is_vector(form)]
    forms = dict.fromkeys(form for each in outer if each not in numbers for form in each.forms())
    found: list[Trained] = [
        Tuned([(form, name)], keep_zeros=True) for form in forms for name in form.tunable()
    ]
    if vectors and outer:
        found += [TunedNumbers(form) for form in numbers if isinstance(form, Trellis)]
        found += [Tuned(site.uses) for site in vectors_of(model)]
    if not found:
        raise OptionError(
            f"{type(model).__name__} holds no weight with scales or shared values, so "
            "recover.scales has nothing to train; put it behind a quantizing step"
        )
    return found


def _is_vector(form: Form) -> bool:
    return isinstance(form, Trellis) and len(form.shape) == 1 and form.states == 1
