"""How much the errors of each output channel matter: the energy of the gradients that reach it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tersor.measure.curvature import GradientError, curvature
from tersor.methods.sparse import check_uncoded, released
from tersor.surgery.walk import Site
from tersor.task import Task

# Share of the mean that is added to each: gradients are drawn, so their energies are noisy.
_DAMPING = 0.05


def gradients(
    model: nn.Module, task: Task, sites: Sequence[Site], *, samples: int
) -> dict[str, Tensor]:
    """By name, (outputs,) float32 with a mean of 1; nothing of weights that no gradient reaches.

    samples: calibration inputs to use, at most

    Raises OptionError for weights that are quantized already.
    """
    check_uncoded(sites)
    # Curvature is that of plain parameters.
    sparse = {site.name: released(site) for site in sites}
    try:
        found = curvature(model, task, task.calibration(samples), sites)
    except GradientError:
        return {}
    finally:
        for site in sites:
            if (form := sparse[site.name]) is not None:
                site.hold(form)
    energies = {}
    for site in sites:
        moments = found[site.name].outputs
        if moments is None:
            continue
        energy = moments.diagonal(dim1=1, dim2=2).flatten()
        mean = energy.mean()
        if mean > 0:
            weighed = (energy / mean + _DAMPING) / (1 + _DAMPING)
            energies[site.name] = weighed.to(site.weight.device, torch.float32)
    return energies
