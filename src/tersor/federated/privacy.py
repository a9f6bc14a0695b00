"""Differential privacy: nobody can tell from the result whether one client, or one sample, was in.

`Privacy` protects whole clients: the server cuts each update to a length, adds noise to the sum,
and publishes only that. `PrivateLocal` protects the samples of one client from everyone, the server
too: gradients are cut one by one and noise is added before anything leaves.

Noise comes from torch's generators and is a floating-point number. That is what published figures
are made with; against someone who knows the seed, or who attacks the low bits of floats (Mironov
2012), it is none. `PrivateLocal` takes its random numbers from the operating system; those of
`Privacy` come from the generator given to `federate`, whose seed is to be kept from all who see the
result, and has 32 bits at most.

Source: McMahan et al. 2018, arXiv:1710.06963, algorithm 1 with equal weights and a fixed
denominator; Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tersor.errors import ModelError, OptionError, TaskError
from tersor.federated.accountant import epsilon
from tersor.federated.layout import length
from tersor.federated.options import check_count, check_number
from tersor.task import Inputs, Task, placed
from tersor.task.data import apply, tensors_of

_AT_ONCE = 256
"""Samples whose gradients are in memory together."""


@dataclass(frozen=True)
class Privacy:
    """How clients are protected.

    clip: the length that each update is cut to, above 0
    noise: standard deviation of the noise on the sum, over clip; 1 or so needs hundreds of clients
    delta: beside epsilon, above 0 and below 1
    """

    clip: float
    noise: float
    delta: float = 1e-5

    def __post_init__(self) -> None:
        check_number("clip", self.clip)
        check_number("noise", self.noise, zero=True)
        check_number("delta", self.delta, most=math.nextafter(1.0, 0.0))

    def epsilon(self, fraction: float, rounds: int) -> float:
        """What so many rounds guarantee in which each client is drawn with this probability."""
        return epsilon(self.noise, fraction, rounds, delta=self.delta)


def clipped(change: Sequence[Tensor], longest: float) -> list[Tensor]:
    """A change as it is, or shortened to `longest`, as one vector. The result is never longer."""
    # Rounding to float32 could leave it longer by a part in 2**23.
    share = min(1.0, longest / max(length(change), 1e-30)) * (1 - 2.0**-20)
    return [tensor * share for tensor in change]


def private_mean(
    changes: Sequence[Sequence[Tensor]],
    privacy: Privacy,
    *,
    shapes: Sequence[tuple[int, ...]],
    expected: float,
    generator: torch.Generator,
) -> list[Tensor]:
    """The sum of clipped changes and noise, over the number of clients that a round expects.

    shapes: of the tensors of a change, of which there may be none
    expected: clients times the probability that each is drawn: what really came is not to be seen
    """
    found = [
        torch.randn(shape, generator=generator) * (privacy.noise * privacy.clip) for shape in shapes
    ]
    for change in changes:
        for total, tensor in zip(found, clipped(change, privacy.clip), strict=True):
            total += tensor
    return [total / expected for total in found]


@dataclass(frozen=True)
class PrivateLocal:
    """DP-SGD: what a client does with its data in place of `Local`.

    steps: of descent in a round
    rate: of the steps, above 0
    rows: samples in a step, on average: each is drawn on its own
    clip: the length that each sample's gradient is cut to
    noise: standard deviation of the noise on their sum, over clip
    secret: draw noise and samples so that nobody can again. False takes the client's generator, so
        that a simulation can be repeated: that protects nobody
    """

    steps: int
    rate: float = 0.1
    rows: int = 32
    clip: float = 1.0
    noise: float = 1.0
    secret: bool = True

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("rows", self.rows)
        check_number("rate", self.rate)
        check_number("clip", self.clip)
        check_number("noise", self.noise, zero=True)

    def __call__(self, model: nn.Module, task: Task, generator: torch.Generator) -> None:
        """See `Trainer`."""
        inputs, targets = _all_of(task)
        normal, uniform = (_normal, _uniform) if self.secret else _drawn_by(generator)
        share = self._share(len(targets))
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        model.train()
        for _ in range(self.steps):
            total = [normal(p.shape).to(p) * (self.noise * self.clip) for p in parameters.values()]
            places = (uniform(len(targets)) < share).nonzero().flatten()
            for some in torch.split(places, _AT_ONCE):
                self._add(model, task, _rows(inputs, some), targets[some], total)
            with torch.no_grad():
                for parameter, gradient in zip(parameters.values(), total, strict=True):
                    parameter.sub_(gradient, alpha=self.rate / self.rows)

    def epsilon(self, samples: int, rounds: int, *, delta: float = 1e-5) -> float:
        """What so many rounds guarantee a client's samples. rounds: answers, repeated ones too"""
        return epsilon(self.noise, self._share(samples), rounds * self.steps, delta=delta)

    def _share(self, samples: int) -> float:
        if self.rows > samples:
            raise OptionError(
                f"rows={self.rows} of the {samples} samples of a client cannot be drawn; use "
                f"rows={samples} or fewer"
            )
        return self.rows / samples

    def _add(
        self, model: nn.Module, task: Task, inputs: Inputs, targets: Tensor, total: list[Tensor]
    ) -> None:
        if not len(targets):
            return
        gradients = per_sample(model, task, inputs, targets)
        lengths = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        share = (self.clip / lengths.clamp(min=1e-30)).clamp(max=1)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += torch.tensordot(share, gradient, 1)


def _uniform(count: int) -> Tensor:
    """(count,) float64 in [0, 1), of the operating system's random bytes."""
    bits = np.frombuffer(secrets.token_bytes(8 * count), np.uint64) >> np.uint64(11)
    return torch.from_numpy(bits * 2.0**-53)


def _normal(shape: Sequence[int]) -> Tensor:
    """Of mean 0 and deviation 1, in float32, by Box and Muller 1958."""
    count = math.prod(shape)
    half = -(-count // 2)
    radius = (-2 * torch.log1p(-_uniform(half))).sqrt()
    angle = 2 * math.pi * _uniform(half)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()])
    return both[:count].reshape(shape).float()


def _drawn_by(
    generator: torch.Generator,
) -> tuple[Callable[[Sequence[int]], Tensor], Callable[[int], Tensor]]:
    """The same of a generator."""
    return partial(torch.randn, generator=generator), partial(torch.rand, generator=generator)


def _all_of(task: Task) -> tuple[Inputs, Tensor]:
    """The training data as one batch. Raises TaskError for samples of several shapes."""
    batches = list(task.train())
    try:
        parts = [torch.cat(each) for each in zip(*map(_tensors, batches), strict=True)]
    except (RuntimeError, ValueError) as error:
        raise TaskError(
            "samples of several shapes cannot be drawn one by one; pad them to one length"
        ) from error
    supply = iter(parts)
    return apply(lambda _: next(supply), batches[0][0]), parts[-1]


def _tensors(batch: tuple[Inputs, Tensor]) -> list[Tensor]:
    return [*tensors_of(batch[0]).values(), batch[1]]


def _rows(inputs: Inputs, places: Tensor) -> Inputs:
    return apply(lambda tensor: tensor[places], inputs)


def per_sample(model: nn.Module, task: Task, inputs: Inputs, targets: Tensor) -> list[Tensor]:
    """(samples, *shape) gradients of the loss of each sample alone, of each trained parameter.

    Raises TaskError for texts and pairs, whose samples are not rows, and ModelError for a network
    that mixes samples, as batch norms do.
    """
    if task.kind not in ("classification", "regression"):
        raise TaskError(
            f"samples of a {task.kind} task cannot be told apart; use Privacy, which protects "
            "clients"
        )
    inputs = placed(model, inputs)
    fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = dict(model.named_buffers())
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], one: Inputs, target: Tensor) -> Tensor:
        row = apply(lambda tensor: tensor[None], one)
        given = (parameters, fixed, buffers)
        if isinstance(row, dict):
            outputs = functional_call(model, given, (), row)
        else:
            outputs = functional_call(model, given, row if isinstance(row, tuple) else (row,))
        return task.loss(outputs.reshape(1, -1), task.targets(row, target[None]))

    try:
        found = vmap(grad(loss), (None, 0, 0), randomness="different")(trained, inputs, targets)
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ModelError(
            f"{type(model).__name__} cannot be asked for the gradient of one sample ({first}); "
            "replace batch norms by group norms"
        ) from error
    return list(found.values())
