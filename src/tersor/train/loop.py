"""The training loop: warm-up and a cosine, clipped gradients, and the best state is kept.

Source: Loshchilov, Hutter 2017 (SGDR), arXiv:1608.03983, eq. 5 with one period; Goyal et al. 2017,
arXiv:1706.02677, section 2.2, for the warm-up; Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063,
algorithm 1, for clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.surgery.hold import held
from tersor.train.lessons import Lesson, Lessons


@dataclass(frozen=True)
class Fitted:
    """What training came to.

    before, after: what `judge` said at the start, and of the state that was kept
    steps: of the optimizer
    epoch: after which the kept state stood, 0 for the start
    """

    before: float
    after: float
    steps: int
    epoch: int


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lessons: Lessons,
    loss: Callable[[Lesson], Tensor],
    *,
    epochs: int,
    judge: Callable[[], float],
    generator: torch.Generator,
    warmup: float = 0.05,
    clip: float = 1.0,
) -> Fitted:
    """Trains what `optimizer` holds, in place, and leaves the state that `judge` found best.

    The rates that the optimizer was made with are the highest. The start counts as a state too.

    loss: of one batch; may differ from `lessons.loss`, where something is to be done before
    judge: called before the first epoch and after each; the lower the better
    generator: draws the order of the batches
    warmup: share of the steps in which the rate rises
    clip: the largest length of all gradients together

    Raises ModelError where a loss or a gradient is not finite. The best state so far is back then,
    as it is after whatever else stops the training.
    """
    steps = epochs * len(lessons)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(step, steps, math.ceil(warmup * steps))
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    kept = _State([*trained, *_statistics(model)])
    before = best = judge()
    step, best_epoch = 0, 0
    try:
        for epoch in range(1, epochs + 1):
            for lesson in lessons.epoch(generator):
                step += 1
                optimizer.zero_grad()
                value = loss(lesson)
                value.backward()  # type: ignore[no-untyped-call]
                length = nn.utils.clip_grad_norm_(trained, clip)
                _check("loss", value, step, steps)
                _check("length of the gradient", length, step, steps)
                optimizer.step()
                schedule.step()
            found = judge()
            if found < best:
                best, best_epoch = found, epoch
                kept.note()
    finally:
        kept.restore()
    return Fitted(before, best, step, best_epoch)


def rate_at(step: int, steps: int, warmup: int) -> float:
    """Share of the highest rate at `step`, counted from 0: a line up, then half a cosine down."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def _statistics(model: nn.Module) -> list[Tensor]:
    """Buffers, as of batch norms, that training changes; those of forms it does not."""
    stored = {id(buffer) for _, form in held(model) for buffer in form.buffers()}
    return [buffer for buffer in model.buffers() if id(buffer) not in stored]


class _State:
    """The values of tensors at some time."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.note()

    def note(self) -> None:
        self._values = [tensor.detach().clone() for tensor in self._tensors]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.copy_(value)


def _check(what: str, value: Tensor, step: int, steps: int) -> None:
    if not bool(value.isfinite()):
        raise ModelError(
            f"training stopped in step {step} of {steps}: the {what} is {value.item()}; the "
            "network is as it was at its best before. Ask for more bits or a lower rate, or look "
            "for inputs that bring it about"
        )
