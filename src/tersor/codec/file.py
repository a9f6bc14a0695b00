"""Saving a model as one .tersor file, and loading it with or without its code."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tersor.codec.container import Text, about, canonical, opened, read_text, write
from tersor.codec.containers import skeleton
from tersor.codec.contents import Shelf, collect, read_tensors, rebuild
from tersor.codec.header import Entry, Header, as_json, coding_json
from tersor.codec.header_reader import parse
from tersor.codec.interpreter import Interpreted
from tersor.codec.into import check_complete, place
from tersor.codec.pack import Unreadable
from tersor.codec.program import Program
from tersor.codec.trace import trace
from tersor.errors import CompressError, ExportError, FileError, OptionError
from tersor.forms import Form
from tersor.recipe import Recipe, recipe_of
from tersor.surgery.hold import decoded, held, hold, release_all

Example = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]
Read = tuple[Header, list[Tensor | Form], Program | None]

TOLERANCE = 1e-6
"""Largest difference, relative to the largest output, that a stored graph may show in float32."""


def save(
    model: nn.Module,
    path: str | Path,
    *,
    example: Example | None = None,
    graph: bool | Program = True,
    recipe: Recipe | Sequence[Mapping[str, Any]] | None = None,
    metrics: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `model` to `path` as one file, whole or not at all. Equal models give equal bytes.

    example: inputs to trace the forward pass with: a tensor, a tuple, a dict, or (args, kwargs).
        With them the file can be loaded without the model's code
    graph: False stores the weights alone, for `load(path, into=...)`; a program of `program_of` is
        stored as it is, which saves tracing a network again for each way of storing it
    recipe: what was done to the model; by default the steps noted on it
    metrics, provenance: mappings of JSON values to keep with it

    Raises ExportError for a model whose forward pass cannot be stored, ModelError for weights that
    are not finite, OutputError where the file cannot be written.
    """
    path = Path(path)
    notes = {
        "recipe": _steps(recipe_of(model) if recipe is None else recipe),
        "metrics": _noted("metrics", metrics),
        "provenance": _noted("provenance", provenance),
    }
    shelf = Shelf()
    # Before tracing, which would fail in less clear words on weights that are not finite.
    entries = collect(model, shelf)
    program = graph if isinstance(graph, Program) else _program(model, example) if graph else None
    constants = [] if program is None else [(n, shelf.put(t)) for n, t in program.constants.items()]
    write(
        path,
        as_json(entries, constants, notes),
        b"" if program is None else program.to_json(),
        ((coding_json(coding), streams) for coding, streams in shelf.chunks()),
    )
    return path


def load(path: str | Path, *, into: nn.Module | None = None) -> nn.Module:
    """Rebuilds the model in `path`, in evaluation mode, with its recipe and metrics noted on it.

    into: a module of the model's own class, on any device or the meta device, that takes the
        weights; without it the stored graph is run, and no code of the model is needed

    Raises FileError for a file that is damaged, hostile, too new, or does not fit `into`.
    """
    path = Path(path)
    with about(path):
        header, items, program = _read(path)
        if into is not None:
            place(into, zip(header.entries, items, strict=True))
            check_complete(into)
            model = into
        elif program is None:
            raise FileError(
                "was saved without a graph (no example inputs, or graph=False), so it needs the "
                "model's code; load it with load(path, into=your_model)"
            )
        else:
            model = _assembled(header.entries, items, program)
        _note(model, header)
    return model.eval()


def read_header(path: str | Path) -> Header:
    """What the file says about itself, without reading its tensors."""
    path = Path(path)
    with about(path), opened(path) as (file, size):
        return parse(read_text(file, size))


def verify(path: str | Path) -> Header:
    """Reads and checks everything in the file: checksums, tensors, forms and graph."""
    path = Path(path)
    with about(path):
        header, items, program = _read(path)
        if program is not None:
            _assembled(header.entries, items, program)
        _recipe(header)
    return header


def _program(model: nn.Module, example: Example | None) -> Program | None:
    if example is None:
        return _own_program(model) if isinstance(model, Interpreted) else None
    return program_of(model, example)


def program_of(model: nn.Module, example: Example) -> Program:
    """Traces the forward pass of `model` and checks it on the example. Raises ExportError."""
    args, kwargs = call_arguments(example)
    dense = release_all(copy.deepcopy(model)) if next(held(model), None) else model
    program = trace(dense, args, kwargs)
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), decoded(model.eval()):
            expected = model(*_copied(args), **_copied(kwargs))
            found = Interpreted(program, dense)(*_copied(args), **_copied(kwargs))
    finally:
        for module, mode in training.items():
            module.training = mode
    _compare(expected, found, type(model).__name__)
    return program


def _own_program(model: Interpreted) -> Program:
    """The program that `model` runs, with its constants and type as they are now."""
    stored = model._program_constants
    names = model.program.constant_names
    constants: dict[str, Tensor] = {n: getattr(stored, f"c{i}") for i, n in enumerate(names)}
    dtype = getattr(model, "_program_like").dtype  # noqa: B009 - not typed on nn.Module
    return dataclasses.replace(model.program, constants=constants, dtype=dtype)


def call_arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call with one batch of inputs."""
    if isinstance(example, dict):
        return (), example
    if isinstance(example, tuple | list):
        pair = len(example) == 2 and isinstance(example[0], tuple | list)
        if pair and isinstance(example[1], dict):
            return tuple(example[0]), example[1]
        return tuple(example), {}
    return (example,), {}


def _copied(inputs: Any) -> Any:
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


def _compare(expected: Any, found: Any, name: str) -> None:
    wanted = [x for x in pytree.tree_leaves(expected) if isinstance(x, Tensor)]
    given = [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)]
    for number, (x, y) in enumerate(zip(wanted, given, strict=False)):
        if not x.is_floating_point() or not x.numel():
            continue
        allowed = max(TOLERANCE, 8 * torch.finfo(x.dtype).eps) * float(x.double().abs().max())
        gap = float((x.double() - y.double()).abs().max())
        if gap > allowed:
            raise ExportError(
                f"the stored graph of {name} gives output {number} with an error of {gap:.3g}, "
                f"above {allowed:.3g}; store the weights alone with graph=False"
            )


def _read(path: Path) -> Read:
    with opened(path) as (file, size):
        text: Text = read_text(file, size)
        header = parse(text)
        tensors = read_tensors(file, text, header)
    items, constants = rebuild(header, tensors)
    program = Program.from_json(text.program, constants) if text.program else None
    return header, items, program


def _assembled(entries: Sequence[Entry], items: list[Tensor | Form], program: Program) -> nn.Module:
    """The skeleton of the saved model, its tensors, and the program that runs on them."""
    tensors = {
        # A form's place is kept by one number seen in the weight's shape.
        name: item if isinstance(item, Tensor) else torch.empty(()).expand(item.shape)
        for entry, item in zip(entries, items, strict=True)
        for name in entry.names
    }
    try:
        model = Interpreted(program, skeleton(tensors, program.kinds, program.buffers))
        for entry, item in zip(entries, items, strict=True):
            if isinstance(item, Form):
                for name in entry.names:
                    layer, _, leaf = name.rpartition(".")
                    hold(model.get_submodule(layer), leaf, item)
    except (AttributeError, KeyError, TypeError, RuntimeError, CompressError) as error:
        raise Unreadable(f"its graph and its tensors do not fit together: {error}") from None
    return model


def _note(model: nn.Module, header: Header) -> None:
    notes = {"recipe": _recipe(header), "metrics": dict(header.metrics)}
    for name, value in notes.items():
        # A module of the user may have a `metrics` of its own, which stays.
        if name == "recipe" or not hasattr(model, name):
            setattr(model, name, value)


def _recipe(header: Header) -> Recipe:
    try:
        return Recipe.from_json(header.recipe)
    except OptionError as error:
        raise Unreadable(f"its recipe cannot be read: {error}") from None


def _steps(recipe: Recipe | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    steps = recipe if isinstance(recipe, Recipe) else Recipe.from_json(list(recipe))
    _check_json("recipe", steps.as_json())
    return steps.as_json()


def _noted(option: str, notes: Mapping[str, Any] | None) -> dict[str, Any]:
    _check_json(option, dict(notes or {}))
    return dict(notes or {})


def _check_json(option: str, value: Any) -> None:
    try:
        canonical(value)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"{option}={value!r:.80} cannot be written as JSON ({error}); use numbers, texts, "
            "lists and dicts, none of them NaN"
        ) from None
