"""Low rank by singular values: a layer becomes two thin ones, cut where outputs lose least.

The first of its family for linear layers: it computes less on any machine, and what it loses is
known exactly before it is done. For kernels over several places `factorize.cp` and
`factorize.tucker` keep more. For bytes alone, 4 bits of `quantize.gptq` lose less than half of the
ranks do; its links may be quantized afterwards. To correct codes by few ranks, `recover.lqer`.

Source: Wang et al. 2024 (SVD-LLM), arXiv:2403.07378, section 3.1, and 2025 (V2), arXiv:2503.12340,
algorithm 1; Hsu et al. 2022 (FWSVD), arXiv:2207.00112, eq. 6, for `weigh="fisher"`; Denton et al.
2014, arXiv:1404.0736, for convolutions.
Differs from the papers: ranks are chosen for all layers at once, by what errors of each do to the
network's answers, and each layer is fitted to what those before it give; Fisher information is
that of outputs beside the moments of inputs, where FWSVD has one number for each row.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tersor.methods.clock import Of
from tersor.methods.factoring import Candidates, Keep, Samples, Technique, factorized
from tersor.methods.spectra import share, spectrum
from tersor.methods.targets import Target, Weigh
from tersor.recipe import Outcome, method
from tersor.surgery.links import Ranks
from tersor.surgery.walk import Patterns
from tersor.task import Task


@method
def svd(
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
    """Puts two layers of a chosen rank in the place of each, in place.

    keep: of what the chosen layers cost, the share that may remain, above 0 and below 1
    of: what is counted: "bytes", "macs" of one sample, or "latency", timed here, so that a replay
        may choose other ranks
    weigh: errors by what "inputs" make of them in a layer's outputs; by "fisher", what those do to
        the answers as well; or "none", all weights alike
    samples: calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`

    Layers that two could not take the place of stay whole, as do those whose factors would be no
    smaller; the step's outcome lists them with the reason, and for the others ranks and the share
    of output energy that is lost, which is that of the singular values cut off. Without a task
    weights are all alike, and each layer's relative error counts. Raises OptionError where nothing
    can be factorized, for forms, and where ranks of 1 are more than `keep`.
    """
    return factorized(
        model,
        task,
        Technique("factorize.svd", "low_rank", candidates, links, follows=True),
        keep=keep,
        of=of,
        weigh=weigh,
        samples=samples,
        sites=(include, exclude),
    )


def candidates(target: Target) -> Candidates:
    """Every rank of a weight."""
    lost = spectrum(target.matrix, target.inputs, target.answers).lost.tolist()
    return Candidates(lost[0], {(rank,): lost[rank] for rank in range(1, len(lost))})


def links(target: Target, ranks: Ranks) -> tuple[Sequence[Tensor], float]:
    """The two layers, and what the singular values cut off are of all."""
    found = spectrum(target.matrix, target.inputs, target.answers)
    left, right = found.factors(ranks[0])
    return (right, left), share(float(found.lost[ranks[0]]), float(found.lost[0]))
