"""Takes the arguments of a call apart into the input tensors of a program, and checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersor.errors import ModelError
from tersor.program.program import Fixed, Named, Program, Size, Slot, slots


class Arguments:
    """The signature of a program: names, structure and sizes of what it is called with."""

    def __init__(self, program: Program) -> None:
        """Reads the signature of `program`."""
        self._inputs = dict(program.inputs)
        self._sizes = program.sizes
        self.count = len(slots(program.inputs))

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The input tensors in the program's order; ModelError says what does not match."""
        given = self._named(args, kwargs)
        found: list[Any] = []
        sizes: dict[int, Any] = {}
        for name, tree in self._inputs.items():
            if name in given:
                self._walk(tree, given[name], name, found, sizes)
            elif not _optional(tree):
                raise ModelError(
                    f'input "{name}" is missing; the model was stored with {list(self._inputs)}'
                )
        return found

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self._inputs):
            raise ModelError(
                f"{len(args)} inputs were given; the model was stored with the "
                f"{len(self._inputs)} inputs {list(self._inputs)}"
            )
        given = dict(zip(self._inputs, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise ModelError(f'input "{name}" was given by position and by name; give it once')
            if name in self._inputs:
                given[name] = value
            elif value is not None:
                raise ModelError(
                    f'"{name}" is not an input; the model was stored with {list(self._inputs)}. '
                    "Save it again with example inputs that include it"
                )
        return given

    def _walk(
        self, tree: Any, value: Any, name: str, found: list[Any], sizes: dict[int, Any]
    ) -> None:
        if isinstance(tree, Slot):
            if not isinstance(value, Tensor):
                raise ModelError(f'input "{name}" must be a tensor, not {type(value).__name__}')
            self._check_shape(tree, value, name, sizes)
            found.append(value)
        elif isinstance(tree, Fixed):
            if type(value) is not type(tree.value) or value != tree.value:
                raise ModelError(
                    f'input "{name}" was {tree.value!r} when the model was stored and cannot be '
                    f"{value!r:.60} now; save the model again with that value"
                )
        else:
            for key, part in _branches(tree, value, name):
                self._walk(part, value[key], f"{name}[{key!r}]", found, sizes)

    def _check_shape(self, slot: Slot, tensor: Tensor, name: str, sizes: dict[int, Any]) -> None:
        if tensor.dim() != len(slot.shape):
            raise ModelError(
                f'input "{name}" has {tensor.dim()} dimensions {tuple(tensor.shape)}; '
                f"the model was stored for {len(slot.shape)}"
            )
        for dim, (expected, actual) in enumerate(zip(slot.shape, tensor.shape, strict=True)):
            where = f'dimension {dim} of input "{name}"'
            if isinstance(expected, Size):
                self._check_size(expected, actual, where, sizes)
            elif expected is not None and actual != expected:
                raise ModelError(
                    f"{where} is {actual}; this model was stored for {expected} only, so give it "
                    f"{expected} or save it again with other example inputs"
                )

    def _check_size(self, size: Size, actual: Any, where: str, sizes: dict[int, Any]) -> None:
        if size.factor == 1:
            free = actual - size.offset
        elif (actual - size.offset) % size.factor:
            raise ModelError(f"{where} is {actual}, but must be {size.factor} n + {size.offset}")
        else:
            free = (actual - size.offset) // size.factor
        span = self._sizes[size.symbol]
        if free < span.low or (span.high is not None and free > span.high):
            least = span.low * size.factor + size.offset
            most = "" if span.high is None else f"..{span.high * size.factor + size.offset}"
            raise ModelError(
                f"{where} is {actual}; the model works for {least}{most or ' and more'}"
            )
        if sizes.setdefault(size.symbol, free) != free:
            raise ModelError(
                f"{where} is {actual}, which does not agree with the other inputs; "
                f"expected {sizes[size.symbol] * size.factor + size.offset}"
            )


def _optional(tree: Any) -> bool:
    """Whether nothing in `tree` has to be given."""
    return not slots(tree)


def _branches(tree: Any, value: Any, name: str) -> list[tuple[Any, Any]]:
    if isinstance(tree, Named):
        if not isinstance(value, Mapping) or set(value) != set(tree.fields):
            raise ModelError(f'input "{name}" must be a dict with the keys {list(tree.fields)}')
        return list(tree.fields.items())
    if not isinstance(value, list | tuple) or len(value) != len(tree):
        raise ModelError(f'input "{name}" must be a list or tuple of {len(tree)}')
    return list(enumerate(tree))
