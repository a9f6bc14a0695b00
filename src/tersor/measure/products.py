"""What each weight of a network is multiplied with, seen at the operators of a forward pass.

Weights are recognised by their memory, whatever layer, view or function reads them: linear layers,
convolutions, attention, recurrent layers that are run as their separate products.

Source: Grosse, Martens 2016, arXiv:1602.01407, section 3.1, for a convolution as a product of
patches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.forms.form import rows
from tersor.measure.running import Watching, differentiable_recurrence
from tersor.surgery.walk import Site

_aten = torch.ops.aten


class Products(Watching):  # type: ignore[no-untyped-call]
    """Calls `met` before each product of a weight, and `looked_up` before each use of a table."""

    def __init__(self, sites: Sequence[Site], places: int | None = None) -> None:
        """sites: weights to look for, all of them plain.

        places: of a convolution that are taken from each sample, None for all of them; neighbours
            tell little that is new
        """
        super().__init__()
        # Several weights may be parts of one storage.
        self._sites: dict[int, list[tuple[range, Site]]] = {}
        for site in sites:
            start = site.weight.storage_offset()
            place = range(start, start + site.weight.numel())
            storage = site.weight.untyped_storage().data_ptr()
            self._sites.setdefault(storage, []).append((place, site))
        self._places = places

    def met(self, site: Site, values: Callable[[], Tensor]) -> None:
        """`values()` is (groups, rows, inputs): each row meets the weight of its group."""
        raise NotImplementedError

    def looked_up(self, site: Site, indices: Tensor) -> None:
        """Rows of the weight are taken instead."""

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in PRODUCTS:
            left, right = (args[i] for i in PRODUCTS[func])
            if (site := self.of(right)) is not None:
                self._product(site, left, right)
            elif (site := self.of(left)) is not None:
                self._product(site, right.transpose(-1, -2), left.transpose(-1, -2))
        elif func is _aten.convolution.default and (site := self.of(args[1])) is not None:
            self._convolution(site, *args[:2], *args[3:7], groups=args[8])
        elif func is _aten.embedding.default and (site := self.of(args[0])) is not None:
            self.looked_up(site, args[1])
        return func(*args, **kwargs)

    def of(self, tensor: Tensor) -> Site | None:
        """The weight that a tensor is, or is a view of."""
        found = self._sites.get(tensor.untyped_storage().data_ptr(), ())
        return next((site for place, site in found if tensor.storage_offset() in place), None)

    def _product(self, site: Site, other: Tensor, weight: Tensor) -> None:
        inputs = rows(site.weight, site.axis).shape[1]
        # A piece of its outputs is met as well; a piece of its inputs is something else.
        if weight.shape[-2] == inputs:
            self.met(site, lambda: other.detach().reshape(1, -1, inputs))

    def _convolution(
        self,
        site: Site,
        inputs: Tensor,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        *,
        groups: int,
    ) -> None:
        if transposed or weight.dim() > 4:
            return

        def values() -> Tensor:
            seen = _patches(inputs.detach(), weight.shape[2:], stride, padding, dilation)
            return _at_places(seen, groups, self._places)

        self.met(site, values)


@contextmanager
def unfused_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers as their separate products; one fused operator would hide them."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    with warnings.catch_warnings():
        # That Intel's GPUs could do something else, whatever is asked for.
        warnings.filterwarnings("ignore", message=".*oneDNN.*")
        with torch.backends.mkldnn.flags(enabled=False), differentiable_recurrence(model):
            yield


def _patches(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """A view of what each place meets, (samples, channels, height, width, *kernel)."""
    if len(kernel) == 1:
        inputs, kernel = inputs[:, :, None], (1, *kernel)
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    padded = functional.pad(inputs, (padding[1], padding[1], padding[0], padding[0])).contiguous()
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = [(n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, stride, strict=True)]
    steps = padded.stride()
    return padded.as_strided(
        (*padded.shape[:2], *sizes, *kernel),
        (
            *(*steps[:2], steps[2] * stride[0], steps[3] * stride[1]),
            *(steps[2] * dilation[0], steps[3] * dilation[1]),
        ),
    )


def _at_places(seen: Tensor, groups: int, most: int | None) -> Tensor:
    """Some places of each sample, drawn with a fixed seed: (groups, samples * places, inputs)."""
    height, width = seen.shape[2:4]
    places = torch.arange(height * width)
    if most is not None and len(places) > most:
        generator = torch.Generator().manual_seed(len(places))
        places = torch.randperm(len(places), generator=generator)[:most]
    # (samples, groups * n, places) -> (groups, samples * places, n)
    taken = seen[:, :, places // width, places % width].permute(1, 3, 4, 0, 2)
    return taken.reshape(groups, -1, len(seen) * len(places)).transpose(1, 2)


PRODUCTS = {_aten.addmm.default: (1, 2), _aten.mm.default: (0, 1), _aten.bmm.default: (0, 1)}
"""Operators, and which of their arguments are multiplied."""
