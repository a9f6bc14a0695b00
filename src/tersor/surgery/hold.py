"""Holding: a layer keeps its class, its forward and its name, and stores a weight as a form.

`layer.weight` stays readable everywhere and is decoded on each read; it can no longer be assigned,
so a stray write fails loudly instead of being lost. `decoded(model)` keeps the decoded weights for
the length of a `with` block, which evaluation wants: decoding on every read costs 7-40 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_weight_norm

from tersor.errors import OptionError
from tersor.forms.form import Form


def hold(layer: nn.Module, name: str, form: Form) -> nn.Module:
    """Stores `layer.<name>` as `form`, in place. Holding again replaces the form.

    A parametrized or weight-normed weight is computed once and stored plain first. Works on a
    form's own parts too, which is how forms nest.
    """
    bake(layer, name)
    plain = layer._parameters.get(name, layer._buffers.get(name))
    before = form_of(layer, name) if plain is None else plain
    if before is None:
        raise OptionError(
            f'{type(layer).__name__} has no parameter "{name}" to hold; it has '
            f"{sorted(layer._parameters)}"
        )
    if tuple(before.shape) != form.shape:
        raise OptionError(
            f'a form of shape {form.shape} cannot hold "{name}" of {type(layer).__name__}, '
            f"which has shape {tuple(before.shape)}; encode that weight"
        )
    if plain is not None:
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
        layer.__dict__.pop("_flat_weights", None)
        layer.__class__ = _holding(type(layer), name)  # type: ignore[arg-type]
    layer._modules.pop(f"{name}_form", None)
    layer.add_module(f"{name}_form", form)
    return layer


def release(layer: nn.Module, name: str, parameter: nn.Parameter | None = None) -> nn.Parameter:
    """The inverse of `hold`: `layer.<name>` is plain again, decoded unless a parameter is given."""
    form = form_of(layer, name)
    if form is None:
        raise OptionError(f'"{name}" of {type(layer).__name__} is not held by a form')
    if parameter is None:
        parameter = nn.Parameter(form.value().detach().clone(), requires_grad=False)
    del layer._modules[f"{name}_form"]
    base, names = _held_of(type(layer))
    layer.__class__ = _revived(base, tuple(n for n in names if n != name))
    layer.register_parameter(name, parameter)
    if isinstance(layer, nn.RNNBase):
        layer._flat_weights = _flat_weights(layer)
    return parameter


def release_all(model: nn.Module) -> nn.Module:
    """Decodes every held weight into a plain parameter, in place; tied weights stay tied."""
    plain: dict[Form, nn.Parameter] = {}
    for path, form in list(held(model)):
        owner, _, name = path.rpartition(".")
        layer = model.get_submodule(owner)
        if form_of(layer, name) is form:
            plain[form] = release(layer, name, plain.get(form))
    return model


def form_of(layer: nn.Module, name: str) -> Form | None:
    """The form that holds `layer.<name>`, or None for a plain parameter."""
    form = layer._modules.get(f"{name}_form")
    return form if isinstance(form, Form) else None


def held(model: nn.Module) -> Iterator[tuple[str, Form]]:
    """Yields ("fc1.weight", form) for each outermost form, a shared one under each name."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Form):
            continue
        for child, form in module._modules.items():
            if isinstance(form, Form):
                yield f"{path}.{child}".removeprefix(".").removesuffix("_form"), form


@contextmanager
def decoded(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block every held weight is decoded once and kept; outside it is not."""
    forms = {form for _, form in held(model) if form._decoded is None}
    try:
        for form in forms:
            form._decoded = form.dense().detach()
        yield model
    finally:
        for form in forms:
            form._decoded = None


def bake(layer: nn.Module, name: str) -> None:
    """Turns a parametrized or weight-normed weight into a plain parameter of the same value."""
    if parametrize.is_parametrized(layer, name):
        # torch edits the layer's class, which copies of the layer share: give this one its own.
        kind = type(layer)
        members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(kind.__name__, kind.__bases__, members)
        parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
        # weight_norm leaves a local function behind that renames weight_g and weight_v on load.
        # There is nothing left to rename, and it cannot be pickled.
        hooks = layer._load_state_dict_pre_hooks
        for key in [
            k for k, hook in hooks.items() if "weight_norm" in getattr(hook, "__qualname__", "")
        ]:
            del hooks[key]
    elif f"{name}_g" in layer._parameters and f"{name}_v" in layer._parameters:
        remove_weight_norm(layer, name)


@cache
def _holding(cls: type[nn.Module], name: str) -> type[nn.Module]:
    """A subclass of `cls` whose `name` is decoded from the form held beside it."""

    def decode(layer: nn.Module) -> Tensor:
        return cast("Form", layer._modules[f"{name}_form"]).value()

    def reduce(layer: nn.Module, _: Any) -> tuple[Any, ...]:
        return _revive, _held_of(type(layer)), layer.__getstate__()  # type: ignore[no-untyped-call]

    base, names = _held_of(cls)
    members: dict[str, Any] = {
        name: property(decode),
        "__reduce_ex__": reduce,
        "_held": (base, (*names, name)),
    }
    if issubclass(cls, nn.RNNBase):
        members |= {"_flat_weights": property(_flat_weights, _ignore), "__getstate__": _rnn_state}
    kind = type(cls.__name__, (cls,), members)
    kind.__module__, kind.__qualname__ = cls.__module__, cls.__qualname__
    return kind


def _held_of(cls: type[nn.Module]) -> tuple[type[nn.Module], tuple[str, ...]]:
    found: tuple[type[nn.Module], tuple[str, ...]] = getattr(cls, "_held", (cls, ()))
    return found


def _revived(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    for name in names:
        cls = _holding(cls, name)  # type: ignore[arg-type]
    return cls


def _revive(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _revived(cls, names)
    return kind.__new__(kind)


def _flat_weights(layer: nn.RNNBase) -> list[Tensor | None]:
    # torch caches this list, and a cached list would go on using the weights from before.
    return [getattr(layer, name, None) for name in layer._flat_weights_names]


def _ignore(layer: nn.RNNBase, value: Any) -> None:
    """RNNBase assigns `_flat_weights` when it moves; the property above always knows better."""


def _rnn_state(layer: nn.RNNBase) -> dict[str, Any]:
    state = layer.__dict__.copy()
    for cached in ("_flat_weights", "_flat_weight_refs"):
        state.pop(cached, None)
    return state
