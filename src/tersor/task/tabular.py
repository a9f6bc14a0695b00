"""Tables of numbers and categories as rows of standardised numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tersor.errors import OptionError, TaskError
from tersor.task.files import Table, read_table
from tersor.task.makers import classification, regression
from tersor.task.task import Task

Source: TypeAlias = str | Path | Table | Mapping[str, Sequence[Any]]

MISSING = {"", "na", "n/a", "nan", "null", "none"}
# A column with more categories than this is a name or a number of its row, not a property.
MOST_CATEGORIES = 256


@dataclass(frozen=True)
class Scaling:
    """How one column becomes numbers: (value - mean) / spread, or one 0/1 input per category."""

    name: str
    mean: float
    spread: float
    categories: list[str] | None


def tabular(
    test: Source | None = None,
    train: Source | None = None,
    calibration: Source | None = None,
    holdout: Source | None = None,
    *,
    target: str,
    kind: Literal["classification", "regression"] = "classification",
    features: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    batch_size: int = 256,
) -> Task:
    """A task on tables: inputs (n, k), each column with mean 0 and variance 1 on train.

    Each split: a .csv, .tsv or .parquet file, a saved dataset's folder, a `Table`, or columns by
    name. Statistics come from train alone (from the first split given without it). A missing
    number becomes the mean; a text column becomes one 0/1 input per category seen there.

    target: the column to predict
    features: the columns to predict it from; None for all others
    columns: names of the columns of files without a header line
    """
    if kind not in ("classification", "regression"):
        raise OptionError(f'kind={kind!r} must be "classification" or "regression"')
    given = {"train": train, "test": test, "calibration": calibration, "holdout": holdout}
    tables = {name: _table(s, columns) for name, s in given.items() if s is not None}
    if not tables:
        raise TaskError("there is no data; give at least one of test, train, calibration, holdout")
    first = next(iter(tables.values()))
    first.column(target)
    names = list(features) if features else [n for n in first.columns if n != target]
    if not names:
        raise TaskError(
            f"{first.where} has no column but {target!r}, so nothing to predict it from"
        )
    scalings = [_scaling(name, first.column(name), first.where) for name in names]
    classes = None
    labelled = [t for name, t in tables.items() if name in ("test", "train")]
    if kind == "classification":
        classes = class_names(labelled, target)
    splits: dict[str, Any] = {}
    for name, table in tables.items():
        inputs = torch.cat([_scaled(s, table.column(s.name)) for s in scalings], 1)
        kept = name in ("test", "train") or (name == "holdout" and target in table.columns)
        if not kept:
            splits[name] = (inputs, None)
        elif classes is not None:
            coded = any(target in each.classes for each in labelled)
            labels = label_numbers(table.column(target), classes, table.where, coded=coded)
            splits[name] = inputs, labels
        else:
            splits[name] = inputs, _amounts(table.column(target), target, table.where)
    if classes is not None:
        return classification(**splits, classes=classes, batch_size=batch_size)
    return regression(**splits, batch_size=batch_size)


def class_names(tables: Sequence[Table], column: str) -> list[str]:
    """The classes of a column: as its file names them, else its values in order.

    Whole numbers from 0 keep their places; classes that no row has are named all the same.
    """
    if not any(len(table) for table in tables):
        return []
    known = next((t.classes[column] for t in tables if column in t.classes), None)
    if known is not None:
        return known
    values = {str(value) for table in tables for value in table.column(column)}
    if "-1" in values:
        raise TaskError(
            f"{tables[0].where}: {column!r} holds -1, which marks rows without a label; leave them "
            "out, or use a split that has labels"
        )
    if all(value.isdecimal() for value in values):
        top = max(int(value) for value in values)
        if top < 10 * len(values):
            return [str(number) for number in range(top + 1)]
    return sorted(values)


def label_numbers(
    values: Sequence[Any], classes: Sequence[str], where: str, *, coded: bool
) -> Tensor:
    """(n,) int64: the place of each value among `classes`.

    coded: whole numbers are places already, since a file names the classes beside them
    """
    places = {name: place for place, name in enumerate(classes)}
    numbers = []
    for row, value in enumerate(values):
        whole = coded and isinstance(value, int) and not isinstance(value, bool)
        if whole and 0 <= value < len(classes):
            numbers.append(value)
        elif str(value) in places:
            numbers.append(places[str(value)])
        else:
            raise TaskError(f"{where}, row {row}: {value!r} is not one of the classes {classes}")
    return torch.tensor(numbers)


def _table(source: Source, columns: Sequence[str] | None) -> Table:
    if isinstance(source, Table):
        return source
    if isinstance(source, Mapping):
        sizes = {name: len(values) for name, values in source.items()}
        if len(set(sizes.values())) != 1:
            raise TaskError(f"the columns differ in length: {sizes}; all need one value per row")
        return Table(source)
    if not isinstance(source, str | Path):
        raise TaskError(f"{source!r} is not a file, a Table, or a dictionary of columns")
    return read_table(source, columns=columns)


def _scaling(name: str, values: Sequence[Any], where: str) -> Scaling:
    numbers = [_number(value) for value in values]
    present = [n for n in numbers if n is not None and math.isfinite(n)]
    if None not in numbers:
        if not present:
            raise TaskError(f"{where}: column {name!r} has no value at all; leave it out")
        column = torch.tensor(present, dtype=torch.float64)
        spread = column.std(correction=0).item()
        return Scaling(name, column.mean().item(), spread or 1.0, None)
    categories = sorted({str(value) for value in values if not _missing(value)})
    if len(categories) > MOST_CATEGORIES:
        raise TaskError(
            f"{where}: column {name!r} is text with {len(categories)} different values, more than "
            f"{MOST_CATEGORIES}; leave it out with features="
        )
    return Scaling(name, 0.0, 1.0, categories)


def _scaled(scaling: Scaling, values: Sequence[Any]) -> Tensor:
    """(n, 1) for numbers, (n, categories) for text; a category never seen is all zeros."""
    if scaling.categories is not None:
        places = {name: place for place, name in enumerate(scaling.categories)}
        inputs = torch.zeros(len(values), len(places))
        for row, value in enumerate(values):
            if str(value) in places:
                inputs[row, places[str(value)]] = 1.0
        return inputs
    numbers = [_number(value) for value in values]
    wrong = next((row for row, number in enumerate(numbers) if number is None), None)
    if wrong is not None:
        raise TaskError(
            f"column {scaling.name!r}, row {wrong}: {values[wrong]!r} is text, but the column held "
            "numbers where its mean was taken; correct the value"
        )
    column = torch.tensor(numbers, dtype=torch.float64)
    scaled = ((column - scaling.mean) / scaling.spread).where(column.isfinite(), 0.0)
    return scaled.float()[:, None]


def _missing(value: Any) -> bool:
    return value is None or str(value).strip().lower() in MISSING


def _number(value: Any) -> float | None:
    """NaN for a missing value, None for text."""
    if _missing(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _amounts(values: Sequence[Any], target: str, where: str) -> Tensor:
    numbers = [_number(value) for value in values]
    for row, number in enumerate(numbers):
        if number is None or not math.isfinite(number):
            raise TaskError(
                f"{where}: {target!r} of row {row} is {values[row]!r}, not a number; leave the row "
                "out, or correct it"
            )
    return torch.tensor(numbers)
