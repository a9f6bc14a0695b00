"""Saving a model as one .tersor file, and loading it with or without its code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tersor.codec.assemble import assembled, check_rebuildable
from tersor.codec.base import Base
from tersor.codec.chunks import THREADS, read_leaves
from tersor.codec.container import canonical, read_text, write
from tersor.codec.contents import collect, named, rebuild
from tersor.codec.errors import Unreadable, about
from tersor.codec.header import Entry, Header, Plain, Run, as_json, typed
from tersor.codec.header_reader import STRUCTURE, parse
from tersor.codec.into import check_complete, place
from tersor.codec.leaves import all_leaves
from tersor.codec.pack import as_tensor
from tersor.codec.runs import PROFILES, check_profile, encoded
from tersor.codec.shelf import Shelf
from tersor.codec.source import Pipe, Place, check_apart, name_of, opened
from tersor.errors import FileError, ModelError, OptionError
from tersor.forms import Form
from tersor.program.interpreter import Interpreted
from tersor.program.of_model import Example, own_program, program_of
from tersor.program.program import Program
from tersor.recipe import Recipe, recipe_of
from tersor.surgery.structure import Structure, note, structure_of

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
    profile: str = "small",
    base: Place | None = None,
) -> Path:
    """Writes `model` to `path` as one file, whole or not at all.

    Equal models, traced at equal sizes, give equal bytes.

    example: inputs to trace the forward pass with: a tensor, a tuple, a dict, or (args, kwargs).
        With them the file can be loaded without the model's code
    graph: False stores the weights alone, for `load(path, into=...)`; a program of `program_of` is
        stored as it is, which saves tracing a network again for each way of storing it
    recipe: what was done to the model; by default the steps noted on it
    metrics, provenance: mappings of JSON values to keep with it
    profile: "fast" to load, "small", or "max" for the smallest file; all hold the same numbers
    base: a file of an earlier state of the model; what has changed since is stored as changes, and
        the file can only be loaded beside it

    Raises ExportError for a model whose forward pass cannot be stored, ModelError for weights that
    are not finite, OutputError where the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{model!r:.60} is not a torch.nn.Module; save the network itself, or tensors by their "
            "names with tersor.codec.save_tensors"
        )
    check_profile(profile)
    notes: dict[str, Any] = {
        "recipe": _steps(recipe_of(model) if recipe is None else recipe),
        STRUCTURE: structure_of(model).as_json(),
        "metrics": _noted("metrics", metrics),
        "provenance": _noted("provenance", provenance),
    }
    # Before tracing, which would fail in less clear words on weights that are not finite.
    entries, tensors = collect(model)
    program = graph if isinstance(graph, Program) else _program(model, example) if graph else None
    if program is not None:
        check_rebuildable(entries, program, type(model).__name__)
    return _written(Path(path), entries, tensors, program, notes, profile, base, _check_readable)


def save_tensors(
    items: Mapping[str, Tensor | Form],
    path: str | Path,
    *,
    recipe: Recipe | Sequence[Mapping[str, Any]] = (),
    provenance: Mapping[str, Any] | None = None,
    profile: str = "small",
    base: Place | None = None,
    check: Callable[[Path], None] | None = None,
    coded: Callable[[str], None] | None = None,
) -> Path:
    """Writes tensors and forms by their names, without a network around them.

    Tensors may hold anything, NaN too. They are read when their turn comes, so that they may be
    parts of files larger than memory. `load(path, into=...)` puts them into a network that has
    tensors of these names.

    recipe, provenance, profile, base: as in `save`
    check: is given the finished file before it takes its name, and raises where it must not
    coded: is given the name of each tensor once its elements, or a part of them, need no longer be
        at hand
    """
    check_profile(profile)
    notes = {"recipe": _steps(recipe), "provenance": _noted("provenance", provenance)}
    entries, tensors = named(items)

    def checked(draft: Path) -> None:
        _check_readable(draft)
        if check is not None:
            check(draft)

    return _written(Path(path), entries, tensors, None, notes, profile, base, checked, coded)


def _written(
    path: Path,
    entries: list[Entry],
    tensors: list[Tensor],
    program: Program | None,
    notes: dict[str, Any],
    profile: str,
    base: Place | None,
    check: Callable[[Path], None],
    coded: Callable[[str], None] | None = None,
) -> Path:
    check_apart(path, [base], f"{path} is its own base, without which nobody could read it")
    constants: Mapping[str, Tensor] = {}
    if program is not None:
        constants = dict(sorted(program.constants.items()))
    plain = [(name, Plain(tuple(tensor.shape), 0)) for name, tensor in constants.items()]
    earlier = None if base is None else Base(base)
    leaves = list(all_leaves(entries, plain))
    shelf = Shelf(leaves, [*tensors, *constants.values()], profile, earlier)
    entries, plain = typed(entries, plain, shelf.kind_of)
    if shelf.changed and earlier is not None:
        notes = notes | {"base": earlier.header.identity}
    write(
        path,
        as_json(entries, plain, shelf.kinds, notes),
        b"" if program is None else program.to_json(),
        _runs(shelf, profile, coded),
        check,
        features=int(shelf.changed),
    )
    return path


def _runs(
    shelf: Shelf, profile: str, coded: Callable[[str], None] | None
) -> Iterator[tuple[Run, list[bytes]]]:
    for run in shelf.runs:
        yield encoded(run, PROFILES[profile])
        if coded is not None:
            for item in run.items:
                coded(item.leaf.name)


def load(
    path: Place,
    *,
    into: nn.Module | None = None,
    base: Place | None = None,
    threads: int = THREADS,
) -> nn.Module:
    """Rebuilds the model in `path`, in evaluation mode, with its recipe and metrics noted on it.

    path: of the file; or a binary file, from its start on; a pipe; `Ranges` of a remote file
    into: a module of the model's own class, on any device or the meta device, that takes the
        weights; without it the stored graph is run, and no code of the model is needed
    base: the file that it was saved with as its base, where there was one
    threads: that decode; the result is the same for any number

    Raises FileError for a file that is damaged, hostile, too new, or does not fit `into`.
    """
    with about(name_of(path)):
        header, items, program = _read(path, threads, base)
        if into is not None:
            place(into, zip(header.entries, items, strict=True), _structure(header))
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
        note(model, _structure(header))
    return model.eval()


def read_header(path: Place) -> Header:
    """What the file says about itself, without reading its tensors."""
    with about(name_of(path)), opened(path) as source:
        return parse(read_text(source))


def verify(path: Place, *, base: Place | None = None) -> Header:
    """Reads and checks everything in the file: checksums, tensors, forms and graph."""
    with about(name_of(path)):
        header, items, program = _read(path, THREADS, base)
        if program is not None:
            assembled(header.entries, items, program)
        _recipe(header)
        _structure(header)
    return header


def _check_readable(draft: Path) -> None:
    """A file that `load` would refuse must not be written either."""
    try:
        with open(draft, "rb") as file:
            parse(read_text(Pipe(file)))
    except Unreadable as error:
        raise ModelError(
            f"the model would make a file that nobody may read: {error}; store it in several files"
        ) from None


def _program(model: nn.Module, example: Example | None) -> Program | None:
    if example is None:
        return own_program(model) if isinstance(model, Interpreted) else None
    return program_of(model, example)


def _read(path: Place, threads: int, base: Place | None) -> Read:
    with opened(path) as source:
        text = read_text(source)
        header = parse(text)
        wanted = dict.fromkeys(range(len(header.leaves)))
        arrays = read_leaves(source, header, wanted, threads, base)
    tensors = [
        as_tensor(array, header.dtype(leaf.plain), leaf.plain.shape)
        for leaf, array in zip(header.leaves, arrays.values(), strict=True)
    ]
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


def _structure(header: Header) -> Structure:
    try:
        return Structure.from_json(header.structure)
    except ModelError as error:
        raise Unreadable(str(error)) from None


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
