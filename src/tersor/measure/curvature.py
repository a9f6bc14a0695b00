"""Curvature of the task's divergence in each weight, as the network's own inputs and gradients say.

For a small change E of a weight (outputs, inputs), the divergence of the network's answers grows by
about 1/2 * trace(O E I E^T), where I are the second moments of what the weight is multiplied with
and O those of the gradients that come back to what it gives.

Source: Martens, Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
curvature", arXiv:1503.05671, section 3; Grosse, Martens 2016 (convolutions), arXiv:1602.01407,
theorem 1 with places taken for independent; Tseng, Sun, Hou, De Sa 2025, "Model-preserving adaptive
rounding", arXiv:2505.22988, for its use in rounding.
Differs: the gradients are those of the task's own divergence, drawn by `Task.score`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.measure.products import PRODUCTS, Products, unfused_recurrence
from tersor.measure.running import check_outputs, differentiable, evaluating, unfused
from tersor.surgery.walk import Site
from tersor.task import Inputs, Task

_aten = torch.ops.aten
# Places of a convolution that are looked at in each sample: neighbours tell nothing new.
_PLACES = 32


class GradientError(ModelError):
    """A network that gradients do not pass through."""


@dataclass
class Curvature:
    """What is known of a weight laid out as (outputs, inputs), or of a vector.

    own: mean over the elements of the divergence's second derivative in each; 0 without gradients
    inputs: (groups, inputs, inputs) float64, second moments of what it is multiplied with; of an
        embedding those of the gradients of what is looked up; None where nothing was seen, as for
        vectors and for transposed or three-dimensional convolutions
    outputs: (groups, outputs / groups, outputs / groups) float64, second moments of the gradients
        of what it gives; None where nothing was seen, as for embeddings and the first layer
    """

    own: float
    inputs: Tensor | None = None
    outputs: Tensor | None = None


def curvature(
    model: nn.Module,
    task: Task,
    batches: Sequence[Inputs],
    sites: Sequence[Site],
    *,
    draws: int = 1,
) -> dict[str, Curvature]:
    """The curvature of each site by name; vectors may be among them.

    Weights are recognised by their memory, so they must be plain; tied ones add up. Gradients are
    drawn with a fixed seed.

    draws: gradients for each prediction; 0 looks at the inputs alone

    Raises ModelError for NaN outputs; GradientError, one of its kind, where gradients do not pass.
    """
    watch = _Watch([site for site in sites if site.weight.dim() > 1])
    parameters = [getattr(*site.uses[0]) for site in sites]
    squares = [0.0] * len(sites)
    generator = torch.Generator().manual_seed(0)
    predictions = 0
    with (
        evaluating(model),
        unfused(),
        unfused_recurrence(model),
        differentiable(model.parameters()),
        torch.set_grad_enabled(draws > 0),
    ):
        for number, batch in enumerate(batches, 1):
            with watch, _passable(model, draws):
                watch.backward = False
                outputs = task.predict(model, batch)
                watch.backward = True
                for draw in range(draws):
                    score = task.score(outputs, generator)
                    gradients = torch.autograd.grad(
                        score, parameters, retain_graph=draw < draws - 1, allow_unused=True
                    )
                    for place, gradient in enumerate(gradients):
                        if gradient is not None:
                            squares[place] += float(gradient.double().square().mean())
            check_outputs(outputs.detach(), model, f"calibration batch {number}")
            predictions += len(outputs)
    share = 1 / max(1, predictions * draws)
    return {
        site.name: Curvature(square * share, *watch.found(site))
        for site, square in zip(sites, squares, strict=True)
    }


@contextmanager
def _passable(model: nn.Module, draws: int) -> Iterator[None]:
    """Says so where torch has no gradient to give."""
    try:
        yield
    except RuntimeError as error:
        if not draws:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise GradientError(
            f"gradients do not pass through {type(model).__name__}: {reason}"
        ) from error


class _Watch(Products):  # type: ignore[no-untyped-call]
    """Adds up what meets the weights on the way forward, and what comes back to their outputs."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__(sites, _PLACES)
        self.backward = False
        self._totals: dict[tuple[str, str], Tensor] = {}
        self._seen: dict[tuple[str, str], int] = {}
        self._looked: dict[int, str] = {}

    def found(self, site: Site) -> tuple[Tensor | None, Tensor | None]:
        """Means of the second moments of inputs (or of what was looked up), and of gradients."""

        def mean(what: str) -> Tensor | None:
            key = site.name, what
            return self._totals[key] / self._seen[key] if key in self._seen else None

        inputs = mean("inputs")
        return mean("looked up") if inputs is None else inputs, mean("gradients")

    def met(self, site: Site, values: Callable[[], Tensor]) -> None:
        self._add(site.name, "inputs", values())

    def looked_up(self, site: Site, indices: Tensor) -> None:
        self._looked[indices.data_ptr()] = site.name

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.backward:
            return super().see(func, args, kwargs)
        if func in PRODUCTS:
            left, right = (args[i] for i in PRODUCTS[func])
            if (site := self.of(right)) is not None:
                self._product_gradient(site, left, right)
            elif (site := self.of(left)) is not None:
                self._product_gradient(site, right.transpose(-1, -2), left.transpose(-1, -2))
        elif func is _aten.convolution_backward.default and (site := self.of(args[2])) is not None:
            if not args[7]:
                self._convolution_gradient(site, args[0], groups=args[9])
        elif func is _aten.embedding_dense_backward.default and args[1].data_ptr() in self._looked:
            # One-hot rows times the table: what is looked up are its columns.
            gradient = args[0].reshape(1, -1, args[0].shape[-1])
            self._add(self._looked[args[1].data_ptr()], "looked up", gradient)
        return func(*args, **kwargs)

    def _product_gradient(self, site: Site, gradient: Tensor, weight: Tensor) -> None:
        """Adds the left side of gradient (..., outputs) @ weight (..., outputs, m)."""
        outputs = site.weight.shape[site.axis]
        if weight.shape[-2] == outputs:
            self._add(site.name, "gradients", gradient.reshape(1, -1, outputs))

    def _convolution_gradient(self, site: Site, gradient: Tensor, *, groups: int) -> None:
        apart = (
            gradient.detach().flatten(2).reshape(len(gradient), groups, -1, gradient[0, 0].numel())
        )
        places = apart.permute(1, 0, 3, 2)
        self._add(site.name, "gradients", places.reshape(groups, -1, places.shape[-1]))

    def _add(self, name: str, what: str, values: Tensor) -> None:
        """values: (groups, rows, n)"""
        wide = values.detach().float()
        products = (wide.transpose(1, 2) @ wide).double().cpu()
        key = name, what
        self._totals[key] = self._totals[key] + products if key in self._totals else products
        self._seen[key] = self._seen.get(key, 0) + values.shape[1]
