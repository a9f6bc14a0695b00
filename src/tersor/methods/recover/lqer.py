"""Low-rank correction: two thin matrices beside each quantized weight add what it misses most.

After a quantizing step at 2 to 4 bits, where a few percent more bytes may buy much: the error that
is left is compared by what the layer is given, so the factors spend themselves on directions that
inputs have. Without data the plain error is what counts. `recover.scales` after it trains factors
and scales together; for errors spread evenly, smaller groups cost less.

Source: Zhang et al. 2024 (LQER), arXiv:2402.02446, section 3.2 (L2QER); Zhang et al. 2024 (QERA),
arXiv:2410.06040, theorem 1, for the whole matrix of moments in place of its diagonal.
Differs: factors are stored at 8 bits unless asked otherwise, and stay only if they help.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import ModelError, OptionError
from tersor.forms import Affine, Residual
from tersor.forms.form import rows
from tersor.measure import divergence_of, reference_outputs
from tersor.measure.curvature import curvature
from tersor.methods.asked import beside, original_of
from tersor.methods.sparse import sparse_form
from tersor.methods.spectra import low_rank
from tersor.recipe import Outcome, method
from tersor.surgery.hold import hold, release_all
from tersor.surgery.walk import Patterns, Site, walk
from tersor.task import Task


@method
def lqer(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    rank: Annotated[int, Field(ge=1)] = 8,
    factor_bits: Annotated[int, Field(ge=2, le=16)] = 8,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Adds a low-rank correction to every quantized weight, in place.

    original: the network before compression; `run` passes the one it was given
    rank: of the correction; a weight that its factors would outnumber is left as it is
    factor_bits: of the factors, 2 to 8 with one scale per rank, or 16 for bfloat16
    samples: calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`

    With held-out inputs all is taken back if their answers come no closer to the original's; the
    step's outcome says so, with the divergence before and after. Raises OptionError for a weight
    that was pruned, whose zeros it would fill, or corrected already, and ModelError where what a
    weight is given is not finite.
    """
    original = beside(original_of("recover.lqer", original), model)
    if 8 < factor_bits < 16:
        raise OptionError(f"factor_bits={factor_bits}; choose 2 to 8, or 16 for bfloat16")
    plain = release_all(copy.deepcopy(original))
    sites = _sites(model, walk(model, include, exclude), rank)
    wanted = _originals(plain, sites)
    moments = {} if task is None else _moments(plain, task, samples, [s.name for s in sites])
    corrected = {
        site.name: _corrected(site, wanted, moments.get(site.name), rank, factor_bits)
        for site in sites
    }
    held_out = [] if task is None else task.holdout(samples)
    if task is None or not held_out:
        for site in sites:
            site.hold(corrected[site.name])
        return model, {"kept": True, "layers": len(sites)}
    answers = reference_outputs(original, task, held_out)
    before = divergence_of(model, task, held_out, answers)
    bases = [(site, site.form) for site in sites]
    for site in sites:
        site.hold(corrected[site.name])
    after = divergence_of(model, task, held_out, answers)
    for site, base in bases:
        if not after < before and base is not None:
            site.hold(base)
    return model, {
        "kept": after < before,
        "divergence_before": before,
        "divergence_after": after,
        "layers": len(sites),
    }


def _sites(model: nn.Module, sites: list[Site], rank: int) -> list[Site]:
    """Those to correct. Raises OptionError where there are none, or one cannot be."""
    held = [site for site in sites if site.form is not None]
    for site in held:
        where = f'"{site.name}" of shape {tuple(site.weight.shape)}'
        if isinstance(site.form, Residual):
            raise OptionError(f"{where} is corrected already; quantize it anew to choose a rank")
        if sparse_form(site.form) is not None:
            raise OptionError(
                f"{where} was pruned, and a low-rank correction would fill its zeros; leave it "
                f'out with exclude="{site.name}"'
            )
    pays = [
        site
        for site in held
        if rank * sum(rows(site.weight, site.axis).shape) < site.weight.numel()
    ]
    if not pays:
        raise OptionError(
            f"rank={rank}: {type(model).__name__} has no quantized weight of more numbers than "
            "its factors; choose a lower rank, or put the step behind a quantizing one"
        )
    return pays


def _originals(plain: nn.Module, sites: list[Site]) -> dict[str, Tensor]:
    """The weights before compression, by name. Raises OptionError where there is none."""
    found = {site.name: site.weight for site in walk(plain)}
    for site in sites:
        shape = tuple(site.weight.shape)
        if site.name not in found or tuple(found[site.name].shape) != shape:
            raise OptionError(
                f'original: it has no weight "{site.name}" of shape {shape}; pass the network '
                "that was compressed"
            )
    return found


def _moments(plain: nn.Module, task: Task, samples: int, names: list[str]) -> dict[str, Tensor]:
    """Second moments (inputs, inputs) of what each weight multiplies; groups share their mean."""
    sites = [site for site in walk(plain) if site.name in set(names)]
    found = curvature(plain, task, task.calibration(samples), sites, draws=0)
    means = {name: each.inputs.mean(0) for name, each in found.items() if each.inputs is not None}
    for name, mean in means.items():
        if not bool(mean.isfinite().all()):
            raise ModelError(
                f'"{name}": the squares of what it is given on calibration inputs are not finite; '
                f'check the inputs, or leave it out with exclude="{name}"'
            )
    return means


def _corrected(
    site: Site, wanted: Mapping[str, Tensor], moments: Tensor | None, rank: int, bits: int
) -> Residual:
    """The form of `site` with the best correction of its rank."""
    base, shape = site.form, tuple(site.weight.shape)
    assert base is not None
    error = rows(wanted[site.name].float() - site.weight.float(), site.axis)
    left, right = low_rank(error, moments, rank)
    narrow = torch.bfloat16 if bits == 16 else torch.float32
    form = Residual(
        site.weight,
        left.to(narrow),
        right.to(narrow),
        axis=site.axis,
        shape=shape,
        dtype=site.weight.dtype,
    )
    hold(form, "base", base)
    if bits < 16:
        # One scale for each of the pairs of vectors.
        hold(form, "left", Affine.encode(left, bits=bits, axis=1))
        hold(form, "right", Affine.encode(right, bits=bits, axis=0))
    return form
