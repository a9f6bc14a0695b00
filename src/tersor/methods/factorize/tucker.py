"""Tucker-2: a convolution becomes 1 x 1, its kernel between fewer channels, and 1 x 1 again.

For kernels over several places between many channels, where both sides of the kernel can shrink:
it keeps more than `factorize.svd`, which leaves the inputs as they are. `factorize.cp` may keep yet
more, in layers that are slower to compute.

Source: Kim et al. 2016, arXiv:1511.06530, section 3.1 and eq. 4; De Lathauwer et al. 2000, "On the
best rank-1 and rank-(R1, R2, ..., RN) approximation of higher-order tensors", algorithm 4.2 (HOOI).
Differs from the paper: ranks are chosen for all layers at once where it takes variational Bayes for
each; the channels of inputs count by their moments, and for the inputs' factors that are found,
core and outputs are the best in the moments of whole patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tersor.methods.clock import Of
from tersor.methods.factoring import Candidates, Keep, Samples, Technique, factorized
from tersor.methods.spectra import energy_of, root, share, spectrum
from tersor.methods.targets import Target, Weigh
from tersor.recipe import Outcome, method
from tersor.surgery.links import Ranks, sizes_of
from tersor.surgery.walk import Patterns
from tersor.task import Task

_SWEEPS = 5
_PER_SIDE = 24
"""Ranks of each side that are compared."""


@method
def tucker(
    model: nn.Module,
    task: Task | None = None,
    *,
    keep: Keep = 0.5,
    of: Of = "bytes",
    weigh: Weigh = "inputs",
    samples: Samples = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Puts three convolutions in the place of each, in place.

    keep, of, weigh, samples: as in `factorize.svd`
    include, exclude: patterns on names and types, see `walk`

    Linear layers, convolutions of kernel 1 and of groups stay whole; the step's outcome lists them,
    and for the others (rank of inputs, rank of outputs) and the share of output energy that is
    lost. Raises OptionError where nothing can be factorized, and for forms.
    """
    return factorized(
        model,
        task,
        Technique("factorize.tucker", "tucker", candidates, links, follows=True),
        keep=keep,
        of=of,
        weigh=weigh,
        samples=samples,
        sites=(include, exclude),
    )


def candidates(target: Target) -> Candidates:
    """Pairs of ranks of a kernel; what each loses is that of the higher-order SVD."""
    seen, _ = _seen(target)
    left, right = (singular(seen, side, seen.shape[side]) for side in (0, 1))
    core = torch.einsum("ock,op,cq->pqk", seen, left, right)
    held = core.square().sum(2).cumsum(0).cumsum(1)
    energy = float(held[-1, -1])
    lost: dict[Ranks, float] = {
        (a, b): energy - float(held[b - 1, a - 1])
        for a in spread(seen.shape[1], _PER_SIDE)
        for b in spread(seen.shape[0], _PER_SIDE)
        # A core has no more channels on one side than the other has in all places.
        if b <= a * seen.shape[2] and a <= b * seen.shape[2]
    }
    return Candidates(energy, lost)


def links(target: Target, ranks: Ranks) -> tuple[Sequence[Tensor], float]:
    """The three convolutions, and the share of energy that is lost."""
    seen, inputs = _seen(target)
    basis = best_basis(seen, ranks)
    first = basis.T if inputs is None else torch.linalg.solve(inputs, basis).T
    return refitted(target, first, ranks[1])


def _seen(target: Target) -> tuple[Tensor, Tensor | None]:
    """(outputs, inputs, places) as its channels see it, and the root of their moments."""
    outputs, channels, *_ = sizes_of(target.layer)
    kernel = target.matrix.reshape(outputs, channels, -1)
    inputs = None if target.inputs is None else root(channel_moments(target.inputs, channels))
    seen = kernel if inputs is None else torch.einsum("ock,cd->odk", kernel, inputs)
    if target.answers is not None:
        seen = torch.einsum("po,ock->pck", root(target.answers), seen)
    return seen, inputs


def channel_moments(moments: Tensor, channels: int) -> Tensor:
    """(channels, channels): the mean over places of moments of patches (channels * places)."""
    apart = moments.reshape(channels, -1, channels, moments.shape[0] // channels)
    return apart.diagonal(dim1=1, dim2=3).mean(-1)


def singular(tensor: Tensor, side: int, rank: int) -> Tensor:
    """(size of the side, rank): the leading singular vectors of a tensor laid out along a side."""
    flat = tensor.movedim(side, 0).flatten(1)
    vectors: Tensor = torch.linalg.eigh(flat @ flat.T)[1]
    return vectors.flip(1)[:, :rank]


def best_basis(tensor: Tensor, ranks: Ranks) -> Tensor:
    """(inputs, rank) of the two orthonormal bases that hold most of (outputs, inputs, places)."""
    right = singular(tensor, 1, ranks[0])
    for _ in range(_SWEEPS):
        left = singular(torch.einsum("ock,cq->oqk", tensor, right), 0, ranks[1])
        right = singular(torch.einsum("ock,op->pck", tensor, left), 1, ranks[0])
    return right


def refitted(target: Target, first: Tensor, rank: int) -> tuple[Sequence[Tensor], float]:
    """All links for given first ones (rank, inputs), and the share of energy that is lost.

    What the first link gives in each place is all that the others see: the best matrix for it is
    that of least squares, and of that the best of a rank its spectrum's.
    """
    places = target.matrix.shape[1] // first.shape[1]
    reduce = torch.kron(first, torch.eye(places, dtype=first.dtype))
    half = reduce if target.inputs is None else reduce @ root(target.inputs)
    seen = target.matrix if target.inputs is None else target.matrix @ root(target.inputs)
    # (rank * places, places of outputs): pinv, since moments may have fewer directions.
    fitted = seen @ torch.linalg.pinv(half)
    left, right = spectrum(fitted, half @ half.T, target.answers).factors(rank)
    error = target.matrix - left @ right @ reduce
    lost = energy_of(error, target.inputs, target.answers)
    whole = energy_of(target.matrix, target.inputs, target.answers)
    return (first, right, left), share(lost, whole)


def spread(most: int, count: int) -> list[int]:
    """Ranks from 1 to `most`, at most so many, evenly apart."""
    return sorted({max(1, round(most * at / count)) for at in range(1, count + 1)})
