"""Data as the command line names them: `kind:path?option=value&option=value`.

file.py:factory, package.module:factory   Python code that is run and gives a Task
npz:path                                  arrays x_test, y_test, x_train, y_train, or x, y
csv:path                                  .csv, .tsv or .parquet: a table, texts or sentence pairs
hf:path                                   a folder that Hugging Face datasets saved, read like csv
text:path                                 plain text for a language model
imagefolder:path                          one folder of pictures per class, in test/ and train/
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tersor.errors import OptionError, TaskError
from tersor.sources.code import made_by
from tersor.task import (
    Task,
    classification,
    image_classification,
    image_folder,
    language_model,
    npz_splits,
    read_pairs,
    regression,
    sentence_pairs,
    tabular,
    text_classification,
)

Options = dict[str, str]


def open_task(spec: str, *, tokenizer: Path | None = None) -> Task:
    """The task that `spec` names.

    tokenizer: folder to take a tokenizer from when the options name none

    Raises TaskError for data that cannot be used, OptionError for options that do not fit.
    """
    kind, _, rest = spec.partition(":")
    if kind in KINDS and rest:
        place, options = _parsed(rest)
        if tokenizer is not None:
            options.setdefault("tokenizer", str(tokenizer))
        reader, known = KINDS[kind]
        unknown = options.keys() - known - {"tokenizer"}
        if unknown:
            raise OptionError(
                f"{kind}: has no option {sorted(unknown)[0]!r}; its options are {sorted(known)}"
            )
        return reader(Path(place), options)
    if kind in KINDS:
        raise TaskError(f"{spec} names no file; write {kind}:path")
    if not spec.partition(":")[2] and Path(spec).suffix in _SUGGESTED:
        raise TaskError(f"{spec} needs its kind in front: {_SUGGESTED[Path(spec).suffix]}:{spec}")
    if ":" not in spec and not spec.endswith(".py"):
        kinds = ", ".join(f"{kind}:path" for kind in KINDS)
        raise TaskError(f"{spec} is no data; write file.py:task_factory, or {kinds}")
    task = made_by(spec, TaskError)
    if not isinstance(task, Task):
        raise TaskError(
            f"{spec} gave {type(task).__name__}, not a tersor.Task; make one with tersor.task, for "
            "example classification(test=(inputs, labels))"
        )
    return task


def _npz(path: Path, options: Options) -> Task:
    kind = options.get("kind", "classification")
    if kind not in ("classification", "regression"):
        raise OptionError(f"{path} with kind={kind}: it is classification or regression")
    splits = npz_splits(path)
    pixels = next(iter(splits.values()))[0]
    asked = sorted({"layout", "mean", "std"} & options.keys())
    pictures = pixels.ndim in (3, 4) and kind == "classification"
    if asked and not pictures:
        raise OptionError(
            f"{asked[0]}= is for pictures that are classified; {path} holds arrays of shape "
            f"{pixels.shape} for {kind}, so leave it out"
        )
    if kind == "regression":
        return regression(**splits)
    if not pictures or not (asked or pixels.dtype == "uint8"):
        return classification(**splits)
    layout = options.get("layout") or _layout(pixels.shape)
    return image_classification(**splits, layout=layout, **_constants(options))  # type: ignore[arg-type]


def _layout(shape: tuple[int, ...]) -> str:
    """Channels first where that is possible; an array without a small axis is grey."""
    if len(shape) == 3:
        return "NHW"
    return "NCHW" if shape[1] in (1, 3) or shape[3] not in (1, 3) else "NHWC"


def _table(path: Path, options: Options) -> Task:
    names = _list(options, "columns")
    files: dict[str, Any] = {"test": path, **{n: Path(options[n]) for n in _PARTS if n in options}}
    if "text" in options or "label" in options:
        columns: dict[str, Any] = {n: options[n] for n in ("text", "label") if n in options}
        tokenizer = _tokenizer(options)
        return text_classification(**files, tokenizer=tokenizer, columns=names, **columns)
    if {"first", "second", "score"} & options.keys():
        sides = {name: options[name] for name in ("first", "second", "score") if name in options}
        pairs: dict[str, Any] = {
            split: read_pairs(f, columns=names, **sides) for split, f in files.items()
        }
        low, high = _numbers(options, "range") or [0.0, 5.0]
        return sentence_pairs(**pairs, tokenizer=_tokenizer(options), score_range=(low, high))
    if "target" not in options:
        raise OptionError(
            f"{path} needs to be told its columns: ?target=price for a table, "
            "?text=sentence&label=class for texts, ?first=a&second=b&score=s for sentence pairs"
        )
    kind = options.get("kind", "classification")
    features = _list(options, "features")
    return tabular(**files, target=options["target"], kind=kind, features=features, columns=names)  # type: ignore[arg-type]


def _saved(path: Path, options: Options) -> Task:
    """A folder that holds several splits is read as its test (or validation) and train."""
    if (path / "dataset_dict.json").is_file():
        names = ("test", "validation", "train")
        test = next((path / name for name in names if (path / name).is_dir()), path)
        if (path / "train").is_dir() and test.name != "train":
            options.setdefault("train", str(path / "train"))
        path = test
    return _table(path, options)


def _text(path: Path, options: Options) -> Task:
    files: dict[str, Any] = {"test": path, **{n: Path(options[n]) for n in _PARTS if n in options}}
    length = _whole(options, "length", 256)
    return language_model(**files, tokenizer=_tokenizer(options), length=length)


def _pictures(path: Path, options: Options) -> Task:
    return image_folder(path, size=_whole(options, "size", 224), **_constants(options))


def _constants(options: Options) -> dict[str, Any]:
    return {name: _numbers(options, name) for name in ("mean", "std")}


def _tokenizer(options: Options) -> str:
    if "tokenizer" not in options:
        raise OptionError(
            "texts need a tokenizer, and the model brings none; add &tokenizer=folder, the Hugging "
            "Face folder that holds it"
        )
    return options["tokenizer"]


def _parsed(rest: str) -> tuple[str, Options]:
    """ "a.csv?target=price&kind=regression" as its path and its options; %26 is an ampersand."""
    place, _, query = rest.partition("?")
    options: Options = {}
    for item in filter(None, query.split("&")):
        name, sign, value = item.partition("=")
        if not sign:
            raise OptionError(f"{item!r} in {rest!r} is not option=value")
        options[unquote(name)] = unquote(value)
    return place, options


def _list(options: Options, name: str) -> list[str] | None:
    return options[name].split(",") if name in options else None


def _numbers(options: Options, name: str) -> list[float] | None:
    try:
        return [float(part) for part in _list(options, name) or []] or None
    except ValueError as error:
        raise OptionError(
            f"{name}={options[name]} is not a list of numbers like 0.5,0.5"
        ) from error


def _whole(options: Options, name: str, default: int) -> int:
    text = options.get(name, str(default))
    if not text.isdecimal():
        raise OptionError(f"{name}={text} is not a whole number; try {name}={default}")
    return int(text)


_PARTS = ("train", "calibration", "holdout")
_SUGGESTED = {".npz": "npz", ".csv": "csv", ".tsv": "csv", ".parquet": "csv", ".txt": "text"}
_COLUMNS = {"target", "features", "kind", "columns", "text", "label", "first", "second"}
_TABLES = {*_COLUMNS, *_PARTS, "score", "range", "tokenizer"}

# Kind -> its reader and the options it knows.
KINDS: dict[str, tuple[Callable[[Path, Options], Task], set[str]]] = {
    "npz": (_npz, {"kind", "layout", "mean", "std"}),
    "csv": (_table, _TABLES),
    "hf": (_saved, _TABLES),
    "text": (_text, {*_PARTS, "length", "tokenizer"}),
    "imagefolder": (_pictures, {"size", "mean", "std"}),
}
