"""AdaRound: whether each weight is rounded up or down is learned, for the least error of outputs.

For 4 bits and above, where the codes beside a weight are the only ones worth thinking about; below,
`quantize.qronos` moves weights further. It takes hundreds of steps for each layer where GPTQ takes
one, and finds a little more on convolutions.

Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, arXiv:2004.10568, eq. 21 to 25.
Differs from the paper: the error is that of the layer's outputs before the activation, computed
from second moments of the inputs, so a step costs the same for any number of samples; layers follow
the original's outputs (the paper's asymmetric reconstruction, section 3.3).
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.methods.calibrated import affine_layers
from tersor.methods.columns import Levels, Problem
from tersor.recipe import method
from tersor.surgery.walk import Patterns
from tersor.task import Task

_STRETCH_LOW, _STRETCH_HIGH = -0.1, 1.1
_BETA = (20.0, 2.0)
"""Of the regularizer, at the end of the warm-up and at the end."""
_WARM_UP = 0.2
"""Share of the steps in which nothing pushes roundings apart."""
_PUSH = 10.0
"""Weight of the regularizer; the squared error is in units of that of rounding to nearest."""
_RATE = 0.1


@method
def adaround(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 4,
    group_size: Annotated[int, Field(ge=1)] | None = None,
    steps: Annotated[int, Field(ge=1)] = 500,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as symmetric `bits`-bit codes, in place.

    bits: bits per weight, 2 to 8
    group_size: inputs that share one scale; None for one scale per output channel
    steps: of Adam, for each layer
    samples: calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`

    Raises as `quantize.gptq` does.
    """

    def codes(problem: Problem, levels: Levels) -> tuple[Tensor, Levels]:
        return rounded(problem, levels, steps), levels

    return affine_layers(
        "quantize.adaround",
        model,
        task,
        bits=bits,
        group_size=group_size,
        symmetric=True,
        samples=samples,
        sites=(include, exclude),
        original=True,
        codes=codes,
    )


@torch.enable_grad()
def rounded(problem: Problem, levels: Levels, steps: int) -> Tensor:
    """Codes (outputs, inputs), each the one below or above its weight. Never worse than nearest."""
    scale, zero = levels.spread(problem.target.shape[1])
    exact = problem.target / scale + zero
    below = exact.floor()
    nearest = levels.nearest(problem.target, problem.zeros)
    unit = problem.error((nearest - zero) * scale).mean().clamp(min=1e-30)
    learned = _start(exact - below).requires_grad_()
    optimizer = torch.optim.Adam([learned], lr=_RATE)
    for step in range(steps):
        codes = (below + _soft(learned)).clamp(levels.low, levels.high)
        loss = problem.error((codes - zero) * scale).mean() / unit
        progress = (step / steps - _WARM_UP) / (1 - _WARM_UP)
        if progress > 0:
            beta = _BETA[0] + (_BETA[1] - _BETA[0]) * progress
            loss = loss + _PUSH * undecided(learned, beta)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    codes = (below + (_soft(learned.detach()) >= 0.5)).clamp(levels.low, levels.high)
    if problem.zeros is not None:
        codes = torch.where(problem.zeros, zero, codes)
    worse = problem.error((codes - zero) * scale) > problem.error((nearest - zero) * scale)
    return torch.where(worse[:, None], nearest, codes)


def undecided(learned: Tensor, beta: float) -> Tensor:
    """The regularizer: mean over the weights of 1 - |2h - 1|^beta, 0 where all are decided."""
    return (1 - (2 * _soft(learned) - 1).abs().pow(beta)).mean()


def _soft(learned: Tensor) -> Tensor:
    """The rectified sigmoid, 0 for down and 1 for up."""
    stretched = torch.sigmoid(learned) * (_STRETCH_HIGH - _STRETCH_LOW) + _STRETCH_LOW
    return stretched.clamp(0, 1)


def _start(fraction: Tensor) -> Tensor:
    """What `_soft` takes to the fraction: training starts from the weight itself."""
    inside = (fraction - _STRETCH_LOW) / (_STRETCH_HIGH - _STRETCH_LOW)
    return torch.logit(inside)
