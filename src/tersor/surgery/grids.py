"""Grids on layers: the first input of a layer, or its output, is rounded as it passes.

The grid is a child of the layer, `input_grid` or `output_grid`, so that it moves, copies, pickles
and is saved with it; a hook that torch keeps with the layer lets values pass through it. Hooks
leave the layer's class to `hold`, and make torch's fused encoder layers, which read weights past
their layers, take the way on which grids are seen. `layer.forward(x)` passes by them. A child
`input_scaling` multiplies the input before it is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from tersor.errors import OptionError
from tersor.forms.grid import Rounding
from tersor.forms.scaling import Scaling

Where = Literal["input", "output"]

SCALING = "input_scaling"

_KEY = "tersor_grid"
"""Of the hook: torch numbers its own anew in each process, and would take the number of ours."""


def put(layer: nn.Module, where: Where, grid: Rounding) -> nn.Module:
    """Rounds what enters or leaves `layer` by `grid`, in place; another grid there is replaced.

    One grid may sit in several places.
    """
    if isinstance(layer, Rounding | Scaling):
        raise OptionError("a grid cannot sit on a grid; put it on the layer")
    _add(layer, _child(where), grid)
    return layer


def put_scaling(layer: nn.Module, scaling: Scaling) -> nn.Module:
    """Multiplies what enters `layer` by `scaling`, in place; another one there is replaced."""
    _add(layer, SCALING, scaling)
    return layer


def remove(layer: nn.Module, where: Where) -> Rounding | None:
    """The inverse of `put`; returns what sat there."""
    grid = grid_of(layer, where)
    if grid is not None:
        del layer._modules[_child(where)]
    return grid


def grid_of(layer: nn.Module, where: Where) -> Rounding | None:
    """The grid that sits there, or None."""
    grid = layer._modules.get(_child(where))
    return grid if isinstance(grid, Rounding) else None


def scaling_of(layer: nn.Module) -> Scaling | None:
    """What its input is multiplied by, or None."""
    scaling = layer._modules.get(SCALING)
    return scaling if isinstance(scaling, Scaling) else None


def grids(model: nn.Module) -> Iterator[tuple[str, Where, nn.Module, Rounding]]:
    """(path, where, layer, grid) of each place, a shared grid in each of its places."""
    for path, layer in model.named_modules(remove_duplicate=False):
        for where in _PLACES:
            grid = grid_of(layer, where)
            if grid is not None:
                yield path, where, layer, grid


_PLACES: tuple[Where, Where] = ("input", "output")


def place_of(path: str) -> tuple[str, Where] | None:
    """ "conv1.input_grid" -> ("conv1", "input"); None for the path of anything but a grid."""
    owner, _, child = path.rpartition(".")
    return next(((owner, where) for where in _PLACES if child == _child(where)), None)


def _child(where: Where) -> str:
    if where not in _PLACES:
        raise OptionError(f'where={where!r}; a grid sits on the "input" or the "output" of a layer')
    return f"{where}_grid"


def _add(layer: nn.Module, child: str, module: nn.Module) -> None:
    layer._modules.pop(child, None)
    layer.add_module(child, module)
    if child == "output_grid":
        layer._forward_hooks[_KEY] = _leave  # type: ignore[index]
    else:
        layer._forward_pre_hooks[_KEY] = _enter  # type: ignore[index]
        layer._forward_pre_hooks_with_kwargs[_KEY] = True  # type: ignore[index]


def _enter(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for child in (SCALING, "input_grid"):
        module = layer._modules.get(child)
        if module is not None and args:
            args = (module(args[0]), *args[1:])
        elif module is not None:
            first = next(iter(kwargs))
            kwargs = kwargs | {first: module(kwargs[first])}
    return args, kwargs


def _leave(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
    grid = layer._modules.get("output_grid")
    return output if grid is None else grid(output)
