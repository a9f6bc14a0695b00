"""Tasks from arrays and loaders.

Each split is (inputs, targets) or a loader of such pairs. Inputs are an array or tensor, a tuple of
them (`model(*inputs)`) or a dictionary (`model(**inputs)`); numbers in float64 become float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from tersor.errors import TaskError
from tersor.task.data import (
    Batch,
    Inputs,
    Rows,
    Split,
    Stream,
    apply,
    as_inputs,
    as_tensor,
    check_count,
    finite,
    given,
    in_order,
    rows_in,
    tensors_of,
)
from tersor.task.metrics import CLASSIFICATION, REGRESSION, Metric, chosen
from tersor.task.task import Task

# Names that a dictionary from a loader may give its targets.
LABELS = ("labels", "label", "targets", "target", "y")
# Top-5 says nothing when five is most of the classes.
TOP5_FROM = 11

Reader: TypeAlias = Callable[[Any, str], Tensor]


def classification(
    test: Any = None,
    train: Any = None,
    calibration: Any = None,
    holdout: Any = None,
    *,
    classes: Sequence[str] | None = None,
    metrics: Sequence[str] | Mapping[str, Metric] | None = None,
    batch_size: int = 100,
) -> Task:
    """A task of telling classes apart.

    test, train: (inputs, labels), or a loader of such pairs or of dictionaries with "labels"
    calibration, holdout: the same or inputs alone; derived from train or test when absent. Held-out
        labels let training on labels be judged
    classes: their names, in the order of the model's outputs
    metrics: among accuracy, top5, f1, precision, recall, calibration_error; the first leads

    labels: (n,) integers from 0. Raises TaskError for data that is empty, not finite, of unequal
    lengths or of another type.
    """
    sources = given(test, train, calibration, holdout)
    splits = splits_of(sources, partial(as_labels, classes=classes), batch_size)
    return classification_of(splits, classes, metrics)


def regression(
    test: Any = None,
    train: Any = None,
    calibration: Any = None,
    holdout: Any = None,
    *,
    metrics: Sequence[str] | Mapping[str, Metric] | None = None,
    batch_size: int = 100,
) -> Task:
    """A task of telling amounts: like `classification`, with targets (n,) or (n, k) of numbers.

    metrics: among r2, mae, mse, rmse, spearman, pearson; the first leads
    """
    splits = splits_of(given(test, train, calibration, holdout), as_amounts, batch_size)
    return Task("regression", chosen(metrics, REGRESSION), splits)


def classification_of(
    splits: Mapping[str, Split],
    classes: Sequence[str] | None,
    metrics: Sequence[str] | Mapping[str, Metric] | None = None,
) -> Task:
    """A classification task on splits that are made already."""
    names = None if classes is None else [str(name) for name in classes]
    found = chosen(metrics, CLASSIFICATION)
    if metrics is None and (names is None or len(names) < TOP5_FROM):
        del found["top5"]
    return Task("classification", found, splits, classes=names)


def splits_of(sources: Mapping[str, Any], read: Reader, batch_size: int) -> dict[str, Split]:
    """Each source as a split."""
    check_count(batch_size, "batch_size")
    return {
        name: source if isinstance(source, Rows) else _split(source, name, read, batch_size)
        for name, source in sources.items()
    }


def rows(inputs: Inputs, targets: Tensor | None, batch_size: int) -> Rows:
    """Tensors as rows."""

    def gather(positions: Tensor) -> Batch:
        chosen_inputs = apply(lambda tensor: tensor[positions], inputs)
        return chosen_inputs, None if targets is None else targets[positions]

    return Rows(rows_in(inputs), gather, batch_size)


def as_labels(value: Any, where: str, *, classes: Sequence[str] | None = None) -> Tensor:
    """(n,) int64 labels from 0. Raises TaskError for anything else."""
    labels = as_tensor(value, f"{where} labels")
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.is_floating_point() or labels.dim() != 1:
        raise TaskError(
            f"{where} labels are {_type(labels)} of shape {tuple(labels.shape)}; classification "
            "needs one integer per sample, for example labels.astype(int) or one_hot.argmax(1)"
        )
    labels = labels.long()
    top = len(classes) - 1 if classes else None
    if labels.min() < 0 or (top is not None and labels.max() > top):
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise TaskError(
            f"{where} labels hold {wrong}; labels count from 0"
            + (f" to {top}, the last of the {top + 1} classes" if top is not None else "")
        )
    return labels


def labels_of(name: str, labels: Any, count: int, classes: Sequence[str] | None) -> Tensor | None:
    """The labels of `count` samples of a split; None where it needs none, or has none held out."""
    if name not in ("test", "train") and (name != "holdout" or labels is None):
        return None
    if labels is None:
        raise TaskError(f"{name} lacks its labels; give {name}=(inputs, labels)")
    numbers = as_labels(labels, name, classes=classes)
    if len(numbers) != count:
        raise TaskError(f"{name} has {count} inputs but {len(numbers)} labels; give one each")
    return numbers


def as_amounts(value: Any, where: str) -> Tensor:
    """(n,) or (n, k) float32 targets. Raises TaskError where they are not finite."""
    amounts = as_tensor(value, f"{where} targets").float()
    finite(amounts, f"{where} targets")
    return amounts


def is_loader(source: Any) -> bool:
    """True for what yields batches: a DataLoader, a list of batches, any other iterable object."""
    if isinstance(source, list):
        return bool(source) and all(isinstance(item, tuple | Mapping) for item in source)
    plain = (Tensor, np.ndarray, Mapping, tuple, str, bytes, Path)
    return isinstance(source, Iterable) and not isinstance(source, plain)


def again(source: Any, name: str) -> Iterable[Any]:
    """`source`, a loader. Raises TaskError for one that can be read only once."""
    if isinstance(source, Iterator):
        raise TaskError(
            f"{name} is a {type(source).__name__}, which can be read only once; give a DataLoader "
            "or a list of batches"
        )
    # Two passes over test data must pair up, for "before" and "after" to be compared.
    return source if name == "train" else in_order(source)


def _split(source: Any, name: str, read: Reader, batch_size: int) -> Split:
    labelled = name in ("test", "train")
    if is_loader(source):

        def batch(item: Any) -> Batch:
            return _checked(*_parted(item, name, labelled), name, read)

        return Stream(again(source, name), batch)
    pair = isinstance(source, tuple | list if labelled else tuple) and len(source) == 2
    if labelled and not (pair and source[1] is not None):
        raise TaskError(f"{name}={_type(source)} lacks its targets; give {name}=(inputs, targets)")
    inputs, targets = source if pair else (source, None)
    kept = targets if labelled or name == "holdout" else None
    return rows(*_checked(inputs, kept, name, read), batch_size)


def _parted(item: Any, name: str, labelled: bool) -> tuple[Any, Any]:
    """What a loader yields as (inputs, targets). Held-out targets are kept where there are any."""
    wanted = labelled or name == "holdout"
    if isinstance(item, Mapping):
        key = next((key for key in LABELS if key in item), None)
        if labelled and key is None:
            raise TaskError(
                f"{name} yields dictionaries with {sorted(item)}, none of which is one of "
                f"{', '.join(LABELS)}; rename the one that holds the targets"
            )
        rest = {k: v for k, v in item.items() if k != key}
        return rest, None if key is None or not wanted else item[key]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1] if wanted else None
    if labelled:
        raise TaskError(f"{name} yields {_type(item)}; it must yield (inputs, targets)")
    return item[0] if isinstance(item, tuple | list) and len(item) == 1 else item, None


def _checked(inputs: Any, targets: Any, name: str, read: Reader) -> tuple[Inputs, Tensor | None]:
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], Tensor):
        inputs = tuple(inputs)
    made = as_inputs(inputs, f"{name} inputs")
    for part, tensor in tensors_of(made).items():
        finite(tensor, f"{name} inputs{' ' * bool(part)}{part}")
    if targets is None:
        return made, None
    wanted = read(targets, name)
    if len(wanted) != rows_in(made):
        raise TaskError(
            f"{name} has {rows_in(made)} inputs but {len(wanted)} targets; give one target each"
        )
    return made, wanted


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    return f"a {type(value).__name__}"
