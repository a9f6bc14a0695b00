"""Tasks on texts: telling their classes apart, and reading pairs of sentences from tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tersor.errors import TaskError
from tersor.task.data import Batch, Rows, check_count, given
from tersor.task.files import File, Table, read_table
from tersor.task.language import Pair
from tersor.task.makers import classification_of
from tersor.task.tabular import class_names, label_numbers
from tersor.task.task import Task
from tersor.task.tokens import Encoded, encode, padded, padding_of, tokenizer_from


def text_classification(
    test: Any = None,
    train: Any = None,
    calibration: Any = None,
    holdout: Any = None,
    *,
    tokenizer: Any,
    text: str = "text",
    label: str = "label",
    columns: Sequence[str] | None = None,
    max_length: int = 256,
    batch_size: int = 32,
) -> Task:
    """A task of telling the classes of texts apart.

    Each split: (texts, labels), a .csv, .tsv or .parquet file, a saved dataset's folder, or a
    `Table`; calibration and holdout may be texts alone. Labels are names or numbers from 0.

    tokenizer: Hugging Face's, its local folder, or a function from a text to token ids
    text, label: the columns to read; columns: their names in files without a header line

    A batch is a dictionary with input_ids and attention_mask, padded to its longest text.
    """
    check_count(max_length, "max_length")
    check_count(batch_size, "batch_size")
    reader = tokenizer_from(tokenizer)
    tables = {
        name: _table(source, (text, label), columns)
        for name, source in given(test, train, calibration, holdout).items()
    }
    labelled = [table for name, table in tables.items() if name in ("test", "train")]
    classes = class_names(labelled, label)
    splits = {}
    for name, table in tables.items():
        labels = None
        if name in ("test", "train") or (name == "holdout" and label in table.columns):
            coded = any(label in each.classes for each in labelled)
            labels = label_numbers(table.column(label), classes, table.where, coded=coded)
        encoded = _encoded(table.column(text), name, reader, max_length)
        splits[name] = _rows(encoded, labels, padding_of(reader), batch_size)
    task = classification_of(splits, classes or None)
    task.tokenizer = reader
    return task


def read_pairs(
    path: File,
    *,
    columns: Sequence[str] | None = None,
    first: str = "sentence1",
    second: str = "sentence2",
    score: str = "score",
) -> list[Pair]:
    """(sentence1, sentence2, score) of each row of a table, for `sentence_pairs`."""
    table = read_table(path, columns=columns)
    return list(zip(*(table.column(name) for name in (first, second, score)), strict=True))


def _table(source: Any, names: tuple[str, str], columns: Sequence[str] | None) -> Table:
    if isinstance(source, Table):
        return source
    if isinstance(source, str | Path):
        return read_table(source, columns=columns)
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], str):
        texts, labels = (list(part) for part in source)
        if len(texts) != len(labels):
            raise TaskError(
                f"there are {len(texts)} texts but {len(labels)} labels; give one label each"
            )
        # A label of numpy or torch becomes a plain number.
        plain = [value.item() if hasattr(value, "item") else value for value in labels]
        return Table(dict(zip(names, (texts, plain), strict=True)))
    return Table({names[0]: list(source)})


def _encoded(texts: Sequence[Any], name: str, tokenizer: Any, max_length: int) -> list[Encoded]:
    if not texts:
        raise TaskError(f"{name}: there are no texts; give at least one")
    for row, value in enumerate(texts):
        if not isinstance(value, str) or not value.strip():
            raise TaskError(f"{name}, row {row} is {value!r}, not a text; leave it out")
    return [encode(tokenizer, value, max_length) for value in texts]


def _rows(
    encoded: list[Encoded], labels: Tensor | None, padding: Mapping[str, int], batch_size: int
) -> Rows:
    def gather(positions: Tensor) -> Batch:
        picked = [encoded[at] for at in positions.tolist()]
        return padded(picked, padding), None if labels is None else labels[positions]

    return Rows(len(encoded), gather, batch_size)
