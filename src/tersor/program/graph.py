"""Writes down an exported graph as the nodes of a program."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from tersor.program.call import Untraceable
from tersor.program.operators import CONSTANT, ITEM, NUMEL, SCALAR, SIZE, WEIGHT, known, overload
from tersor.program.program import Model, Node, Ref
from tersor.surgery.recurrent import original

_SCALAR_NAMES: dict[Any, str] = {run: name for name, run in SCALAR.items()}
_SCALAR_NAMES |= {torch.sym_sum: "sym.sum", math.sqrt: "sym.sqrt", min: "sym.min", max: "sym.max"}
_SCALAR_NAMES |= {int: "sym.int", float: "sym.float", operator.not_: "sym.not"}

# Checks made while tracing; the program's own checks of its inputs replace them.
_CHECKS = {"_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range"}
_CHECKS |= {"sym_constrain_range_for_size", "_functional_assert_async"}
# The same value again in evaluation mode.
_IDENTITIES = {"dropout", "dropout_", "feature_dropout", "feature_dropout_", "alpha_dropout"}
_IDENTITIES |= {"alpha_dropout_", "feature_alpha_dropout", "lift_fresh", "alias", "lift"}
# Uninitialised memory becomes zeros.
_ZEROED = {"empty": "zeros", "empty_like": "zeros_like", "new_empty": "new_zeros"}
_SIZES = {"sym_size": SIZE, "sym_numel": NUMEL}
_RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm"}
_RANDOM |= {"bernoulli", "bernoulli_", "multinomial", "normal", "normal_", "uniform_", "random_"}
_RANDOM |= {"poisson", "exponential_", "rrelu", "native_dropout", "geometric_", "cauchy_"}


class Writer:
    """Collects the nodes of a program while walking an exported graph.

    fetched: number of a weight or constant -> its name, in the order of first use
    """

    def __init__(self, inputs: int, dtype: torch.dtype) -> None:
        self.nodes: list[Node] = []
        self.fetched: dict[str, dict[str, int]] = {WEIGHT: {}, CONSTANT: {}}
        self._inputs = inputs
        self._dtype = dtype
        self._writes = False

    def walk(self, module: fx.GraphModule, given: Iterable[Any]) -> Any:
        """Writes the graph of `module`, its placeholders standing for `given`; its output."""
        known_values: dict[fx.Node, Any] = {}
        supply = iter(given)
        needed = _needed(module.graph)
        self._writes = self._writes or any(_mutates(node) for node in module.graph.nodes)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known_values[node] = next(supply)
            elif node.op == "get_attr":
                known_values[node] = _attribute(module, str(node.target))
            elif node.op == "output":
                return self._value(node.args[0], known_values)
            elif node in needed:
                known_values[node] = self._call(node, known_values)
        raise Untraceable("its exported graph has no output")

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        # What a result is called in the graph does not matter: only its position does.
        target = node.target
        args = [self._value(argument, values) for argument in node.args]
        kwargs = {name: self._value(value, values) for name, value in node.kwargs.items()}
        if isinstance(target, HigherOrderOperator):
            return self._inlined(target._name, args)
        if isinstance(target, OpOverload):
            return self._operator(target, args, kwargs)
        if target is operator.getitem:
            source, index = args
            return source[index] if isinstance(source, list | tuple) else self._add(ITEM, args)
        name = _SCALAR_NAMES.get(target)
        if name is None or kwargs:
            raise Untraceable(f"it uses {getattr(target, '__name__', target)}, which is not listed")
        if name == "sym.sum":
            return self._sum(args[0])
        return self._add(name, args)

    def _sum(self, terms: list[Any]) -> Any:
        total = terms[0]
        for term in terms[1:]:
            total = self._add("sym.add", [total, term])
        return total

    def _inlined(self, name: str, args: list[Any]) -> Any:
        if name == "wrap_with_set_grad_enabled":
            return self.walk(args[1], args[2:])
        if name == "wrap_with_autocast":
            if args[2]:
                raise Untraceable("it switches on autocast inside forward; cast explicitly instead")
            return self.walk(args[4], args[5:])
        raise Untraceable(f"it uses torch.{name}: control flow on tensor values cannot be stored")

    def _operator(self, target: OpOverload, args: list[Any], kwargs: dict[str, Any]) -> Any:
        space, _, name = target._schema.name.partition("::")
        whole = original(target._schema.name)
        if whole is None and space != "aten":
            raise Untraceable(f"it uses the custom operator {target}")
        if name in _CHECKS:
            return None
        if name in _IDENTITIES or self._is_plain_copy(name, args):
            return args[0]
        if name in _SIZES:
            return self._add(_SIZES[name], args)
        if name in _RANDOM:
            raise Untraceable(f"it draws random numbers ({target}) in evaluation mode")
        stored = whole or f"{name}.{target._overloadname}"
        if name in _ZEROED:
            stored = f"{_ZEROED[name]}.default"
            kwargs.pop("memory_format", None)
        stored = "detach.default" if name == "detach_" else stored
        if not known(stored):
            raise Untraceable(f"its operator aten.{stored} is not on the list of those allowed")
        return self._add(stored, *self._tidy(stored, args, kwargs))

    def _is_plain_copy(self, name: str, args: list[Any]) -> bool:
        """A constant needs no copy of its own unless something may write to it."""
        if name not in ("lift_fresh_copy", "detach_", "detach") or not isinstance(args[0], Ref):
            return False
        source = args[0].index - self._inputs
        return not self._writes and source >= 0 and self.nodes[source].operator == CONSTANT

    def _tidy(
        self, name: str, args: list[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Arguments by position where possible, without those equal to their defaults."""
        schema = overload(name)._schema.arguments
        positional = [a for a in schema if not a.kwarg_only]
        while len(args) < len(positional) and positional[len(args)].name in kwargs:
            args.append(kwargs.pop(positional[len(args)].name))
        while args and _default(positional[len(args) - 1], args[-1]):
            args.pop()
        ignored = ("pin_memory", "layout")
        kept = {
            a.name: kwargs[a.name]
            for a in schema
            if a.name in kwargs and a.name not in ignored and not _default(a, kwargs[a.name])
        }
        # A factory in the model's own precision follows the model when that is changed.
        factory = not any("Tensor" in str(a.type) for a in schema)
        if factory and kept.get("dtype") == self._dtype:
            kept["dtype"] = Model.DTYPE
        return args, kept

    def _add(self, name: str, args: Iterable[Any], kwargs: Mapping[str, Any] | None = None) -> Ref:
        self.nodes.append(Node(name, tuple(args), dict(kwargs or {})))
        return Ref(self._inputs + len(self.nodes) - 1)

    def fetch(self, operator: str, name: str) -> Callable[[], Ref]:
        """A placeholder that writes the node fetching a weight or constant when first used."""

        def first_use() -> Ref:
            places = self.fetched[operator]
            if name not in places:
                places[name] = self._add(operator, (len(places),)).index
            return Ref(places[name])

        return first_use

    def _value(self, value: Any, values: dict[fx.Node, Any]) -> Any:
        """An argument of the graph as an argument of a program."""
        if isinstance(value, fx.Node):
            value = values[value]
            return value() if callable(value) and not isinstance(value, fx.GraphModule) else value
        if isinstance(value, list | tuple):
            return [self._value(part, values) for part in value]
        if isinstance(value, slice):
            raise Untraceable("it indexes with a slice object")
        return Model.DEVICE if isinstance(value, torch.device) else value


def _attribute(module: fx.GraphModule, target: str) -> Any:
    found = getattr(module, target)
    if not isinstance(found, fx.GraphModule):
        raise Untraceable(f"its exported graph holds {target}, a {type(found).__name__}")
    return found


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on, or that change a tensor in place."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed or _mutates(node):
            needed.add(node)
            needed.update(node.all_input_nodes)
    return needed


def _mutates(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, HigherOrderOperator):
        return True
    return (
        isinstance(target, OpOverload)
        and target._schema.is_mutable
        and target._schema.name != "aten::detach_"
    )


def _default(argument: Any, value: Any) -> bool:
    if not argument.has_default_value() or isinstance(value, Ref):
        return False
    default = argument.default_value
    return type(default) is type(value) and bool(default == value)
