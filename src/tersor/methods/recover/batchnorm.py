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

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError, OptionError, TaskError
from tersor.measure import evaluating
from tersor.recipe import Outcome, method
from tersor.surgery.walk import kind_of
from tersor.task import Inputs, Task

Norms = dict[str, _BatchNorm]
# Number of values, their sum and their sum of squares, per channel.
Sums = tuple[Tensor, Tensor, Tensor]


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
    the step's outcome says whether, with the divergence before and after. Raises OptionError for a
    network without batch norms, TaskError without data.
    """
    if task is None:
        raise TaskError("recover.batchnorm needs inputs to run the network on; pass a task")
    if original is None:
        raise OptionError(
            "recover.batchnorm compares with the network before compression; use run(), which "
            "passes it, or batchnorm(model, task, original=network)"
        )
    norms, targets = _norms(model), _norms(original)
    _check_pairs(norms, targets, model)
    held_out = task.holdout(samples)
    if not held_out:
        raise TaskError(
            "recover.batchnorm judges itself on held-out inputs and the task has none; "
            "give it more samples, or holdout=inputs"
        )
    with evaluating(original), evaluating(model):
        wanted = [task.predict(original, inputs) for inputs in held_out]
        before = _divergence(model, task, held_out, wanted)
        saved = {name: _statistics_of(norm) for name, norm in norms.items()}
        _correct(model, original, task, task.calibration(samples), saved)
        after = _divergence(model, task, held_out, wanted)
        kept = after < before
        if not kept:
            for name, norm in norms.items():
                _set(norm, *saved[name])
    outcome = {"kept": kept, "divergence_before": before, "divergence_after": after}
    return model, {**outcome, "layers": len(norms)}


def _correct(
    model: nn.Module,
    original: nn.Module,
    task: Task,
    batches: list[Inputs],
    saved: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Corrects each batch norm just before it runs, with the sums of all batches so far.

    All at once would not do: each layer would answer for the shifts of all layers before it again,
    and a deep network diverges. In order, each sees inputs that are corrected already.
    """
    norms, seen, reference = _norms(model), dict[str, Sums](), dict[str, Sums]()

    def watch(name: str, values: Tensor) -> None:
        reference[name] = _added(reference.get(name), values)

    def correct(name: str, values: Tensor) -> None:
        seen[name] = _added(seen.get(name), values)
        if name in reference:
            shifted = _shifted(saved[name], seen[name], reference[name], norms[name].eps)
            _set(norms[name], *shifted)

    for inputs in batches:
        with _before_each(_norms(original), watch):
            task.predict(original, inputs)
        with _before_each(norms, correct):
            task.predict(model, inputs)


def _shifted(
    saved: tuple[Tensor, Tensor], seen: Sums, reference: Sums, smallest: float
) -> tuple[Tensor, Tensor]:
    """The equations of the module's docstring; a channel that hardly varies keeps its variance."""
    mean0, var0 = saved
    mean_c, var_c = _moments(seen)
    mean_f, var_f = _moments(reference)
    varies = (var_c > smallest) & (var_f > smallest)
    scale = torch.where(varies, var0 / var_f, 1.0)
    return mean0 + (mean_c - mean_f) * scale.sqrt(), torch.where(varies, scale * var_c, var0)


def _added(sums: Sums | None, values: Tensor) -> Sums:
    channels = values.detach().transpose(0, 1).flatten(1).double()
    count = torch.tensor(float(channels.shape[1]), dtype=torch.float64, device=values.device)
    new = count, channels.sum(1), channels.square().sum(1)
    return new if sums is None else (sums[0] + new[0], sums[1] + new[1], sums[2] + new[2])


def _moments(sums: Sums) -> tuple[Tensor, Tensor]:
    count, total, squares = sums
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


@contextmanager
def _before_each(norms: Norms, call: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block `call(name, inputs)` comes before each batch norm runs."""
    with ExitStack() as stack:
        for name, norm in norms.items():
            hook = norm.register_forward_pre_hook(
                lambda _, inputs, name=name: call(name, inputs[0])
            )
            stack.callback(hook.remove)
        yield


def _divergence(model: nn.Module, task: Task, batches: list[Inputs], wanted: list[Tensor]) -> float:
    rows = [
        task.divergence(reference, task.predict(model, inputs)).double()
        for inputs, reference in zip(batches, wanted, strict=True)
    ]
    return float(torch.cat(rows).mean())


def _norms(model: nn.Module) -> Norms:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def _statistics_of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    return norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()


def _set(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance)


def _check_pairs(norms: Norms, targets: Norms, model: nn.Module) -> None:
    """Raises unless both networks have the same batch norms, and at least one."""
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
    for name, norm in norms.items():
        other = targets.get(name)
        if other is None or other.num_features != norm.num_features:
            found = "no such layer" if other is None else f"{other.num_features} channels"
            raise OptionError(
                f"original: {name!r} has {norm.num_features} channels in the compressed network "
                f"and {found} in the original; pass the network that was compressed"
            )
