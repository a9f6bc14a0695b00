"""Tensor train: a linear layer as contractions with a few small cores, one after the other.

For wide linear layers of networks that are trained afterwards, where bytes matter more than time:
cores are tiny, and their contractions many. Without training, `factorize.svd`, which can follow
what inputs are like, loses far less at equal bytes.

Source: Novikov et al. 2015, arXiv:1509.06569, section 3; Oseledets 2011, "Tensor-train
decomposition", SIAM J. Sci. Comput. 33(5), algorithm 1 and theorem 2.2.
Differs from the paper: trained weights are decomposed, where it trains cores from the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.methods.clock import Of
from tersor.methods.factoring import Candidates, Keep, Samples, Technique, factorized
from tersor.methods.spectra import share
from tersor.methods.targets import Target
from tersor.recipe import Outcome, method
from tersor.surgery.links import Ranks, factors_of
from tersor.surgery.walk import Patterns
from tersor.task import Task

_TOLERANCES = 64
"""Errors of a cut that are compared, from nearly all of the weight to nearly nothing."""


@method
def tensor_train(
    model: nn.Module,
    task: Task | None = None,
    *,
    keep: Keep = 0.5,
    of: Of = "bytes",
    cores: Annotated[int, Field(ge=2, le=8)] = 2,
    samples: Samples = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Puts a chain of contractions in the place of each linear layer, in place.

    keep, of, samples: as in `factorize.svd`
    cores: contractions of a chain, 2 to 8; inputs and outputs are split into as many factors, as
        near to each other as their numbers allow
    include, exclude: patterns on names and types, see `walk`

    Other layers stay whole; the step's outcome lists them, and for the others the factors of inputs
    and outputs, the ranks between cores and the share of the weight's square that is lost, at most
    the sum of those of all cuts. Raises OptionError where nothing can be factorized, and for forms.
    """
    return factorized(
        model,
        task,
        Technique("factorize.tensor_train", "tensor_train", lambda t: candidates(t, cores), links),
        keep=keep,
        of=of,
        weigh="none",
        samples=samples,
        sites=(include, exclude),
    )


def candidates(target: Target, cores: int) -> Candidates:
    """Ranks for which no cut loses more than a tolerance, the same for all."""
    outputs, inputs = target.matrix.shape
    # The largest factor of one beside the smallest of the other: cores of one size.
    modes = (factors_of(inputs, cores), factors_of(outputs, cores)[::-1])
    tensor = interleaved(target.matrix, *modes)
    tails = [tail_energies(tensor, at) for at in range(1, cores)]
    energy = float(tensor.square().sum())
    lost: dict[Ranks, float] = {}
    for tolerance in np.geomspace(1e-6, 1, _TOLERANCES):
        between = tuple(max(1, int((tail > tolerance * energy).sum())) for tail in tails)
        bound = sum(float(tail[rank]) for tail, rank in zip(tails, between, strict=True))
        lost[(*modes[0], *modes[1], *between)] = min(bound, energy)
    return Candidates(energy, lost)


def links(target: Target, ranks: Ranks) -> tuple[Sequence[Tensor], float]:
    """The cores as weights, and the share of the weight's square that is lost."""
    count = (len(ranks) + 1) // 3
    inputs, outputs, between = ranks[:count], ranks[count : 2 * count], ranks[2 * count :]
    tensor = interleaved(target.matrix, inputs, outputs)
    parts = list(decomposed(tensor, between))
    missed = float((tensor - contracted(parts)).square().sum())
    weights = [as_weight(part, *m) for part, *m in zip(parts, inputs, outputs, strict=True)]
    return weights, share(missed, float(tensor.square().sum()))


def interleaved(matrix: Tensor, inputs: Ranks, outputs: Ranks) -> Tensor:
    """(outputs, inputs) -> one dimension for each pair (output factor, input factor)."""
    count = len(inputs)
    order = [axis for at in range(count) for axis in (at, at + count)]
    apart = matrix.reshape(*outputs, *inputs).permute(order)
    return apart.reshape([o * i for o, i in zip(outputs, inputs, strict=True)])


def tail_energies(tensor: Tensor, at: int) -> Tensor:
    """(k + 1,): what a cut behind `at` dimensions loses with 0 to k ranks."""
    flat = tensor.reshape(math.prod(tensor.shape[:at]), -1)
    tails = torch.linalg.svdvals(flat).square().flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def decomposed(tensor: Tensor, between: Ranks) -> Iterator[Tensor]:
    """Cores (rank, mode, next rank), cut off from the left one after the other."""
    rest, rank = tensor.reshape(1, -1), 1
    for mode, after in zip(tensor.shape, between, strict=False):
        u, s, v = torch.linalg.svd(rest.reshape(rank * mode, -1), full_matrices=False)
        # Half of the sizes on each side would change the next cut.
        yield u[:, :after].reshape(rank, mode, -1)
        rest, rank = s[:after, None] * v[:after], after
    yield rest.reshape(rank, tensor.shape[-1], 1)


def contracted(cores: Sequence[Tensor]) -> Tensor:
    """The tensor that cores stand for."""
    found = cores[0]
    for core in cores[1:]:
        found = torch.tensordot(found, core, 1)
    return found.squeeze(0).squeeze(-1)


def as_weight(core: Tensor, inputs: int, outputs: int) -> Tensor:
    """(rank, outputs * inputs, next rank) -> (next rank * outputs, rank * inputs)."""
    apart = core.reshape(core.shape[0], outputs, inputs, core.shape[-1])
    return apart.permute(3, 1, 0, 2).reshape(core.shape[-1] * outputs, core.shape[0] * inputs)
