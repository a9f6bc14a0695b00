"""Puts what a file holds into a user's own module, which must have the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, KeysView, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tersor.codec.contents import stored
from tersor.codec.extras import Extras, taken_out
from tersor.codec.header import Entry
from tersor.errors import FileError, ModelError
from tersor.forms import Form
from tersor.program.program import split_name
from tersor.surgery.chain import put_chains
from tersor.surgery.hold import bake, form_of, hold, release
from tersor.surgery.skip import skip
from tersor.surgery.structure import Structure, put_numbers, shrink

Item = tuple[Entry, Tensor | Form]


def place(model: nn.Module, items: Iterable[Item], structure: Structure) -> None:
    """Holds each form, and sets each tensor, under all its names in `model`; puts grids in.

    structure: of the saved network, which `model` gets first

    All come to where its own tensors are, to the CPU where these are on the meta device. Raises
    FileError, before changing anything, unless names and shapes are the same then.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"into={model!r:.60} is not a torch.nn.Module; build the network first, into=Net()"
        )
    extras, items = taken_out(items)
    trial = _hollow(model) if structure else model
    _restructure(trial, structure, items)
    items = _under_all_names(trial, items)
    _check(trial, {name: item for entry, item in items for name in entry.names}, extras)
    where = _device_of(model)
    if trial is not model:
        _restructure(model, structure, items)
    extras.put_into(model, where)
    # All of them first: a layer that holds a form already is of a class that cannot be baked.
    for entry, _ in items:
        for name in entry.names:
            path, leaf = split_name(name)
            bake(model.get_submodule(path), leaf)
    for entry, found in items:
        item: Tensor | Form = found.to(where)
        shared: nn.Parameter | None = None
        for name in entry.names:
            path, leaf = split_name(name)
            layer = model.get_submodule(path)
            if isinstance(item, Form):
                hold(layer, leaf, item)
            elif leaf in layer._buffers:
                setattr(layer, leaf, item)
            else:
                shared = _set(layer, leaf, item, shared)


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))


def _hollow(model: nn.Module) -> nn.Module:
    """A copy to try things on, whose tensors take no memory."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    hollow: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        empty = torch.empty_like(tensor, device="meta")
        hollow[key] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, hollow)


def _restructure(model: nn.Module, structure: Structure, items: Sequence[Item]) -> None:
    """Does to a fresh network what was done to the saved one, beside its tensors."""
    try:
        skip(model, structure.skipped)
        put_numbers(model, structure.numbers)
        put_chains(model, structure.chains, cut=structure.cut)
        if structure.cut:
            shrink(model, {name: tuple(item.shape) for e, item in items for name in e.names})
    except ModelError as error:
        raise FileError(f"it does not fit into={type(model).__name__}: {error}") from None


def check_complete(model: nn.Module) -> None:
    """Raises ModelError where a tensor of `model` still has no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                f'"{name}" of shape {tuple(tensor.shape)} is on the meta device and not part of '
                "the state_dict, so the file does not have it; build the module on the CPU instead"
            )


def _under_all_names(model: nn.Module, items: Sequence[Item]) -> list[Item]:
    """With the names that `model` ties to one of an item's: a checkpoint may have just one."""
    names: dict[int, list[str]] = {}
    tensor_of: dict[str, int] = {}
    for name, _, item in stored(model):
        names.setdefault(id(item), []).append(name)
        tensor_of[name] = id(item)
    known = {name for entry, _ in items for name in entry.names}
    found = []
    for entry, value in items:
        tied = {tied for name in entry.names for tied in names.get(tensor_of.get(name, 0), ())}
        found.append((replace(entry, names=(*entry.names, *sorted(tied - known))), value))
        known |= tied
    return found


def _set(layer: nn.Module, leaf: str, value: Tensor, shared: nn.Parameter | None) -> nn.Parameter:
    """Makes `value` the parameter of a layer, or shares the one made for the name before."""
    before = layer._parameters.get(leaf)
    trained = before.requires_grad if before is not None else True
    if shared is None:
        shared = nn.Parameter(value, requires_grad=trained and value.is_floating_point())
    if form_of(layer, leaf) is not None:
        return release(layer, leaf, shared)
    # Recurrent layers keep a list of their weights, which only assigning updates.
    setattr(layer, leaf, shared)
    return shared


def _check(model: nn.Module, named: dict[str, Tensor | Form], extras: Extras) -> None:
    shapes = extras.adapted(_shapes(model, named.keys()), model, named)
    name = type(model).__name__
    missing, unknown = shapes.keys() - named.keys(), named.keys() - shapes.keys()
    unknown |= extras.lacking(model)
    if missing or unknown:
        sentences = [
            f"the file lacks {_some(missing)}, which {name} has" if missing else "",
            f"{name} lacks {_some(unknown)}, which the file has" if unknown else "",
        ]
        raise FileError(
            f"it does not fit into={name}: {', and '.join(filter(None, sentences))}; build the "
            "module with the settings that the saved one had"
        )
    for tensor, shape in shapes.items():
        found = tuple(named[tensor].shape)
        if found != shape:
            raise FileError(
                f'it does not fit into={name}: "{tensor}" has shape {found} in the file and '
                f"{shape} in the module; build it with the settings that the saved one had"
            )


def _shapes(model: nn.Module, wanted: KeysView[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what `model` stores, a parametrized weight under its own name if wanted."""
    shapes = {name: tuple(item.shape) for name, _, item in stored(model)}
    for name in wanted - shapes.keys():
        path, leaf = split_name(name)
        inside = f"{path}.parametrizations.{leaf}.".removeprefix(".")
        parts = [n for n in shapes if n.startswith(inside)]
        parts = parts or [n for n in (f"{name}_g", f"{name}_v") if n in shapes]
        if parts:
            # What hold() will bake into one weight.
            weight = getattr(model.get_submodule(path), leaf, None)
            shapes[name] = tuple(shapes[parts[-1]] if weight is None else weight.shape)
            for part in parts:
                del shapes[part]
    return shapes


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    shown = ", ".join(f'"{name}"' for name in listed[:3])
    return shown if len(listed) <= 3 else f"{shown} and {len(listed) - 3} more"
