"""Turns a model into a stored program, through `torch.export`.

What exports: networks whose control flow depends on the sizes of their inputs at most. What does
not: control flow on tensor values, random numbers or buffer updates in evaluation mode, operators
outside the allowlist, and outputs that are no tensors, numbers or containers of these.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental import _config as symbolic_config

from tersor.errors import CompressError, ExportError
from tersor.program.call import Call, Untraceable, call_of
from tersor.program.graph import Writer
from tersor.program.interpreter import Interpreted
from tersor.program.operators import CONSTANT, WEIGHT
from tersor.program.program import Named, Program, Ref, Size, slots
from tersor.program.rules import BrokenRule, check_program
from tersor.program.sizes import Sizes
from tersor.surgery.recurrent import whole_recurrences

WAY_OUT = (
    "save(..., graph=False) stores the weights alone; load them with load(path, into=your_model)"
)
TOLERANCE = 1e-4
"""Largest difference to the model, relative to its largest output, that a program may show."""


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool = True,
) -> Program:
    """The forward pass of `model` in evaluation mode as plain data.

    args, kwargs: example inputs; their values do not matter, their structure does
    dynamic: let batch size and lengths vary where the model does; what could not vary is said in
        `Program.static`

    The program is run against the model on the examples and, when the batch size is free, on one
    row of them and on all of them twice. Raises ExportError with the reason when it cannot be done.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _quiet(), torch.no_grad():
            return _traced(*call_of(model, args, dict(kwargs or {})), dynamic=dynamic)
    finally:
        for module, training in modes.items():
            module.training = training


def _traced(call: Call, tensors: list[Tensor], *, dynamic: bool) -> Program:
    name = type(call.model).__name__
    try:
        call(*_copies(tensors))
    except Untraceable as error:
        raise ExportError(f"{name} cannot be stored as a graph: {error}; {WAY_OUT}") from None
    except CompressError:
        raise
    except Exception as error:
        raise ExportError(
            f"{name} fails on the example inputs: {_first_line(error)}; give inputs that it accepts"
        ) from error
    reasons: list[str] = []
    for free, oblivious in _ATTEMPTS if dynamic else _ATTEMPTS[-1:]:
        try:
            program = _converted(_exported(call, tensors, free, oblivious), call, len(tensors))
            check_program(program)
            _compare(call, program, tensors)
        except (Untraceable, BrokenRule) as error:
            reasons.insert(0, str(error))
            break
        except Exception as error:  # torch.export raises many types
            reasons.append(_first_line(error))
        else:
            return program
    raise ExportError(f"{name} cannot be stored as a graph: {reasons[0]}; {WAY_OUT}")


# Which dimensions may vary, tried in turn: all, the first two, the first, none. The first attempt
# also asks torch.export not to treat a size of 1 as special.
_ATTEMPTS: tuple[tuple[Callable[[int], bool], bool], ...] = (
    (lambda dim: True, True),
    (lambda dim: True, False),
    (lambda dim: dim < 2, False),
    (lambda dim: dim < 1, False),
    (lambda dim: False, False),
)


def _exported(
    call: Call, tensors: list[Tensor], free: Callable[[int], bool], oblivious: bool
) -> ExportedProgram:
    kinds = {True: Dim.AUTO, False: Dim.STATIC}
    shapes = tuple(tuple(kinds[free(dim)] for dim in range(x.dim())) for x in tensors)
    with ExitStack() as stack:
        stack.enter_context(whole_recurrences())
        if oblivious:
            stack.enter_context(symbolic_config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined]
        return torch.export.export(
            call, tuple(_copies(tensors)), dynamic_shapes=(shapes,), strict=False
        )


def _converted(exported: ExportedProgram, call: Call, inputs: int) -> Program:
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        changed = next(iter(signature.buffers_to_mutate.values())).removeprefix("model.")
        raise Untraceable(f'it updates its buffer "{changed}" in evaluation mode')
    dtype = next((p.dtype for p in call.model.parameters() if p.is_floating_point()), torch.float32)
    writer = Writer(inputs, dtype)
    canonical = _canonical_names(call.model)
    tensors: dict[str, Tensor] = {}
    given: list[Any] = []
    for spec in signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            given.append(Ref(sum(isinstance(value, Ref) for value in given)))
            continue
        target = str(spec.target)
        if spec.kind is InputKind.PARAMETER or (spec.kind is InputKind.BUFFER and spec.persistent):
            name = target.removeprefix("model.")
            given.append(writer.fetch(WEIGHT, canonical.get(name, name)))
        elif isinstance(exported.constants.get(target), Tensor):
            tensors[target] = exported.constants[target]
            given.append(writer.fetch(CONSTANT, target))
        else:
            raise Untraceable(f"it uses {target}, a {spec.kind.name.lower()} that is no tensor")
    leaves = writer.walk(exported.graph_module, given)
    constants = {f"constant_{i}": tensors[t] for i, t in enumerate(writer.fetched[CONSTANT])}
    sizes = Sizes(exported, call, dtype)
    return Program(
        inputs=sizes.inputs,
        sizes=tuple(sizes.spans),
        weights=tuple(writer.fetched[WEIGHT]),
        constant_names=tuple(constants),
        nodes=tuple(writer.nodes),
        output=_placed(call.outputs, leaves),
        kinds=_kinds(call.model),
        buffers=_buffers(call.model),
        static=(*sizes.static, *call.omitted),
        dtype=dtype,
        constants={name: tensor.detach().clone() for name, tensor in constants.items()},
    )


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Each name of a tensor -> the first name of the same tensor."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def _kinds(model: nn.Module) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if module._parameters or _persistent(module):
            kinds[path] = str(getattr(module, "kind", "") or type(module).__name__)
    return kinds


def _buffers(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{path}.{leaf}".removeprefix(".")
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf in _persistent(module)
    )


def _persistent(module: nn.Module) -> list[str]:
    return [
        name
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _placed(tree: Any, leaves: list[Any]) -> Any:
    """The tree of outputs with each leaf replaced by the program's value."""
    match tree:
        case Ref():
            return leaves[tree.index]
        case Named():
            parts = {name: _placed(part, leaves) for name, part in tree.fields.items()}
            return Named(parts, record=tree.record)
        case list() | tuple():
            return type(tree)([_placed(part, leaves) for part in tree])
    return tree


def _compare(call: Call, program: Program, tensors: list[Tensor]) -> None:
    """Runs model and program on the examples, one row of them, and all of them twice."""
    rebuilt = Call(Interpreted(program, call.model), call.inputs)
    batches = [tensors]
    if _rows_are_free(program, tensors):
        batches += [[x[:1] for x in tensors], [torch.cat([x, x]) for x in tensors]]
    for batch in batches:
        pairs = zip(call(*_copies(batch)), rebuilt(*_copies(batch)), strict=True)
        for number, (wanted, found) in enumerate(pairs):
            _compare_output(number, torch.as_tensor(wanted), torch.as_tensor(found))


def _rows_are_free(program: Program, tensors: list[Tensor]) -> bool:
    shapes = [slot.shape for tree in program.inputs.values() for slot in slots(tree)]
    free = all(shape and isinstance(shape[0], Size) for shape in shapes)
    return free and len({x.shape[0] for x in tensors}) == 1


def _compare_output(number: int, wanted: Tensor, found: Tensor) -> None:
    if wanted.shape != found.shape:
        raise RuntimeError(
            f"output {number} of its graph is {tuple(found.shape)}, not {tuple(wanted.shape)}"
        )
    if not torch.allclose(wanted, found, rtol=0, atol=_allowed(wanted), equal_nan=True):
        gap = (wanted.double() - found.double()).abs().max().item()
        raise RuntimeError(f"output {number} of its graph differs from the model's by {gap:.3g}")


def _allowed(wanted: Tensor) -> float:
    finite = wanted.double()[wanted.isfinite()] if wanted.numel() else wanted
    return TOLERANCE * float(finite.abs().max()) if finite.numel() else 0.0


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    # A model may change its inputs in place; the examples belong to the caller.
    return [tensor.detach().clone() for tensor in tensors]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "data-dependent" in lines[0]:
        return "its control flow is data-dependent: it decides by values, not by sizes alone"
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps away what torch.export says of sizes (`static` says it), and the graphs it prints."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
