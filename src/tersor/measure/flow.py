"""Flow: which tensor went from which layer to which operator in one run of a network.

Tensors are told apart by identity, one that is written to counting as another from then on. So
"this layer's input is exactly that module's output" is a fact about the run, not a guess by names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tersor.forms.scaling import Scaling
from tersor.measure.running import Watching, evaluating, tensors_in, unfused

RECTIFIERS = frozenset({"relu", "hardtanh", "clamp", "clamp_min", "relu6"})
"""Operators that a runtime computes together with the convolution before them."""

_PASSING = """
view _unsafe_view reshape flatten transpose permute t squeeze unsqueeze expand slice select alias
detach clone contiguous split split_with_sizes unbind constant_pad_nd max_pool1d max_pool2d
max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
"""
PASSING = frozenset(_PASSING.split())
"""Operators that give back values they were given, or zeros."""


@dataclass(eq=False)
class Value:
    """A tensor at one moment.

    operator: the aten operator that made it, "relu"; empty for what was there before
    inputs: of that operator
    uses: (operator, modules around it, what it made), in order
    givers: modules whose output it is, innermost first
    enters: modules whose first input it is, outermost first
    shape: of the tensor
    """

    operator: str = ""
    inputs: tuple[Value, ...] = ()
    uses: list[tuple[str, tuple[nn.Module, ...], tuple[Value, ...]]] = field(default_factory=list)
    givers: list[nn.Module] = field(default_factory=list)
    enters: list[nn.Module] = field(default_factory=list)
    shape: tuple[int, ...] = ()

    def origins(self) -> Iterator[Value]:
        """This value and those it was passed on from."""
        value = self
        yield value
        while value.operator in PASSING and value.inputs:
            value = value.inputs[0]
            yield value


@dataclass(frozen=True)
class Flow:
    """What a run showed. calls: (first input, output) of each call of a module, in order."""

    calls: dict[nn.Module, list[tuple[Value | None, Value | None]]]

    def once(self, module: nn.Module) -> bool:
        """Whether the module ran exactly once."""
        return len(self.calls.get(module, ())) == 1


def watch(model: nn.Module, run: Callable[[], object]) -> Flow:
    """Runs the network once, by `run()`, and says what went where."""
    seeing = _Seeing()
    with evaluating(model), unfused(), ExitStack() as stack:
        for module in model.modules():
            enter = module.register_forward_pre_hook(seeing.entered, with_kwargs=True)
            leave = module.register_forward_hook(seeing.left)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        with seeing:
            run()
    return Flow(seeing.calls)


class _Seeing(Watching):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[nn.Module, list[tuple[Value | None, Value | None]]] = {}
        self._known: dict[int, tuple[Tensor, int, Value]] = {}
        self._scaled: dict[tuple[Value, Scaling], Value] = {}
        self._inside: list[tuple[nn.Module, Value | None]] = []

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tuple(self._value(tensor) for tensor in tensors_in((args, kwargs)))
        out = func(*args, **kwargs)
        operator = func._schema.name.removeprefix("aten::").removesuffix("_")
        # What is written to counts as another version only once this returns.
        given = {id(tensor) for tensor in tensors_in((args, kwargs))}
        made = tuple(
            self._new(tensor, Value(operator, inputs), later=int(id(tensor) in given))
            for tensor in tensors_in(out)
        )
        for value in dict.fromkeys(inputs):
            value.uses.append((operator, tuple(module for module, _ in self._inside), made))
        return out

    def entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(iter((*args, *kwargs.values())), None)
        value = self._value(first) if isinstance(first, Tensor) else None
        if value is not None:
            value.enters.append(module)
        self._inside.append((module, value))

    def left(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _, first = self._inside.pop()
        value = self._value(output) if isinstance(output, Tensor) else None
        if value is not None and first is not None and isinstance(module, Scaling):
            # Layers that share a tensor and its scaling each multiply anew, to the same end.
            value = self._new(output, self._scaled.setdefault((first, module), value))
        # An identity gives what it was given.
        if value is not None and value is not first:
            value.givers.append(module)
        self.calls.setdefault(module, []).append((first, value))

    def _value(self, tensor: Tensor) -> Value:
        known = self._known.get(id(tensor))
        if known is None or known[1] != tensor._version:
            return self._new(tensor, Value())
        return known[2]

    def _new(self, tensor: Tensor, value: Value, later: int = 0) -> Value:
        # Kept, so that no other tensor takes its place in memory.
        self._known[id(tensor)] = (tensor, tensor._version + later, value)
        value.shape = tuple(tensor.shape)
        return value
