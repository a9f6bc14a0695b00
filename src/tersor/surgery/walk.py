"""Walking: finds the weights of a model that a method may store differently, each one once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from tersor.errors import ModelError, OptionError
from tersor.forms.form import Form
from tersor.surgery.hold import bake, form_of, hold

Patterns = Sequence[str] | str | None

# Layers whose weight is not (outputs, inputs, ...): GPT-2's Conv1D and the transposed convolutions.
_OUTPUT_AXIS = {"Conv1D": 1, "ConvTranspose1d": 1, "ConvTranspose2d": 1, "ConvTranspose3d": 1}


@dataclass(frozen=True)
class Site:
    """One weight, with every place that uses it (tied weights have more than one).

    name: "encoder.fc1.weight", of the first place
    kind: the layer's type, "Linear"
    axis: the dimension of its output channels
    uses: (layer, attribute) of every place
    """

    name: str
    kind: str
    axis: int
    uses: tuple[tuple[nn.Module, str], ...]

    @property
    def weight(self) -> Tensor:
        """The weight as it is now, decoded if a form holds it."""
        layer, attribute = self.uses[0]
        weight: Tensor = getattr(layer, attribute)
        return weight.detach()

    @property
    def form(self) -> Form | None:
        """The form that holds it, None for a plain parameter."""
        return form_of(*self.uses[0])

    def hold(self, form: Form) -> None:
        """Stores the weight as `form`, in every place."""
        for layer, attribute in self.uses:
            hold(layer, attribute, form)


def walk(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> list[Site]:
    """Every weight of two or more dimensions, by identity, in the order of `model.modules()`.

    An empty weight, as some networks keep for a part that they do not use, is none.

    include, exclude: patterns (`*`, `?`, `[...]`) on the weight's name, its layer's path, or the
        layer's type ("layer1.*", "Linear"); a tied weight matches by any of its names

    Raises OptionError for a pattern that matches no weight and no vector, or patterns that leave no
    weight, ModelError for a model without weights.
    """
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, layer in _layers(model):
        for attribute, identity in _weights(layer):
            places.setdefault(identity, []).append((path, layer, attribute))
    if not places:
        raise ModelError(
            f"{type(model).__name__} has no weights of two or more dimensions, so there is nothing "
            "to compress; pass the trained network itself"
        )
    sites = []
    for found in places.values():
        path, layer, attribute = found[0]
        kind = kind_of(layer)
        uses = tuple({(id(m), a): (m, a) for _, m, a in found}.values())
        sites.append(
            (
                Site(_join(path, attribute), kind, _OUTPUT_AXIS.get(kind, 0), uses),
                {n for p, m, a in found for n in (_join(p, a), p, kind_of(m))},
            )
        )
    others = _vectors(model)
    kept, dropped = {site.name for site, _ in sites}, set[str]()
    if include is not None:
        kept = _select(sites, include, "include", others)
    if exclude is not None:
        dropped = _select(sites, exclude, "exclude", others)
    if not kept - dropped:
        raise OptionError(
            f"include={include!r} and exclude={exclude!r} leave none of the {len(sites)} weights; "
            "exclude less"
        )
    return [site for site, _ in sites if site.name in kept - dropped]


def vectors(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> list[Site]:
    """Every plain one-dimensional parameter, by identity: biases, scales and shifts of norms.

    An empty one is none. include, exclude: as for `walk`, which says which patterns are wrong
    """
    return [
        site
        for site, names in _vectors(model)
        if (include is None or _matches(names, include)) and not _matches(names, exclude)
    ]


def _vectors(model: nn.Module) -> list[tuple[Site, set[str]]]:
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, layer in _layers(model):
        for name, parameter in layer._parameters.items():
            if parameter is None or parameter.dim() != 1 or not parameter.numel():
                continue
            if parameter.is_floating_point():
                places.setdefault(id(parameter), []).append((path, layer, name))
    found = []
    for uses in places.values():
        path, layer, name = uses[0]
        names = {n for p, m, a in uses for n in (_join(p, a), p, kind_of(m))}
        used = tuple({(id(m), a): (m, a) for _, m, a in uses}.values())
        found.append((Site(_join(path, name), kind_of(layer), 0, used), names))
    return found


def _matches(names: set[str], patterns: Patterns) -> bool:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns or ())
    return any(fnmatchcase(name, pattern) for pattern in wanted for name in names)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy whose weights are plain or held: parametrizations and weight norms are computed out.

    The copy is in evaluation mode, and what torch.compile wrapped is without its wrapper. Raises
    ModelError where it cannot be copied.
    """
    inner = getattr(model, "_orig_mod", model)
    try:
        # Evaluation: in training, a spectral norm changes with every look at it.
        copied: nn.Module = copy.deepcopy(inner).eval()
    # Whatever an attribute's own copying raises.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{type(inner).__name__} cannot be copied: {lines[0]}. Take out what it holds beside "
            "its weights, such as a lock, an open file, or a tensor computed with gradients"
        ) from error
    for site in walk(copied):
        for layer, attribute in site.uses:
            bake(layer, attribute)
    return copied


def in_execution_order(
    model: nn.Module, sites: Iterable[Site], run: Callable[[], Any]
) -> list[Site]:
    """Sorts sites by when `run()` (one forward pass) first uses their layer; unused ones last."""
    order: dict[nn.Module, int] = {}

    def note(layer: nn.Module, _: Any) -> None:
        order.setdefault(layer, len(order))
        # Attention reads its output layer's weight without calling that layer.
        if isinstance(layer, nn.MultiheadAttention):
            order.setdefault(layer.out_proj, len(order))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    last = len(order)
    return sorted(sites, key=lambda site: min(order.get(layer, last) for layer, _ in site.uses))


def kind_of(layer: nn.Module) -> str:
    """The layer's type name; a layer rebuilt from a file remembers the original's."""
    kind = getattr(layer, "kind", None)
    name = kind if isinstance(kind, str) and not isinstance(layer, Form) else type(layer).__name__
    # torch's own names for a Linear inside attention, and for a layer with a parametrized weight.
    return name.removeprefix("Parametrized").replace("NonDynamicallyQuantizable", "")


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer under each of its paths, without forms, parametrizations and what is in them."""
    inside: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Form | ParametrizationList) or id(module) in inside:
            inside |= {id(child) for child in module.children()}
        else:
            yield path, module


def _weights(layer: nn.Module) -> list[tuple[str, int]]:
    """(attribute, identity) of the weights that `layer` owns: plain, held or weight-normed."""
    found = []
    for name, child in layer._modules.items():
        if isinstance(child, Form) and len(child.shape) >= 2:
            found.append((name.removesuffix("_form"), id(child)))
    for name, parameter in layer._parameters.items():
        if parameter is None or parameter.dim() < 2 or not parameter.numel():
            continue
        if not parameter.is_floating_point():
            continue
        if name.endswith("_v") and f"{name[:-2]}_g" in layer._parameters:
            found.append((name[:-2], id(parameter)))
        elif not name.endswith("_g") or f"{name[:-2]}_v" not in layer._parameters:
            found.append((name, id(parameter)))
    for name, parametrization in getattr(layer, "parametrizations", {}).items():
        if getattr(layer, name).dim() >= 2:
            found.append((name, id(parametrization)))
    return found


def _join(path: str, attribute: str) -> str:
    return f"{path}.{attribute}" if path else attribute


def _select(
    sites: list[tuple[Site, set[str]]],
    patterns: Patterns,
    option: str,
    others: list[tuple[Site, set[str]]],
) -> set[str]:
    """Names of the sites that match. others: what a pattern may match as well"""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns or ())
    chosen: set[str] = set()
    for pattern in wanted:
        matched = {
            site.name for site, names in sites if any(fnmatchcase(n, pattern) for n in names)
        }
        if not matched and not any(_matches(names, pattern) for _, names in others):
            raise OptionError(
                f"{option}={pattern!r} matches no weight; the model has, for example, "
                f"{[site.name for site, _ in sites[:3]]} of types "
                f"{sorted({site.kind for site, _ in sites})}"
            )
        chosen |= matched
    return chosen


def check_finite(model: nn.Module) -> None:
    """Raises ModelError naming the first parameter with NaN or infinity, or buffer with NaN.

    So it does for one without values, still to come. A buffer may hold infinities: masks do.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise ModelError(
                f'"{name}" has no values yet; run the network once if its layers are lazy, and '
                "load its weights if it was built on the meta device"
            )
        if not tensor.is_floating_point():
            continue
        # Float8 knows neither test.
        wide = tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()
        bad = wide.isfinite().logical_not() if isinstance(tensor, nn.Parameter) else wide.isnan()
        if bool(bad.any()):
            raise ModelError(
                f'"{name}" of shape {tuple(tensor.shape)} holds NaN or infinity in '
                f"{int(bad.sum())} of its {tensor.numel()} values; load a checkpoint that trained "
                "cleanly"
            )
