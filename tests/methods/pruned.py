"""What tests of pruning share: data for small networks, and moments that are not even."""

import torch
from torch import Tensor

from surgery.nets import make
from tersor.methods.columns import Problem
from tersor.task import Task, regression


def inputs(name: str, n: int, seed: int) -> Tensor:
    """More inputs for one of NETS."""
    example, generator = make(name)[1], torch.Generator().manual_seed(seed)
    shape = (n, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(16, shape, generator=generator)


def task_for(name: str) -> Task:
    """Calibration and held-out inputs for one of NETS."""
    return regression(calibration=inputs(name, 64, 1), holdout=inputs(name, 32, 2))


def problem(outputs: int, count: int, seed: int = 0) -> Problem:
    """A weight and moments whose spectrum falls as 1 / i, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, count, generator=generator, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(count, count, generator=generator).double())
    spectrum = 1 / torch.arange(1, count + 1).double()
    return Problem.of(weight, turned @ spectrum.diag() @ turned.T)


def damped(given: Problem) -> Tensor:
    """The moments that a problem's errors are weighed by, with their damping."""
    return given.metric.own + given.metric.extra * torch.eye(len(given.metric.own)).double()
