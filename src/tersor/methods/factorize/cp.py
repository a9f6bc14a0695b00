"""CP: a convolution becomes 1 x 1, a kernel along each dimension of each channel, and 1 x 1 again.

For kernels over several places, with data: what lies along dimensions is nearly free, and what is
left are two layers of kernel 1. On the ResNets it keeps most of its family at equal bytes and
multiply-accumulates. Kernels of each channel alone are slow on many machines, where
`factorize.tucker` may be the quicker one.

Source: Lebedev et al. 2015, arXiv:1412.6553, section 3; Kolda, Bader 2009, "Tensor decompositions
and applications", SIAM Review 51(3), figure 3.3, for alternating least squares.
Differs from the paper: least squares are damped (Tikhonov), which keeps terms from growing against
each other; with data, channels count by their moments, and the last layer is the best for what
those before it give.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import torch
from torch import Tensor, nn

from tersor.methods.clock import Of
from tersor.methods.factoring import Candidates, Keep, Samples, Technique, factorized
from tersor.methods.factorize.tucker import channel_moments
from tersor.methods.spectra import energy_of, root, share
from tersor.methods.targets import Target
from tersor.recipe import Outcome, method
from tersor.surgery.links import Ranks, sizes_of
from tersor.surgery.walk import Patterns
from tersor.task import Task

SHARES = (0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08)
"""Ranks that are compared, as a share of the one whose factors are as large as the weight."""
_TRIAL, _SWEEPS, _STARTS = 10, 60, 3
"""Sweeps for what a rank loses, sweeps for the factors that are kept, and starts for these."""
_DAMPING = 1e-6


@method
def cp(
    model: nn.Module,
    task: Task | None = None,
    *,
    keep: Keep = 0.5,
    of: Of = "bytes",
    samples: Samples = 512,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Puts two 1 x 1 convolutions and those between them in the place of each, in place.

    keep, of, samples: as in `factorize.svd`
    generator: draws where factors start; a recipe notes its seed
    include, exclude: patterns on names and types, see `walk`

    Linear layers, convolutions of kernel 1 and of groups stay whole; the step's outcome lists them,
    and for the others the rank and the share of output energy that is lost. Raises OptionError
    where nothing can be factorized, and for forms.
    """
    lots = generator or torch.Generator().manual_seed(0)
    first, then = partial(candidates, generator=lots), partial(links, generator=lots)
    return factorized(
        model,
        task,
        Technique("factorize.cp", "cp", first, then, follows=True),
        keep=keep,
        of=of,
        weigh="inputs",
        samples=samples,
        sites=(include, exclude),
    )


def candidates(target: Target, generator: torch.Generator) -> Candidates:
    """A few ranks of a kernel; what each loses is that of a few sweeps."""
    seen, _ = _seen(target)
    lost: dict[Ranks, float] = {}
    for part in SHARES:
        rank = max(1, int(part * seen.numel() / sum(seen.shape)))
        found = alternated(seen, rank, _TRIAL, generator)
        lost[(rank,)] = float((seen - composed(found)).square().sum())
    return Candidates(float(seen.square().sum()), lost)


def links(
    target: Target, ranks: Ranks, generator: torch.Generator
) -> tuple[Sequence[Tensor], float]:
    """All convolutions, and the share of energy that is lost."""
    seen, inputs = _seen(target)
    tries = [alternated(seen, ranks[0], _SWEEPS, generator) for _ in range(_STARTS)]
    _, second, *along = min(tries, key=lambda t: float((seen - composed(t)).square().sum()))
    first = second if inputs is None else torch.linalg.solve(inputs, second)
    return _refitted(target, [first, *along])


def _seen(target: Target) -> tuple[Tensor, Tensor | None]:
    """The kernel as its channels see it, and the root of their moments."""
    shape = sizes_of(target.layer)
    kernel = target.matrix.reshape(shape)
    if target.inputs is None:
        return kernel, None
    inputs = root(channel_moments(target.inputs, shape[1]))
    return torch.einsum("oc...,cd->od...", kernel, inputs), inputs


def alternated(tensor: Tensor, rank: int, sweeps: int, generator: torch.Generator) -> list[Tensor]:
    """A factor (size, rank) for each dimension; all but the first have columns of length 1."""
    factors = [
        torch.randn(size, rank, generator=generator, dtype=tensor.dtype) for size in tensor.shape
    ]
    for _ in range(sweeps):
        # The first comes last, and takes the lengths of all.
        for side in (*range(1, tensor.dim()), 0):
            others = [factor for at, factor in enumerate(factors) if at != side]
            found = least_squares(tensor.movedim(side, 0).flatten(1), others)
            factors[side] = found / found.norm(dim=0).clamp(min=1e-300) if side else found
    return factors


def least_squares(flat: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The factor (size, rank) for which a tensor laid out as (size, rest) is nearest."""
    gram = reduce(torch.mul, [factor.T @ factor for factor in others])
    level = float(gram.diagonal().mean()) or 1.0
    damped = gram + _DAMPING * level * torch.eye(len(gram), dtype=gram.dtype)
    found: Tensor = torch.linalg.solve(damped, (flat @ product(others)).T).T
    return found


def product(factors: Sequence[Tensor]) -> Tensor:
    """The column-wise (Khatri-Rao) product, (product of sizes, rank)."""
    return reduce(lambda a, b: (a[:, None] * b[None]).flatten(0, 1), factors)


def composed(factors: Sequence[Tensor]) -> Tensor:
    """The tensor that factors stand for."""
    flat = factors[0] @ product(factors[1:]).T
    return flat.reshape([len(factor) for factor in factors])


def _refitted(target: Target, given: Sequence[Tensor]) -> tuple[Sequence[Tensor], float]:
    """All links for given ones but the last, and the share of energy that is lost."""
    reduced = product(given).T
    half = None if target.inputs is None else root(target.inputs)
    seen = target.matrix if half is None else target.matrix @ half
    last = seen @ torch.linalg.pinv(reduced if half is None else reduced @ half)
    missed = energy_of(target.matrix - last @ reduced, target.inputs)
    links = (*(factor.T for factor in given), last)
    return links, share(missed, float(seen.square().sum()))
