"""LSQ: quantization-aware training of weights and activations, with steps that are learned too.

For 2 to 4 bits, where rounding a trained network no longer works and there is data and time to
train: labels if the task has them, the original's answers otherwise. After training everything is
frozen to codes and grids, and no answer changes. For 8 bits `quantize.static` needs no training.

Source: Esser et al. 2020 (LSQ), arXiv:1902.08153; Fan et al. 2021 (Quant-Noise), arXiv:2004.07320,
section 4.2 and eq. 6, for rounding some of the weights in each step.
Differs from the papers: scales per output channel, stored in bfloat16; Adam, with a rate in
proportion to each tensor's size; labels and the original's answers (section 3.6 of the first, at
temperature 1) count half each; noise is drawn for weights one by one, not for blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.forms import Bitmask, FakeAffine, NofM
from tersor.forms.learned_grid import LearnedGrid
from tersor.measure.running import evaluating, unfused
from tersor.methods.asked import held_out_of
from tersor.methods.learning import learn
from tersor.methods.masking import masked, schooling
from tersor.methods.sparse import Zeros, check_uncoded, keep_zeros, sparse_form
from tersor.recipe import Outcome, method
from tersor.surgery.grids import grid_of, grids, put, remove
from tersor.surgery.walk import Patterns, Site, in_execution_order, kind_of, vectors, walk
from tersor.task import Inputs, Task
from tersor.task.kinds import device_of, evaluation_mode
from tersor.train import Regime, TrainingLog
from tersor.train.health import Bounded

_RATE = 0.01
"""The highest: the share of its own size by which a tensor changes in a step."""
_SMALL = 0.1
"""The size of a tensor of zeros."""
_PRODUCTS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")


@method
def lsq(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    bits: Annotated[int, Field(ge=2, le=8)] = 2,
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = 2,
    ends: Annotated[int, Field(ge=2, le=8)] = 8,
    noise: Annotated[float, Field(gt=0, le=1)] = 1.0,
    epochs: Annotated[int, Field(ge=1)] = 20,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains the network with rounded weights and activations, in place, and freezes it.

    original: whose answers are learned and judge; by default the network as it is now
    bits: of the weights, 2 to 8
    activation_bits: of what enters linear and convolution layers, 2 to 8; None leaves it float
    ends: bits of both in the first and the last layer
    noise: share of the weights that a step rounds, others each time, above 0; 1 rounds all
    epochs: passes over the training data, or over the calibration inputs where there is none
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs, and which weights are rounded
    include, exclude: patterns on names and types, see `walk`; others stay as they are

    The step's outcome says what it was trained on, and the divergence of held-out answers from the
    original's at the start of training and now. After an error all is as it was.
    """
    task, _ = held_out_of("quantize.lsq", task)
    sites, others = walk(model, include, exclude), vectors(model, include, exclude)
    check_uncoded(sites)
    check_wide(sites)
    lessons, teacher = schooling("quantize.lsq", model, task, original, None)
    order = generator or torch.Generator().manual_seed(0)
    pruned = {site.name: sparse_form(site.form) for site in sites}
    with (
        gridded(model, task, sites, activation_bits, ends) as widths,
        masked(model, sites, lambda site: start(site, widths.get(site.name, bits))),
        unfused(),
    ):
        forms = [trained(site) for site in sites]
        outcome = learn(
            "quantize.lsq",
            model,
            lessons,
            teacher,
            parameters=_groups(model, forms, others),
            epochs=epochs,
            rate=_RATE,
            training=training,
            generator=order,
            regimes=[
                Zeros([trained(site).latent for site in sites if pruned[site.name] is not None]),
                bounds(model, sites),
                *([Noise(forms, noise, order)] if noise < 1 else []),
            ],
            log=log,
            batch_norms=task.has_train,
        )
        freeze(model, sites, pruned)
    labelled = "labels and " if task.has_train else ""
    return model, {"trained_on": f"{labelled}answers of the original", **outcome}


class Noise(Regime):
    """Rounds some of the weights in each step, and passes the others on as they are.

    share: the chance of a weight to be rounded, the papers' p
    generator: draws a seed for them
    """

    def __init__(
        self, forms: Sequence[FakeAffine], share: float, generator: torch.Generator
    ) -> None:
        """Without gradients all of them are rounded, as ever."""
        self._forms, self._share = forms, share
        seed = int(torch.randint(2**62, (), generator=generator))
        self._generator = torch.Generator().manual_seed(seed)

    def begin(self, model: nn.Module, steps: int) -> None:
        """Draws for the first step."""
        self._draw()

    def after(self, step: int) -> None:
        """Draws for the next one."""
        self._draw()

    def state(self) -> dict[str, Any]:
        """Where the drawing was before this step's."""
        return {"generator": self._before}

    def restore(self, state: dict[str, Any]) -> None:
        """Draws that step's again."""
        self._generator.set_state(state["generator"])
        self._draw()

    def _draw(self) -> None:
        self._before = self._generator.get_state()
        for form in self._forms:
            lots = torch.rand(form.latent.shape, generator=self._generator)
            form.chosen = (lots < self._share).to(form.latent.device)


def bounds(model: nn.Module, sites: Sequence[Site]) -> Bounded:
    """Watches the scales of weights and of what enters layers."""
    numbers = {f'the scale of "{site.name}"': partial(_scale, trained(site)) for site in sites}
    for path, where, _, grid in grids(model):
        if isinstance(grid, LearnedGrid):
            numbers[f'the scale of the {where} of "{path}"'] = partial(_scale, grid)
    return Bounded(numbers)


def _scale(owner: FakeAffine | LearnedGrid) -> Tensor:
    return owner.scale


def trained(site: Site) -> FakeAffine:
    """The form of a site while it is trained."""
    form = site.form
    assert isinstance(form, FakeAffine)
    return form


def check_wide(sites: Sequence[Site]) -> None:
    """Raises ModelError for weights whose type has no room for the small numbers of training."""
    for site in sites:
        if site.weight.dtype == torch.float16:
            raise ModelError(
                f'"{site.name}" of shape {tuple(site.weight.shape)} is float16, in which squares '
                "of gradients vanish; train model.float(), and give the task float32 inputs"
            )


def start(site: Site, bits: int) -> FakeAffine:
    """What the weight is trained as; what is pruned stays zero."""
    form = FakeAffine.encode(site.weight, bits=bits, axis=site.axis)
    if sparse_form(site.form) is not None:
        # Without a gradient Adam never moves a zero.
        kept = form.latent.detach() != 0
        form.latent.register_hook(lambda slope: slope * kept.to(slope.device))  # type: ignore[no-untyped-call]
    return form


@contextmanager
def gridded(
    model: nn.Module, task: Task, sites: Sequence[Site], bits: int | None, ends: int
) -> Iterator[dict[str, int]]:
    """With grids to be learned; after an error those that were there are back.

    Gives the bits of the first and the last weight that a pass uses.
    """
    batches = task.calibration()
    widths = _widths(model, task, batches[0], ends)
    before = [(layer, grid_of(layer, "input")) for layer in model.modules()]
    try:
        if bits is not None:
            _put_grids(model, task, batches, sites, bits, widths)
        yield widths
    except BaseException:
        for layer, grid in before:
            remove(layer, "input")
            if grid is not None:
                put(layer, "input", grid)
        raise


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
            grid = LearnedGrid.starting(mean, bits=width, signed=signed)
            put(layer, "input", grid.to(device_of(layer)))


def _groups(
    model: nn.Module, forms: Sequence[FakeAffine], others: Sequence[Site]
) -> list[dict[str, Any]]:
    """Each tensor to train, with a rate in proportion to its size."""
    tensors = [p for form in forms for p in form.parameters()]
    tensors += [p for _, _, _, grid in grids(model) for p in grid.parameters()]
    tensors += [getattr(*site.uses[0]) for site in others]
    return [
        {"params": [p], "lr": _RATE * (float(p.detach().abs().mean()) or _SMALL)} for p in tensors
    ]


def freeze(
    model: nn.Module, sites: Sequence[Site], pruned: Mapping[str, Bitmask | NofM | None]
) -> None:
    """Codes and grids in place of what was trained; they give the same."""
    for site in sites:
        frozen, sparse = trained(site).freeze(), pruned[site.name]
        if sparse is not None:
            keep_zeros(frozen, sparse)
        site.hold(frozen)
    for _, where, layer, grid in list(grids(model)):
        if isinstance(grid, LearnedGrid):
            put(layer, where, grid.freeze())
