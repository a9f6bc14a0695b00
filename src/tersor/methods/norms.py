"""Batch norms that follow what compression has done to their inputs, if that helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.measure import divergence_of, evaluating
from tersor.measure.channels import Channels, Norms, before_each
from tersor.task import Inputs, Task

Statistics = tuple[Tensor, Tensor]
"""Running mean and variance, (channels,) float64 each."""
Rule = Callable[[Statistics, Channels, Channels, float], Statistics]
"""New statistics from the old ones, what is seen, what the original saw, and the norm's eps."""


@dataclass(frozen=True)
class Original:
    """What the network gave before it was compressed.

    seen: by each batch norm, for each calibration batch
    answers: to the held-out inputs
    """

    seen: Sequence[Mapping[str, Channels]]
    answers: Sequence[Tensor]


@dataclass(frozen=True)
class Correction:
    """Divergence for held-out inputs, and whether the correction stays."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether it brought the outputs closer to the original's."""
        return self.after < self.before


def correct(
    model: nn.Module,
    task: Task,
    batches: Sequence[Inputs],
    held_out: Sequence[Inputs],
    original: Original,
    rule: Rule,
    norms: Norms,
) -> Correction:
    """Sets the running statistics of batch norms, in place, unless that does not help.

    batches, held_out: those that `original` is of
    norms: those of `model` to change
    """
    saved = {name: _statistics_of(norm) for name, norm in norms.items()}
    before = divergence_of(model, task, held_out, original.answers)
    _follow(model, task, batches, original.seen, rule, norms)
    found = Correction(before, divergence_of(model, task, held_out, original.answers))
    if not found.kept:
        for name, norm in norms.items():
            _set(norm, *saved[name])
    return found


def shifted(saved: Statistics, seen: Channels, reference: Channels, smallest: float) -> Statistics:
    """Statistics moved by what compression has changed; those of few inputs would be worse.

    var = var0 * v_c / v_f and mean = mean0 + (m_c - m_f) * sqrt(var0 / v_f), with m and v of the
    inputs in the compressed (c) and the original (f) network. A channel that hardly varies keeps
    its variance.
    """
    mean0, var0 = saved
    varies = (seen.variance > smallest) & (reference.variance > smallest)
    scale = torch.where(varies, var0 / reference.variance, 1.0)
    mean = mean0 + (seen.mean - reference.mean) * scale.sqrt()
    return mean, torch.where(varies, scale * seen.variance, var0)


def matched(saved: Statistics, seen: Channels, wanted: Channels, eps: float) -> Statistics:
    """Statistics that give each channel of the outputs its mean and variance back.

    Whatever the old ones were: a scale and a shift may have taken their place. A channel that
    hardly varies keeps its variance.
    """
    mean, variance = saved
    varies = (seen.variance > 1e-4 * wanted.variance) & (wanted.variance > 0)
    ratio = torch.where(varies, seen.variance / wanted.variance, 1.0)
    return (
        seen.mean - (wanted.mean - mean) * ratio.sqrt(),
        torch.where(varies, (variance + eps) * ratio - eps, variance),
    )


def _follow(
    model: nn.Module,
    task: Task,
    batches: Sequence[Inputs],
    wanted: Sequence[Mapping[str, Channels]],
    rule: Rule,
    norms: Norms,
) -> None:
    """Corrects each batch norm just before it runs, with the sums of all batches so far.

    All at once would not do: each layer would answer for the shifts of all layers before it again,
    and a deep network diverges. In order, each sees inputs that are corrected already.
    """
    saved = {name: _statistics_of(norm) for name, norm in norms.items()}
    seen, target = dict[str, Channels](), dict[str, Channels]()

    def set_anew(name: str, values: Tensor) -> None:
        seen[name] = Channels.of(values) + seen.get(name)
        if name in target:
            _set(norms[name], *rule(saved[name], seen[name], target[name], norms[name].eps))

    with evaluating(model), before_each(norms, set_anew):
        for inputs, more in zip(batches, wanted, strict=True):
            for name, channels in more.items():
                target[name] = channels + target.get(name)
            task.predict(model, inputs)


def _statistics_of(norm: _BatchNorm) -> Statistics:
    return norm.get_buffer("running_mean").double(), norm.get_buffer("running_var").double()


def _set(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance)
