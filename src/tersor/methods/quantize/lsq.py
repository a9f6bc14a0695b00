"""LSQ: quantization-aware training of weights and activations, with steps that are learned too.

For 2 to 4 bits, where rounding a trained network no longer works and there is data and time to
train: labels if the task has them, the original's answers otherwise. After training everything is
frozen to codes and grids, and no answer changes. For 8 bits `quantize.static` needs no training.

Source: Esser et al. 2020 (LSQ), arXiv:1902.08153.
Differs from the paper: scales per output channel, stored in bfloat16; Adam, with a rate in
proportion to each tensor's size; where there are labels, the loss is that of the task plus the
divergence from the original (as in section 3.6, at temperature 1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.errors import ModelError
from tersor.forms import Bitmask, FakeAffine, NofM
from tersor.forms.learned_grid import LearnedGrid
from tersor.measure import divergence_of, reference_outputs
from tersor.measure.running import evaluating, unfused
from tersor.methods.asked import held_out_of
from tersor.methods.sparse import check_uncoded, keep_zeros, sparse_form
from tersor.recipe import Outcome, method
from tersor.surgery.grids import grids, put
from tersor.surgery.walk import Patterns, Site, in_execution_order, kind_of, vectors, walk
from tersor.task import Inputs, Task
from tersor.task.kinds import evaluation_mode
from tersor.train import Labels, answers, fit
from tersor.train.lessons import Lesson

_RATE = 0.01
"""Of Adam: the share of its own size by which a tensor changes in a step, at most."""
_SMALL = 0.1
"""The size of a tensor of zeros."""
_PRODUCTS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")


@method
def lsq(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    bits: Annotated[int, Field(ge=2, le=8)] = 2,
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = 2,
    ends: Annotated[int, Field(ge=2, le=8)] = 8,
    epochs: Annotated[int, Field(ge=1)] = 20,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains the network with rounded weights and activations, in place, and freezes it.

    original: the network whose answers are the target; by default this one as it is
    bits: of the weights, 2 to 8
    activation_bits: of what enters linear and convolution layers, 2 to 8; None leaves it float
    ends: bits of both in the first and the last layer
    epochs: passes over the training data, or over the calibration inputs where there is none
    include, exclude: patterns on names and types, see `walk`; others stay as they are

    The step's outcome says what it was trained on, and the divergence of held-out answers from the
    original's at the start of training and now.
    """
    task, held_out = held_out_of("quantize.lsq", task)
    batches = task.calibration()
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    _check_wide(sites)
    original = copy.deepcopy(model) if original is None else original
    wanted = reference_outputs(original, task, held_out)
    widths = _widths(model, task, batches[0], ends)
    if activation_bits is not None:
        _put_grids(model, task, batches, sites, activation_bits, widths)
    pruned = {site.name: _start(site, widths.get(site.name, bits)) for site in sites}
    lessons = Labels(task) if task.has_train else answers(original, task, batches)

    def loss(lesson: Lesson) -> Tensor:
        outputs = task.predict(model, lesson.inputs)
        value = lessons.loss(outputs, lesson)
        if task.has_train:
            with evaluation_mode(original):
                answer = task.predict(original, lesson.inputs)
            value = value + task.divergence(answer, outputs).mean()
        return value

    groups = _groups(model, sites, vectors(model, include, exclude))
    with _training(model, groups, batch_norms=task.has_train), unfused():
        fitted = fit(
            model,
            torch.optim.Adam(groups, fused=True),
            lessons,
            loss,
            epochs=epochs,
            judge=lambda: divergence_of(model, task, held_out, wanted),
            generator=torch.Generator().manual_seed(0),
        )
    _freeze(model, sites, pruned)
    return model, {
        "trained_on": "labels" if task.has_train else "answers of the original",
        "divergence_before": fitted.before,
        "divergence_after": fitted.after,
        "steps": fitted.steps,
    }


def _check_wide(sites: Sequence[Site]) -> None:
    """Raises ModelError for weights whose type has no room for the small numbers of training."""
    for site in sites:
        if site.weight.dtype == torch.float16:
            raise ModelError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} is float16, in which squares '
                "of gradients vanish; train model.float(), and give the task float32 inputs"
            )


def _start(site: Site, bits: int) -> Bitmask | NofM | None:
    """Holds the weight as one to be trained; what is pruned stays zero. Returns what says where."""
    sparse = sparse_form(site.form)
    form = FakeAffine.encode(site.weight, bits=bits, axis=site.axis)
    if sparse is not None:
        # Without a gradient Adam never moves a zero.
        kept = form.latent.detach() != 0
        form.latent.register_hook(partial(torch.mul, kept))  # type: ignore[no-untyped-call]
    site.hold(form)
    return sparse


def _widths(model: nn.Module, task: Task, batch: Inputs, ends: int) -> dict[str, int]:
    """Bits of the first and the last weight that a pass uses."""
    with evaluation_mode(model), unfused():
        order = in_execution_order(model, walk(model), lambda: task.predict(model, batch))
    return {order[0].name: ends, order[-1].name: ends}


def _put_grids(
    model: nn.Module,
    task: Task,
    batches: Sequence[Inputs],
    sites: Sequence[Site],
    bits: int,
    widths: dict[str, int],
) -> None:
    """A grid on the input of every layer that multiplies it with one of the weights."""
    layers = {
        layer: widths.get(site.name, bits)
        for site in sites
        for layer, attribute in site.uses
        if attribute == "weight" and kind_of(layer) in _PRODUCTS
    }
    sizes: dict[nn.Module, list[float]] = {}
    lowest: dict[nn.Module, float] = {}

    def look(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        given = next(iter((*args, *kwargs.values())))
        sizes.setdefault(layer, []).append(float(given.abs().mean()))
        lowest[layer] = min(lowest.get(layer, 0.0), float(given.min()))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model), unfused():
            for batch in batches:
                task.predict(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, width in layers.items():
        if layer in sizes:
            mean = sum(sizes[layer]) / len(sizes[layer])
            signed = lowest[layer] < 0
            put(layer, "input", LearnedGrid.starting(mean, bits=width, signed=signed))


def _groups(
    model: nn.Module, sites: Sequence[Site], others: Sequence[Site]
) -> list[dict[str, Any]]:
    """Each tensor to train, with a rate in proportion to its size."""
    forms = [site.form for site in sites]
    tensors = [p for form in forms if form is not None for p in form.parameters()]
    tensors += [p for _, _, _, grid in grids(model) for p in grid.parameters()]
    tensors += [getattr(*site.uses[0]) for site in others]
    return [
        {"params": [p], "lr": _RATE * (float(p.detach().abs().mean()) or _SMALL)} for p in tensors
    ]


@contextmanager
def _training(
    model: nn.Module, groups: Sequence[dict[str, Any]], *, batch_norms: bool
) -> Iterator[None]:
    """Gradients reach these tensors alone; all is as before after it, statistics aside.

    Nothing is dropped out, which few bits do not need and which would follow no seed.
    """
    chosen = {id(p) for group in groups for p in group["params"]}
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for module in model.modules():
        own = isinstance(module, _BatchNorm) and id(module.weight) in chosen
        module.training = batch_norms and own
    for parameter, _ in wanted:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _freeze(
    model: nn.Module, sites: Sequence[Site], pruned: Mapping[str, Bitmask | NofM | None]
) -> None:
    """Codes and grids in place of what was trained; they give the same."""
    for site in sites:
        trained, sparse = site.form, pruned[site.name]
        assert isinstance(trained, FakeAffine)
        frozen = trained.freeze()
        if sparse is not None:
            keep_zeros(frozen, sparse)
        site.hold(frozen)
    for _, where, layer, grid in list(grids(model)):
        if isinstance(grid, LearnedGrid):
            put(layer, where, grid.freeze())
