"""Settling a cut network: what its modules remember of sizes is set so that it runs again.

Which numbers may change follows from its graph: those that an operator's sizes had before. Which of
them must is found by trying, and a second trace proves that every tensor has the size it should.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from tersor.errors import ModelError
from tersor.surgery.coupling import Coupling, Labelled, shapes, steps
from tersor.surgery.tracing import first_line, traced
from tersor.task import Inputs, call, evaluation_mode

Wanted = Sequence[tuple[Node, Any]]
"""Each step as it was, and the sizes that it should give where they are known."""
_NUMBERS = {"add", "sub", "rsub", "mul", "div", "pow", "lerp", "addcmul"}
"""Operators whose numbers are part of what is computed, where those of others may be sizes."""
_TOGETHER = 3
"""So many numbers of modules are changed together, at most."""


@dataclass(frozen=True)
class Memory:
    """A number that a module remembers: its path, the attribute, before and after."""

    path: str
    attribute: str
    before: int
    after: int


def memories_of(model: nn.Module, coupling: Coupling, wanted: Wanted) -> list[Memory]:
    """Numbers that modules remember and that sizes in their own operators had before."""
    found: dict[tuple[str, str], Memory] = {}
    for (node, before), (_, after) in zip(coupling.steps, wanted, strict=True):
        pairs = _changed_sizes(before, after)
        for path in _paths(node) if pairs else []:
            module = model.get_submodule(path)
            for attribute, value in vars(module).items():
                if type(value) is int and value in pairs:
                    found[path, attribute] = Memory(path, attribute, value, pairs[value])
    return list(found.values())


def _changed_sizes(before: Any, after: Any) -> dict[int, int]:
    if isinstance(before, list):
        pairs = [
            _changed_sizes(b, a) for b, a in zip(before, after or [None] * len(before), strict=True)
        ]
        return {k: v for pair in pairs for k, v in pair.items()}
    if not isinstance(before, Labelled) or after is None:
        return {}
    return {b: a for b, a in zip(before.shape, after, strict=True) if a != b}


def _paths(node: Node) -> list[str]:
    """The modules in whose forward pass an operator is called, the innermost alone."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return [stack[-1][0].removeprefix("L['self'].").removeprefix("L['self']")] if stack else [""]


@dataclass(frozen=True, order=True)
class Progress:
    """How far a network gets: calls of modules that end, then nodes of a trace that are as wanted.

    path: of the module where it ends; reason: why, empty where all is as wanted
    """

    calls: float
    nodes: float
    path: str = field(default="", compare=False)
    reason: str = field(default="", compare=False)


def settled(model: nn.Module, inputs: Inputs, memories: Sequence[Memory], wanted: Wanted) -> str:
    """Sets what modules remember until the network runs with the wanted sizes.

    Where it gets stuck, the module there and those around it are given new numbers, as few as help;
    what helped before in a module of the same kind comes first. Returns why it gets no further.
    """
    helped: dict[type, tuple[str, ...]] = {}
    reached = _progress(model, inputs, wanted)
    while reached.reason:
        near = [m for m in memories if _around(m.path, reached.path)]
        near = [m for m in near if getattr(model.get_submodule(m.path), m.attribute) == m.before]
        hint = helped.get(type(model.get_submodule(reached.path)), ())
        for chosen in _few_first(near, hint):
            _set(model, chosen, "after")
            now = _progress(model, inputs, wanted)
            if now > reached:
                helped[type(model.get_submodule(reached.path))] = tuple(m.attribute for m in chosen)
                reached = now
                break
            _set(model, chosen, "before")
        else:
            return reached.reason
    return ""


def changed_numbers(model: nn.Module, memories: Sequence[Memory]) -> dict[str, dict[str, int]]:
    """What modules remember now that they did not before, by path and attribute."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for memory in memories:
        now = getattr(model.get_submodule(memory.path), memory.attribute)
        if now != memory.before:
            found[memory.path][memory.attribute] = now
    return dict(found)


def _around(outer: str, inner: str) -> bool:
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _set(model: nn.Module, memories: Sequence[Memory], which: str) -> None:
    for memory in memories:
        setattr(model.get_submodule(memory.path), memory.attribute, getattr(memory, which))


def _few_first(memories: Sequence[Memory], hint: Sequence[str]) -> Iterator[list[Memory]]:
    hinted = [memory for memory in memories if memory.attribute in hint]
    if hinted:
        yield hinted
    for count in range(1, min(len(memories), _TOGETHER) + 1):
        for chosen in itertools.combinations(memories, count):
            yield list(chosen)


def _progress(model: nn.Module, inputs: Inputs, wanted: Wanted) -> Progress:
    calls, path, reason = _called(model, inputs)
    if reason:
        return Progress(calls, 0, path, reason)
    try:
        program = traced(model, inputs, "nothing proves that it still runs")
    except ModelError as error:
        return Progress(calls, 0, path, str(error))
    now = steps(program)
    for at, (node, (before, expected)) in enumerate(zip(now, wanted, strict=False)):
        shape, where = shapes(node.meta.get("val")), ""
        if node.target != before.target or not _agrees(shape, expected):
            where = f"{node.name} has shape {shape} and not {expected}"
        elif _numbers(node) != _numbers(before):
            where = f"{node.name} computes with its size"
        if where:
            return Progress(math.inf, at, _paths(node)[0], where)
    if len(now) != len(wanted):
        return Progress(math.inf, len(now), "", "the number of its operators depends on its size")
    return Progress(math.inf, math.inf)


def _numbers(node: Node) -> list[int | float]:
    """Those that it computes with."""
    if not _NUMBERS & {*str(node.target).removesuffix("_").split(".")}:
        return []
    return [each for each in node.args if isinstance(each, int | float)]


def _agrees(shape: Any, expected: Any) -> bool:
    """Whether all sizes that are known in advance are so."""
    if isinstance(expected, list):
        return len(shape) == len(expected) and all(map(_agrees, shape, expected))
    return expected is None or shape == expected


def _called(model: nn.Module, inputs: Inputs) -> tuple[int, str, str]:
    """Runs it: how many calls of modules end, and where and why it fails if it does."""
    ended, open_ = 0, [""]
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, *_: Any) -> None:
        open_.append(names[module])

    def leave(module: nn.Module, *_: Any) -> None:
        nonlocal ended
        ended += 1
        open_.pop()

    with ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        try:
            with torch.no_grad(), evaluation_mode(model):
                call(model, inputs)
        except Exception as error:  # a model may raise anything
            return ended, open_[-1], first_line(error.__cause__ or error)
    return ended, "", ""
