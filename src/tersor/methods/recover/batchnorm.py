"""Batch-norm correction: running statistics follow the activations that compression has shifted.

For networks with batch norm, after any compressing step; needs a few hundred unlabelled inputs and
no training. Often takes back half and more of the divergence that 3-4 bit weights cause, at no
byte more.
It cannot help where batch norms were folded into the layers before them.

Source: Sun, Cao, Yang, Keutzer 2019, arXiv:1909.01532, section 3.3 (re-estimating the statistics).
Differs from the paper: statistics are not replaced by those of the calibration inputs, which hurts
when training saw other (augmented) inputs. They move by the difference that compression makes:
var = var0 * v_c / v_f and mean = mean0 + (m_c - m_f) * sqrt(var0 / v_f), where m and v are those of
the batch norm's inputs in the compressed (c) and the original (f) network on the same inputs.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from tersor.errors import ModelError, OptionError
from tersor.measure import reference_outputs
from tersor.measure.channels import Norms, channels, norms_of
from tersor.methods.asked import beside, held_out_of, original_of
from tersor.methods.norms import Original, correct, shifted
from tersor.recipe import Outcome, method
from tersor.surgery.walk import kind_of
from tersor.task import Task


@method
def batchnorm(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    samples: Annotated[int, Field(ge=2)] = 512,
) -> tuple[nn.Module, Outcome]:
    """Corrects the running mean and variance of every batch norm, in place.

    original: the network before compression; `run` passes the one it was given
    samples: unlabelled calibration inputs to use, at most

    The correction stays only if it brings the outputs for held-out inputs closer to the original's;
    the step's outcome says whether, with the divergence before and after, and which norms were left
    because they lost channels: `cut.channels` corrects them itself. Raises OptionError for a
    network without batch norms that fit, TaskError without data.
    """
    task, held_out = held_out_of("recover.batchnorm", task, samples)
    original = beside(original_of("recover.batchnorm", original), model)
    norms, left = _pairs(norms_of(model), norms_of(original), model)
    batches = task.calibration(samples)
    before = Original(
        channels(original, task, batches), reference_outputs(original, task, held_out)
    )
    done = correct(model, task, batches, held_out, before, shifted, norms)
    outcome = {"kept": done.kept, "divergence_before": done.before, "divergence_after": done.after}
    return model, {**outcome, "layers": len(norms), "left": left}


def _pairs(norms: Norms, targets: Norms, model: nn.Module) -> tuple[Norms, dict[str, str]]:
    """The batch norms that both networks have, and why others are left. Raises without any."""
    if not norms and any(kind_of(module).startswith("BatchNorm") for module in model.modules()):
        raise ModelError(
            f"the batch norms of {type(model).__name__} cannot be watched, because it was rebuilt "
            "from a file without its code; correct them before saving, or load(path, into=network)"
        )
    if not norms:
        raise OptionError(
            f"{type(model).__name__} has no batch norm with running statistics, so "
            "recover.batchnorm has nothing to correct; leave this step out"
        )
    left = {}
    for name, norm in norms.items():
        other = targets.get(name)
        if other is None or other.num_features != norm.num_features:
            found = "no such layer" if other is None else f"{other.num_features} channels"
            left[name] = f"{norm.num_features} channels, and {found} in the original"
    if len(left) == len(norms):
        name, reason = next(iter(left.items()))
        raise OptionError(
            f"original: {name!r} has {reason}, and no other batch norm fits; pass the network that "
            "was compressed"
        )
    return {name: norm for name, norm in norms.items() if name not in left}, left
