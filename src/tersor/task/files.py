"""Reading files: arrays from .npz, columns from csv, tsv, parquet and saved dataset folders."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from tersor.errors import MissingExtra, TaskError

File: TypeAlias = str | Path


@dataclass(frozen=True)
class Table:
    """Columns of equal length by name; `classes` names the labels of columns that store numbers."""

    columns: Mapping[str, Sequence[Any]]
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    where: str = "the table"

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> list[Any]:
        """The values of one column. Raises TaskError that lists the columns there are."""
        if name not in self.columns:
            raise TaskError(f"{self.where} has no column {name!r}; it has {list(self.columns)}")
        return list(self.columns[name])

    def divided(self, share: float = 0.2, *, seed: int = 0) -> tuple[Table, Table]:
        """Two tables of rows picked at random: the rest, and a `share` of them."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).tolist()
        second = max(1, round(share * len(self)))
        return self._rows(order[second:]), self._rows(order[:second])

    def _rows(self, positions: Sequence[int]) -> Table:
        picked = {name: [values[at] for at in positions] for name, values in self.columns.items()}
        return Table(picked, self.classes, self.where)


def read_npz(path: File) -> dict[str, np.ndarray]:
    """Every array of an .npz file. Nothing in it is unpickled."""
    found = existing(path)
    try:
        with found.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise TaskError(f"{path} holds one array without a name; save it with np.savez")
            if not zipfile.is_zipfile(file):
                raise TaskError(
                    f"{path} cannot be read as .npz: it is something else, or damaged; save arrays "
                    "with np.savez"
                )
        with np.load(found, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise TaskError(
            f"{path} cannot be read as .npz: {error}. Save arrays of numbers with np.savez; "
            "object arrays are refused, because they would run code"
        ) from error


def npz_splits(path: File) -> dict[str, Any]:
    """Each split of an .npz file with x_test, y_test, x_train, y_train, x_calibration, x_holdout.

    Plain x and y count as test. Raises TaskError that lists the keys when none of these is there.
    """
    arrays = read_npz(path)
    if "x" in arrays:
        arrays |= {f"{key}_test": arrays[key] for key in ("x", "y") if key in arrays}
    splits: dict[str, Any] = {}
    for name in ("test", "train", "calibration", "holdout"):
        inputs, targets = arrays.get(f"x_{name}"), arrays.get(f"y_{name}")
        if inputs is None:
            continue
        if targets is None and name in ("test", "train"):
            raise TaskError(f"{path} has x_{name} but no y_{name}; its keys are {sorted(arrays)}")
        splits[name] = (inputs, targets)
    if not splits:
        raise TaskError(
            f"{path} has none of the keys x, x_test, x_train, x_calibration, x_holdout; its keys "
            f"are {sorted(arrays)}"
        )
    return splits


def read_table(path: File, *, columns: Sequence[str] | None = None) -> Table:
    """A .csv, .tsv or .parquet file, or a folder that Hugging Face datasets saved.

    columns: the names of the columns of a csv or tsv whose first line is data already
    """
    found = existing(path)
    if found.is_dir():
        return _read_saved_dataset(found)
    if found.suffix == ".parquet":
        parquet = _pyarrow("parquet")
        try:
            return Table(_columns(parquet.read_table(found)), where=str(path))
        except (OSError, ValueError) as error:
            raise TaskError(f"{path} cannot be read as parquet: {error}") from error
    if found.suffix in (".csv", ".tsv"):
        return _read_text_table(found, columns)
    raise TaskError(f"{path}: tables end in .csv, .tsv or .parquet, or are saved dataset folders")


def existing(path: File) -> Path:
    """`path`, which exists. Raises TaskError otherwise."""
    found = Path(path)
    if not found.exists():
        raise TaskError(f"{path} does not exist; check the path, which starts from {Path.cwd()}")
    return found


def _read_text_table(path: Path, names: Sequence[str] | None) -> Table:
    # Quotes are plain characters in tab-separated files.
    style: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    )
    try:
        # utf-8-sig also drops the mark that spreadsheets write first.
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [line for line in csv.reader(file, **style) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TaskError(f"{path} cannot be read as UTF-8 text in columns: {error}") from error
    header = list(names) if names is not None else lines[0] if lines else []
    body = lines if names is not None else lines[1:]
    if not body:
        raise TaskError(f"{path} has no rows of data")
    for number, line in enumerate(body, 1 if names is not None else 2):
        if len(line) != len(header):
            raise TaskError(
                f"{path}, row {number} has {len(line)} values for {len(header)} columns: {header}"
            )
    if len(set(header)) < len(header):
        raise TaskError(f"{path} names a column twice: {header}; rename one, or pass columns=")
    return Table(dict(zip(header, zip(*body, strict=True), strict=True)), where=str(path))


def _read_saved_dataset(folder: Path) -> Table:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise TaskError(
            f"{folder} holds the splits {splits}; give one, such as {folder}/{splits[0]}"
        )
    if not (folder / "state.json").is_file():
        raise TaskError(f"{folder} has no state.json; it is not a dataset that was saved to disk")
    pa = _pyarrow("")
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_files"):
        raise TaskError(f"{folder} keeps a selection of rows apart; save flatten_indices() of it")
    tables = []
    for entry in state["_data_files"]:
        # Only the file's name is used, so that no path in it can lead out of the folder.
        with pa.memory_map(str(folder / Path(entry["filename"]).name)) as source:
            tables.append(pa.ipc.open_stream(source).read_all())
    information = folder / "dataset_info.json"
    features = json.loads(information.read_text(encoding="utf-8")) if information.is_file() else {}
    classes = {
        name: list(feature["names"])
        for name, feature in (features.get("features") or {}).items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    return Table(_columns(pa.concat_tables(tables)), classes, str(folder))


def _columns(table: Any) -> dict[str, Sequence[Any]]:
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _pyarrow(part: str) -> Any:
    from importlib import import_module

    try:
        import_module("pyarrow.ipc")
        return import_module(f"pyarrow.{part}" if part else "pyarrow")
    except ImportError as error:
        raise MissingExtra("data", "pyarrow") from error
