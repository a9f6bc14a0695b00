"""Saving a model as one .tersor file, and loading it with or without its code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tersor.codec.assemble import assembled, check_rebuildable
from tersor.codec.container import Text, about, canonical, opened, read_text, write
from tersor.codec.contents import Shelf, collect, read_tensors, rebuild
from tersor.codec.header import Header, as_json, coding_json
from tersor.codec.header_reader import parse
from tersor.codec.into import check_complete, place
from tersor.codec.pack import Unreadable
from tersor.errors import FileError, ModelError, OptionError
from tersor.forms import Form
from tersor.program.interpreter import Interpreted
from tersor.program.of_model import Example, own_program, program_of
from tersor.program.program import Program
from tersor.recipe import Recipe, recipe_of

Read = tuple[Header, list[Tensor | Form], Program | None]


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
    """Writes `model` to `path` as one file, whole or not at all.

    Equal models, traced at equal sizes, give equal bytes.

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
    if program is not None:
        check_rebuildable(entries, program, type(model).__name__)
    constants = [] if program is None else [(n, shelf.put(t)) for n, t in program.constants.items()]
    write(
        path,
        as_json(entries, constants, notes),
        b"" if program is None else program.to_json(),
        ((coding_json(coding), streams) for coding, streams in shelf.chunks()),
        _check_readable,
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
                "it was saved without a graph (no example inputs, or graph=False), so it needs the "
                "model's code; load it with load(path, into=your_model)"
            )
        else:
            model = assembled(header.entries, items, program)
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
            assembled(header.entries, items, program)
        _recipe(header)
    return header


def _check_readable(draft: Path) -> None:
    """A file that `load` would refuse must not be written either."""
    try:
        with opened(draft) as (file, size):
            parse(read_text(file, size))
    except Unreadable as error:
        raise ModelError(
            f"the model would make a file that nobody may read: {error}; store it in several files"
        ) from None


def _program(model: nn.Module, example: Example | None) -> Program | None:
    if example is None:
        return own_program(model) if isinstance(model, Interpreted) else None
    return program_of(model, example)


def _read(path: Path) -> Read:
    with opened(path) as (file, size):
        text: Text = read_text(file, size)
        header = parse(text)
        tensors = read_tensors(file, text, header)
    items, constants = rebuild(header, tensors)
    program = Program.from_json(text.program, constants) if text.program else None
    return header, items, program


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
