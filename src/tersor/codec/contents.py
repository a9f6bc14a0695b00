"""A model's tensors and forms, taken out of it for a file and rebuilt from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.codec.errors import Unreadable
from tersor.codec.header import Entry, Formed, Header, Plain
from tersor.errors import CompressError, ModelError, OptionError
from tersor.forms import KINDS, Form
from tersor.program.program import split_name
from tersor.surgery.hold import hold
from tersor.surgery.walk import kind_of


def collect(model: nn.Module) -> tuple[list[Entry], list[Tensor]]:
    """Every parameter, persistent buffer and form of `model`, tied ones once, and their tensors.

    Entries come as a header lists them: by module, and by name within it.
    """
    names: dict[int, list[str]] = {}
    first: dict[int, tuple[str, Tensor | Form]] = {}
    for name, layer, item in stored(model):
        names.setdefault(id(item), []).append(name)
        first.setdefault(id(item), (kind_of(layer), item))
    if not names:
        raise ModelError(f"{type(model).__name__} has no parameters or buffers, so nothing to save")
    modules: dict[str, list[int]] = {}
    for key in first:
        modules.setdefault(split_name(names[key][0])[0], []).append(key)
    order = [key for keys in modules.values() for key in sorted(keys, key=lambda k: names[k][0])]
    tensors: list[Tensor] = []
    entries = [
        Entry(
            (names[key][0], *sorted(names[key][1:])),
            first[key][0],
            described(first[key][1], names[key][0], tensors),
        )
        for key in order
    ]
    return entries, tensors


def named(items: Mapping[str, Tensor | Form]) -> tuple[list[Entry], list[Tensor]]:
    """The same for tensors and forms that no module owns, whatever their values.

    Modules come in the order in which their first tensors do.
    """
    modules: dict[str, list[str]] = {}
    for name in items:
        if not isinstance(name, str):
            raise OptionError(f"a tensor has the name {name!r:.60}; give a dict of text -> tensor")
        modules.setdefault(split_name(name)[0], []).append(name)
    tensors: list[Tensor] = []
    entries = []
    for name in (name for names in modules.values() for name in sorted(names)):
        item = items[name]
        if isinstance(item, Form):
            entries.append(Entry((name,), "", described(item, name, tensors)))
        elif not isinstance(item, Tensor):
            raise OptionError(
                f'"{name}" is {item!r:.60} and no tensor; make it one with torch.as_tensor'
            )
        else:
            _check_at_hand(item, name)
            entries.append(Entry((name,), "", Plain(tuple(item.shape), 0)))
            tensors.append(item)
    return entries, tensors


def stored(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, Tensor | Form]]:
    """(name, layer, item) of each parameter, form and persistent buffer, under all its names."""
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise ModelError(
            f'"{path}" ({type(module).__name__}) keeps extra state that is no tensor, which a file '
            "cannot hold; make it a buffer"
        )
    prefix = f"{path}." if path else ""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, module, parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, module, buffer
    for name, child in module._modules.items():
        if isinstance(child, Form):
            yield prefix + name.removesuffix("_form"), module, child
        elif child is not None:
            yield from stored(child, prefix + name)


def described(item: Tensor | Form, name: str, tensors: list[Tensor]) -> Plain | Formed:
    """What a header says about `item`; its tensors are appended, their kinds are yet unknown."""
    if isinstance(item, Tensor):
        check_storable(item, name)
        tensors.append(item)
        return Plain(tuple(item.shape), 0)
    if item.training_only:
        raise ModelError(
            f'"{name}" is held by a {type(item).__name__} of shape {item.shape}, which exists for '
            "training only; freeze() it first and hold what that returns"
        )
    if not isinstance(item, KINDS.get(item.kind, ())):
        raise ModelError(
            f'"{name}" is held by a {type(item).__name__} of shape {item.shape}, which is none of '
            f"the forms a file knows {sorted(KINDS)}; add it to forms.KINDS"
        )
    parts = []
    for part, _ in sorted(item.parts()):
        inner = item._modules.get(f"{part}_form")
        value = inner if isinstance(inner, Form) else getattr(item, part)
        parts.append((part, described(value, f"{name}, {part}", tensors)))
    return Formed(item.kind, item.shape, item.dtype, item.config(), tuple(parts))


def check_storable(tensor: Tensor, name: str) -> None:
    """Raises ModelError for a tensor without data, and for weights that are NaN or infinite."""
    _check_at_hand(tensor, name)
    if tensor.is_floating_point() and tensor.numel():
        wide = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        # Masks of minus infinity are ordinary buffers; NaN never is.
        parameter = isinstance(tensor, nn.Parameter)
        bad = ~torch.isfinite(wide) if parameter else torch.isnan(wide)
        if bool(bad.any()):
            what = "NaN or infinite" if parameter else "NaN"
            raise ModelError(
                f'"{name}" of shape {tuple(tensor.shape)} holds {int(bad.sum())} values that are '
                f"{what}; load a checkpoint that trained cleanly"
            )


def _check_at_hand(tensor: Tensor, name: str) -> None:
    """Raises ModelError for a tensor whose elements do not lie in memory, each in its place."""
    if tensor.is_meta:
        raise ModelError(
            f'"{name}" is on the meta device and has no values; load the weights first'
        )
    if tensor.layout is not torch.strided:
        raise ModelError(
            f'"{name}" of shape {tuple(tensor.shape)} has the layout {tensor.layout}, which a file '
            "cannot hold; give its to_dense()"
        )


def rebuild(header: Header, tensors: list[Tensor]) -> tuple[list[Tensor | Form], dict[str, Tensor]]:
    """What each entry describes, and the constants by name."""
    supply = iter(tensors)
    items = [rebuilt(entry.tensor, entry.names[0], supply) for entry in header.entries]
    return items, {name: next(supply) for name, _ in header.constants}


def rebuilt(tensor: Plain | Formed, name: str, supply: Iterator[Tensor]) -> Tensor | Form:
    """What an entry describes, made of its plain tensors. Raises Unreadable where they misfit."""
    try:
        return _rebuilt(tensor, supply)
    except _MISFITS as error:
        raise Unreadable(f'"{name}" cannot be rebuilt: {error}') from None


# What forms raise for parts and options that do not belong together.
_MISFITS: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(RuntimeError, OverflowError, ZeroDivisionError, CompressError),
)


def _rebuilt(tensor: Plain | Formed, supply: Iterator[Tensor]) -> Tensor | Form:
    if isinstance(tensor, Plain):
        return next(supply)
    parts = {name: _rebuilt(part, supply) for name, part in tensor.parts}
    plain = {name: part.dense() if isinstance(part, Form) else part for name, part in parts.items()}
    form = KINDS[tensor.form].build(dict(tensor.config), plain, tensor.shape, tensor.dtype)
    _check_faithful(form, tensor)
    for name, part in parts.items():
        if isinstance(part, Form):
            hold(form, name, part)
    return form


def _check_faithful(form: Form, stored: Formed) -> None:
    """A form must describe itself as the file does, or what is loaded is not what was saved."""
    config: Mapping[str, Any] = form.config()
    if config != stored.config or form.shape != stored.shape or form.dtype != stored.dtype:
        raise ValueError(f"its options {stored.config} are not those of a {stored.form} form")
    own = dict(form.parts())
    if sorted(own) != [name for name, _ in stored.parts]:
        raise ValueError(f"its parts must be {sorted(own)}")
    for name, part in stored.parts:
        if isinstance(part, Plain):
            _check_bits(getattr(form, name), own[name], name)


def _check_bits(codes: Tensor, bits: int, name: str) -> None:
    """Codes of fewer bits than their type has must fit them."""
    if codes.dtype not in (torch.int8, torch.uint8) or bits >= 8 or not codes.numel():
        return
    least = -(2 ** (bits - 1)) if codes.dtype is torch.int8 else 0
    low, high = codes.aminmax()
    if int(low) < least or int(high) >= least + 2**bits:
        raise ValueError(f'its part "{name}" holds codes that do not fit {bits} bits')
