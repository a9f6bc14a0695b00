"""Lottery tickets: of an untrained network, the few weights that suffice from the start.

The network is trained, a share of its smallest weights is removed, and the others go back to where
they started; again and again, and at last what is left is trained. An experiment more than a tool:
it trains `rounds + 1` times, where `prune.gradual` gets a trained network as small in one training.
Its controls tell what a ticket owes to its starting values, and what to the places of its weights.

Source: Frankle, Carbin 2019, arXiv:1803.03635, section 2 (iterative pruning with resetting) and
section 3 (controls); Frankle et al. 2020, arXiv:1912.05671, section 3, for rewinding: the network
to give is then the one after its first few hundred steps.
Differs from the papers: the last layer loses as large a share as the others; after each training
the best state on held-out labels counts, where the task has some; new starting values are the old
ones of each tensor, shuffled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from tersor.forms import SoftMask
from tersor.methods.learning import learn, lessons_of, trainable
from tersor.methods.masking import behind_mask, check_room, freeze, masked, soft
from tersor.methods.masks import all_but, chosen
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import TrainingLog
from tersor.train.states import Snapshot, statistics

Control = Literal["none", "reinitialize", "random"]


@method
def lottery(
    model: nn.Module,
    task: Task | None = None,
    *,
    log: TrainingLog | None = None,
    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.8,
    rounds: Annotated[int, Field(ge=1)] = 5,
    epochs: Annotated[int, Field(ge=1)] = 10,
    rate: Annotated[float, Field(gt=0, le=1)] = 1e-3,
    control: Control = "none",
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Finds a ticket in an untrained network, trains it, and stores it under a bitmask, in place.

    sparsity: fraction of each layer's weights that become zero, above 0 and below 1
    rounds: of training and removing; each removes as large a share of what is left
    epochs: of each training, passes over the labelled training data
    rate: the highest
    control: "reinitialize" trains the same places from other starting values in the end, "random"
        other places, as many of each layer, from the same ones; "none" trains the ticket
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs, and for controls
    include, exclude: patterns on names and types, see `walk`; other layers are not trained either

    Removes exactly round(sparsity * n) of a layer's n weights. All else that is trained, biases and
    statistics of batch norms too, starts anew in each round. The step's outcome says what share of
    the weights was left after each, and how the last training went. Raises OptionError as
    `prune.gradual` does, TaskError without labels. After an error all is as it was.
    """
    found = chosen(model, sparsity, include, exclude)
    check_room(found.sites, sparsity)
    lessons = lessons_of("prune.lottery", task, None)
    order = generator or torch.Generator().manual_seed(0)
    # Apart, so that all controls see the same inputs in the same order.
    draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=order)))
    plain = [site.form is None for site in found.sites]
    left: list[float] = []

    def train(part: str) -> Outcome:
        with _named(log, part, repr([sparsity, rounds, epochs, rate, training, include, exclude])):
            return learn(
                f"prune.lottery, {part}",
                model,
                lessons,
                None,
                parameters=parameters,
                epochs=epochs,
                rate=rate,
                training=training,
                generator=order,
                log=log,
            )

    with masked(model, found.sites, behind_mask):
        forms = [soft(site) for site in found.sites]
        for form, whole in zip(forms, plain, strict=True):
            # A weight that starts at zero is one to be trained, unless it was pruned.
            form.mask |= whole
        parameters = trainable("prune.lottery", model, include, exclude)
        start = Snapshot([*parameters, *statistics(model)])
        pace = [_pace(form, sparsity, rounds) for form in forms]
        for number in range(rounds):
            train(f"round {number + 1} of {rounds}")
            for form, counts in zip(forms, pace, strict=True):
                keep_largest(form, counts[number])
            left.append(_shown(forms))
            start.restore()
        _change(control, forms, parameters, draws)
        outcome = train("ticket" if control == "none" else control)
    freeze(found.sites, sparsity)
    return model, {**outcome, "left": left}


def keep_largest(form: SoftMask, count: int) -> None:
    """Hides all but so many of the weights that are shown, the smallest first."""
    sizes = form.latent.detach().abs().masked_fill(~form.mask, -torch.inf).flatten()
    form.mask &= all_but(sizes, max(0, len(sizes) - count)).view(form.mask.shape)


def _pace(form: SoftMask, sparsity: float, rounds: int) -> list[int]:
    """How many weights are left after each round: by as large a factor each time."""
    now, size = int(form.mask.sum()), form.mask.numel()
    goal = min(now, size - round(sparsity * size))
    return [round(now * (goal / max(1, now)) ** (n / rounds)) for n in range(1, rounds + 1)]


def _shown(forms: Sequence[SoftMask]) -> float:
    """Share of all weights that their masks show."""
    shown = sum(int(form.mask.sum()) for form in forms)
    return shown / sum(form.mask.numel() for form in forms)


def _change(
    control: Control,
    forms: Sequence[SoftMask],
    parameters: Sequence[nn.Parameter],
    draws: torch.Generator,
) -> None:
    """Makes of a ticket what it is to be compared with."""
    tensors = {"none": [], "reinitialize": parameters, "random": [form.mask for form in forms]}
    for tensor in tensors[control]:
        flat = tensor.detach().flatten()
        lots = torch.randperm(len(flat), generator=draws).to(flat.device)
        tensor.detach().copy_(flat[lots].view(tensor.shape))


@contextmanager
def _named(log: TrainingLog | None, part: str, about: str) -> Iterator[None]:
    """Each of several trainings in a step keeps itself under a name of its own.

    about: all options but the control, which the rounds know nothing of
    """
    if log is None:
        yield
        return
    before = log.name, log.about
    log.name, log.about = f"{log.name}-{part.replace(' ', '-')}", about
    try:
        yield
    finally:
        log.name, log.about = before
