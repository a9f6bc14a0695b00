"""Non-negative factors: a layer as sums of parts that are never below zero, to be looked at.

For what has a meaning element by element, such as counts or intensities: a part can be read, where
singular vectors cancel each other out. As a compression it is never better than `factorize.svd`. A
weight with both signs is split, W = W+ - W-: each part is added or taken away as a whole.

Source: Lee, Seung 2001, "Algorithms for Non-negative Matrix Factorization" (NIPS 13), eq. 1;
Cichocki, Phan 2009, "Fast local algorithms for large scale nonnegative matrix and tensor
factorizations", IEICE Trans. E92-A(3), algorithm 2 (HALS);
Boutsidis, Gallopoulos 2008, "SVD based initialization: A head start for nonnegative matrix
factorization", Pattern Recognition 41(4), for where factors start.
Differs from the papers: parts have a sign; inputs count by their energy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tersor.methods.clock import Of
from tersor.methods.factoring import Candidates, Keep, Samples, Technique, factorized
from tersor.methods.spectra import share
from tersor.methods.targets import Target
from tersor.recipe import Outcome, method
from tersor.surgery.links import Ranks
from tersor.surgery.walk import Patterns
from tersor.task import Task

_SHARES = (0.9, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08)
_TRIAL, _SWEEPS = 20, 100


@method
def nmf(
    model: nn.Module,
    task: Task | None = None,
    *,
    keep: Keep = 0.5,
    of: Of = "bytes",
    samples: Samples = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Puts two layers in the place of each, the first without negative weights, in place.

    Weights of the second are of one sign for each part; where a weight has no negative element,
    all of its factors have none.

    keep, of, samples: as in `factorize.svd`
    include, exclude: patterns on names and types, see `walk`

    The step's outcome lists layers that stay whole, and for the others the number of parts and the
    share of energy that is lost. Raises OptionError where nothing can be factorized, and for forms.
    """
    return factorized(
        model,
        task,
        Technique("factorize.nmf", "low_rank", candidates, links),
        keep=keep,
        of=of,
        weigh="inputs",
        samples=samples,
        sites=(include, exclude),
    )


def candidates(target: Target) -> Candidates:
    """A few numbers of parts; what each loses is that of a few sweeps."""
    seen = target.matrix * _sizes(target)
    lost: dict[Ranks, float] = {}
    for part in _SHARES:
        rank = max(1, int(part * seen.numel() / sum(seen.shape)))
        left, right = parts(seen, rank, _TRIAL)
        lost[(rank,)] = float((seen - left @ right).square().sum())
    return Candidates(float(seen.square().sum()), lost)


def links(target: Target, ranks: Ranks) -> tuple[Sequence[Tensor], float]:
    """The two layers, and the share of energy that is lost."""
    sizes = _sizes(target)
    seen = target.matrix * sizes
    left, right = parts(seen, ranks[0], _SWEEPS)
    missed = float((seen - left @ right).square().sum())
    return (right / sizes, left), share(missed, float(seen.square().sum()))


def _sizes(target: Target) -> Tensor:
    """How large each input is."""
    if target.inputs is None:
        return torch.ones(1, dtype=torch.float64)
    energies = target.inputs.diagonal().double().cpu()
    # One that nobody saw keeps a little weight, or its part would be left to chance.
    return energies.clamp(min=1e-4 * float(energies.mean()) or 1.0).sqrt()


def parts(matrix: Tensor, rank: int, sweeps: int) -> tuple[Tensor, Tensor]:
    """(outputs, rank), of one sign in each column, and (rank, inputs) without negative elements.

    Each column and row in turn becomes the best for all others as they are, so that the error never
    rises. Where the matrix has no negative element, nor does any factor.
    """
    left, right = _start(matrix, rank)
    signs = torch.where((left >= 0).all(0), 1.0, -1.0).to(matrix.dtype)
    for _ in range(sweeps):
        _improve(left, matrix @ right.T, right @ right.T, signs)
        _improve(right.T, matrix.T @ left, left.T @ left, torch.ones_like(signs))
    return left, right


def _start(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest parts of singular vectors, each of which falls into four by its signs.

    u v^T = u+ v+^T + u- v-^T - u+ v-^T - u- v+^T, all of them without negative elements.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    left, right = torch.cat([u.T, -u.T]).clamp(min=0), torch.cat([v, -v]).clamp(min=0)
    count = len(s)
    pairs = [(a, b) for a in range(2 * count) for b in (a, (a + count) % (2 * count))]
    if bool((matrix >= 0).all()):
        pairs = [(a, b) for a, b in pairs if a == b]
    first, second = (torch.tensor(each) for each in zip(*pairs, strict=True))
    sizes = s[first % count] * left[first].norm(dim=1) * right[second].norm(dim=1)
    most = sizes.argsort(descending=True, stable=True)[:rank]
    signs = torch.where(first == second, 1.0, -1.0).to(matrix.dtype)[most]
    lengths = s[first[most] % count].sqrt()
    begun = (left[first[most]].T * lengths * signs, right[second[most]] * lengths[:, None])
    missing = rank - len(most)
    return (
        nn.functional.pad(begun[0], (0, missing)),
        nn.functional.pad(begun[1], (0, 0, 0, missing)),
    )


def _improve(factor: Tensor, pulls: Tensor, gram: Tensor, signs: Tensor) -> None:
    """Goes over the columns of a factor (size, rank), in place."""
    for at in range(factor.shape[1]):
        if gram[at, at] > 0:
            moved = factor[:, at] + (pulls[:, at] - factor @ gram[:, at]) / gram[at, at]
            factor[:, at] = (moved * signs[at]).clamp(min=0) * signs[at]
