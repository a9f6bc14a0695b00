"""Coupling: which slices of which weights can only be cut together, read from a network's graph.

A network is traced once; labels follow its operators (see `labels` and `rules`). No table of layer
types is involved, so a residual sum, a concatenation, a channel shuffle or an attention with fewer
keys than queries couple whatever they connect.

Source: Fang et al. 2023 (DepGraph), arXiv:2301.12900, section 3, for grouping by dependencies.
Differs from the paper: dependencies are found place by place, from operators and not from layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from tersor.surgery.coupling import elements, products
from tersor.surgery.coupling import places as moving
from tersor.surgery.coupling.labels import Block, Labelled
from tersor.surgery.coupling.rules import Rule, keep_all
from tersor.surgery.coupling.units import Ids, Units
from tersor.surgery.tracing import traced
from tersor.task import Inputs

_RULES: dict[str, Rule] = {**products.RULES, **elements.RULES, **moving.RULES}

Place = tuple[str, int]
"""A parameter's or buffer's name, and a dimension of it."""
_COPIES = {"contiguous", "clone", "detach", "alias"}


@dataclass(frozen=True)
class Unit:
    """What goes together: for each place the indices.

    mixed: whether a norm or a mean goes over it, which sees the others differently without it
    """

    slices: Mapping[Place, tuple[int, ...]]
    mixed: bool = False


@dataclass(frozen=True)
class Group:
    """Units of one kind, such as all channels of a stage: any of them may be cut."""

    units: tuple[Unit, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """The dimensions of weights that they take part of."""
        return tuple(self.units[0].slices)


@dataclass(frozen=True)
class Coupling:
    """What of a network can be cut.

    groups: what can be cut
    left: the other dimensions of weights, with the reason
    units, places: the units by their numbers, and of every dimension of a weight its units
    steps: what the network computes, each operator with the labels of its result
    """

    groups: list[Group]
    left: dict[Place, str]
    units: Units
    places: dict[Place, Ids]
    steps: list[tuple[Node, Any]]


def couple(model: nn.Module, inputs: Inputs) -> Coupling:
    """What of a network can be cut. inputs: one batch. Raises ModelError if it cannot be traced."""
    program = traced(model, inputs, "nothing says what can be cut together; leave it whole")
    units = Units()
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first = _first_names(model)
    bound = _bound(model, first)
    places: dict[Place, Ids] = {}
    values: dict[Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                values[node] = value
            elif node.name in names:
                name = first[names[node.name]]
                values[node] = _stored(units, name, tuple(value.shape), places)
                if name in bound:
                    keep_all(units, values[node], bound[name])
            else:
                values[node] = Labelled(tuple(value.shape))
        elif node.op == "output":
            keep_all(units, _value(node.args[0], values), "it is an output of the network")
        else:
            values[node] = _called(units, node, values)
    groups, left = _grouped(units, places)
    return Coupling(groups, left, units, places, [(n, values[n]) for n in steps(program)])


def _stored(units: Units, name: str, shape: tuple[int, ...], places: dict[Place, Ids]) -> Labelled:
    blocks = []
    for dim, size in enumerate(shape):
        if size > 1:
            ids = places.get((name, dim))
            if ids is None:
                ids = places[name, dim] = units.new(size)
            blocks.append(Block((dim,), ids))
    return Labelled(shape, tuple(blocks))


def _called(units: Units, node: Node, values: dict[Node, Any]) -> Any:
    args = [_value(a, values) for a in node.args]
    kwargs = {k: _value(a, values) for k, a in node.kwargs.items()}
    if getattr(node.target, "__name__", "") == "getitem":
        return args[0][args[1]] if isinstance(args[0], list) else args[0]
    if _is_check(node):
        return None
    name = str(node.target).removeprefix("aten.").removeprefix("tersor.").partition(".")[0]
    rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    shape = shapes(node.meta.get("val"))
    if rule is None:
        keep_all(units, [*args, *kwargs.values()], f"no rule says what {name} does with it")
        return _unlabelled(shape)
    if not any(isinstance(a, Labelled) for a in _flat([*args, *kwargs.values()])):
        return _unlabelled(shape)
    try:
        return rule(units, args, kwargs, shape)
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        # An operator called in a way that its rule does not foresee.
        keep_all(units, [*args, *kwargs.values()], f"no rule says what this {name} does with it")
        return _unlabelled(shape)


def steps(program: ExportedProgram) -> list[Node]:
    """What a network computes, without what depends on how its tensors lie in memory."""
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and not _is_check(node)
        and not _COPIES & {*str(node.target).split(".")}
    ]


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each name of a tensor, and the first name of the same."""
    known: dict[int, str] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: known.setdefault(id(tensor), name) for name, tensor in tensors}


def _bound(model: nn.Module, first: Mapping[str, str]) -> dict[str, str]:
    """Weights whose sizes layers of torch check themselves, and buffers that no file would hold."""
    unheld = {
        first[f"{path}.{name}".removeprefix(".")]: "it is a buffer that is not part of the state"
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set & module._buffers.keys()
        if module._buffers[name] is not None
    }
    return unheld | {
        first[name]: f"{type(module).__name__} of torch ties its width to its heads"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for name, _ in module.named_parameters(prefix=path)
    }


def _is_check(node: Node) -> bool:
    """What looks at its arguments and gives nothing."""
    return not node.users and "assert" in str(node.target)


def _unlabelled(shape: Any) -> Any:
    if isinstance(shape, list):
        return [_unlabelled(s) for s in shape]
    return Labelled(shape) if isinstance(shape, tuple) else None


def _flat(values: Any) -> list[Any]:
    return [f for v in values for f in (_flat(v) if isinstance(v, list | tuple) else [v])]


def shapes(value: Any) -> Any:
    """The shape of a tensor, a list of them for several, None for anything else."""
    if isinstance(value, list | tuple):
        return [shapes(v) for v in value]
    return tuple(int(s) for s in value.shape) if isinstance(value, torch.Tensor) else None


def _value(argument: Any, values: dict[Node, Any]) -> Any:
    if isinstance(argument, Node):
        return values.get(argument)
    if isinstance(argument, list | tuple):
        return [_value(a, values) for a in argument]
    return argument


def _grouped(units: Units, places: dict[Place, Ids]) -> tuple[list[Group], dict[Place, str]]:
    members: dict[int, dict[Place, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, ids in places.items():
        for index, root in enumerate(units.roots(ids).tolist()):
            members[root][place].append(index)
    left: dict[Place, str] = {}
    mixed = units.mixed()
    kinds: dict[Any, list[Unit]] = defaultdict(list)
    for root, slices in members.items():
        reason = units.stays(root)
        if reason is None and len(slices) < 2:
            reason = "nothing is known to depend on it"
        if reason is not None:
            for place in slices:
                left.setdefault(place, reason)
            continue
        found = {place: tuple(indices) for place, indices in slices.items()}
        unit = Unit(found, root in mixed)
        kinds[tuple(sorted((p, len(i)) for p, i in unit.slices.items()))].append(unit)
    groups = []
    for alike in kinds.values():
        if len(alike) == 1:
            for place in alike[0].slices:
                left.setdefault(place, "it is one unit, without which nothing is left")
        else:
            groups.append(Group(tuple(alike)))
    return groups, left
