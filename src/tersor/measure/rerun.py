"""Running a pass again after one weight has changed, computing only what depends on that weight.

The first run notes every aten operator: which storages it reads and writes, and the layout of what
it returns. From that follows which operators a weight can reach; the others are skipped and give
back what they gave before, so the outputs are those of a full run, bit for bit. On average half of
a network comes before the changed layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tersor.measure.running import Watching, tensors_in


@dataclass(slots=True)
class _Layout:
    """How a tensor lies in its storage; `argument` where the operator returned that argument."""

    storage: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    argument: int | None


@dataclass(slots=True)
class _Operator:
    function: Any
    reads: frozenset[int]
    writes: frozenset[int]
    makes: frozenset[int]
    output: Any
    only_tensors: bool


@dataclass
class _Plan:
    """What to do again when the storage `weight` changes.

    runs: for each operator, whether the weight reaches it
    cut: storages that those read and the others make; kept: their content
    rewritten: storages that those write into
    """

    weight: int
    runs: list[bool] = field(default_factory=list)
    cut: set[int] = field(default_factory=set)
    rewritten: set[int] = field(default_factory=set)
    kept: dict[int, torch.UntypedStorage] = field(default_factory=dict)


class Rerun:
    """A pass that can be repeated for one changed weight at a time.

    reference: what the first run gave
    """

    def __init__(self, run: Callable[[], Tensor]) -> None:
        """Runs once. Each `run` must do the same operators, in evaluation, without gradients."""
        self._run = run
        self._trace = _Trace()
        before = _random_states()
        with self._trace:
            self.reference = run()
        self._trace.finish(self.reference)
        if not all(map(torch.equal, before, _random_states())):
            # A skipped operator would not draw its random numbers.
            self._trace.sound = False
        self._plan: _Plan | None = None

    def prepare(self, weight: Tensor | None) -> None:
        """Gets ready for changes of `weight`, as it is now; None if it is not a stored tensor."""
        key = None if weight is None else self._trace.known.get(_address(weight))
        if self._plan is not None and self._plan.weight == key:
            return
        self._plan = None
        if key is None or not self._trace.sound:
            return
        plan = self._trace.plan(key)
        try:
            if plan.cut:
                with _Skipping(self._trace, plan, capture=True):
                    self._run()
        except Exception:
            # Whatever a model does with a tensor that was not computed, a full run will not do.
            self._trace.sound = False
            return
        self._plan = plan if plan.cut <= plan.kept.keys() else None

    def __call__(self) -> Tensor:
        """The outputs now."""
        if self._plan is not None:
            try:
                with _Skipping(self._trace, self._plan, capture=False):
                    return self._run()
            except Exception:
                # The model took another path; if the error is its own, the full run shows it.
                self._trace.sound, self._plan = False, None
        return self._run()


class _OtherwiseError(Exception):
    """The model does other operators than it did at first."""


class _Trace(Watching):  # type: ignore[no-untyped-call]
    """Notes operators. Storages have numbers, since addresses are used again."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[_Operator] = []
        self.known: dict[int, int] = {}
        self.outside: dict[int, torch.UntypedStorage] = {}
        self.result: frozenset[int] = frozenset()
        self.sound = True
        self._count = 0

    def finish(self, result: Tensor) -> None:
        """Notes the result and forgets the addresses of what the pass made."""
        self.result = frozenset({self._number(result)})
        self.known = {storage._cdata: number for number, storage in self.outside.items()}

    def plan(self, weight: int) -> _Plan:
        """Which operators the storage `weight` reaches."""
        plan, reached, read, free = _Plan(weight), {weight}, set[int](), False
        for op in self.operators:
            runs = free or bool(op.reads & reached) or bool(op.writes & read)
            plan.runs.append(runs)
            if runs:
                plan.cut |= op.reads - reached
                plan.rewritten |= op.writes
                read |= op.reads
                reached |= op.makes | op.writes
                # A number taken from a tensor may steer the model, so nothing is skipped after it.
                free = free or not op.only_tensors
        plan.cut |= self.result - reached
        plan.cut -= self.outside.keys()
        return plan

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reads = frozenset(self._number(t) for t in tensors_in((args, kwargs)))
        writes = frozenset(self._number(t) for t in _written(func, args, kwargs))
        out = func(*args, **kwargs)
        if writes & self.outside.keys() or func in _RESEATING:
            self.sound = False
        made = [tensor for tensor in tensors_in(out) if _address(tensor) not in self.known]
        makes = frozenset(self._new(tensor) for tensor in made)
        output = _mapped(out, lambda tensor: self._layout(tensor, args))
        plain = all(isinstance(leaf, _Layout) for leaf in _leaves(output))
        self.operators.append(_Operator(func, reads, writes, makes, output, plain))
        return out

    def _number(self, tensor: Tensor) -> int:
        """The number of its storage; one not made in this pass is from outside, and kept."""
        if tensor.layout != torch.strided:
            self.sound = False
            return -1
        number = self.known.get(_address(tensor))
        if number is None:
            number = self.known[_address(tensor)] = self._count
            self.outside[number] = tensor.untyped_storage()
            self._count += 1
        return number

    def _new(self, tensor: Tensor) -> int:
        if tensor.layout != torch.strided:
            self.sound = False
            return -1
        storage, number = tensor.untyped_storage(), self._count
        if storage._cdata in self.known:
            return self.known[storage._cdata]
        self.known[storage._cdata] = number
        self._count += 1
        weakref.finalize(storage, self.known.pop, storage._cdata, None).atexit = False
        return number

    def _layout(self, tensor: Tensor, args: tuple[Any, ...]) -> _Layout:
        same = next((i for i, argument in enumerate(args) if argument is tensor), None)
        strided = tensor.layout == torch.strided
        return _Layout(
            self._number(tensor),
            int(tensor.storage_offset()) if strided else 0,
            tensor.shape,
            tensor.stride() if strided else (),
            tensor.dtype,
            tensor.device,
            same,
        )


class _Skipping(Watching):  # type: ignore[no-untyped-call]
    """Runs what the weight reaches; or, to capture what that needs, everything else."""

    def __init__(self, trace: _Trace, plan: _Plan, *, capture: bool) -> None:
        super().__init__()
        self._operators, self._plan, self._capture, self._at = trace.operators, plan, capture, 0
        # What the operators that run would write into must be new for each run.
        copied = set() if capture else plan.rewritten & plan.kept.keys()
        copies = {n: plan.kept[n].clone() for n in copied}  # type: ignore[no-untyped-call]
        self._storages = {**trace.outside, **plan.kept, **copies}

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        at, self._at = self._at, self._at + 1
        if at >= len(self._operators):
            raise _OtherwiseError
        op = self._operators[at]
        if op.function is not func:
            raise _OtherwiseError
        if self._plan.runs[at] == self._capture:
            if type(op.output) is _Layout:
                return self._given(op.output, args)
            return _mapped(op.output, lambda layout: self._given(layout, args), _Layout)
        out = func(*args, **kwargs)
        if self._capture:
            self._keep(op, out)
        elif isinstance(out, Tensor) and out.shape != op.output.shape:
            raise _OtherwiseError
        return out

    def _given(self, layout: _Layout, args: tuple[Any, ...]) -> Tensor:
        """The tensor as it was, or where nobody will read it, one that only looks like it."""
        if layout.argument is not None:
            given: Tensor = args[layout.argument]
            return given
        storage = self._storages.get(layout.storage)
        if storage is None:
            return torch.empty_strided(
                layout.shape, layout.stride, dtype=layout.dtype, device=layout.device
            )
        empty = torch.empty(0, dtype=layout.dtype, device=layout.device)
        return empty.set_(storage, layout.offset, layout.shape, layout.stride)

    def _keep(self, op: _Operator, out: Any) -> None:
        for tensor, layout in zip(tensors_in(out), _leaves(op.output), strict=False):
            if layout.storage in self._plan.cut and layout.storage in op.makes:
                self._plan.kept[layout.storage] = tensor.untyped_storage()


def _random_states() -> list[Tensor]:
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if started else []
    return [torch.get_rng_state(), *cuda]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    if func._schema.is_mutable:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                yield from tensors_in(given)


def _mapped(tree: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, tuple | list):
        return type(tree)(_mapped(part, function, kind) for part in tree)
    return tree


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, tuple | list):
        for part in tree:
            yield from _leaves(part)
    elif tree is not None:
        yield tree


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -1


_RESEATING = {
    torch.ops.aten.set_.source_Tensor,
    torch.ops.aten.set_.source_Storage,
    torch.ops.aten.set_.source_Storage_storage_offset,
    torch.ops.aten.resize_.default,
}
