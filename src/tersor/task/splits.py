"""Deriving the splits that were not given, the same way every time, and saying so."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tersor.errors import TaskError
from tersor.task.data import Batch, Fixed, Rows, Split, Stream, apply, in_order, rows_in

CALIBRATION = 512
HOLDOUT = 256


def completed(given: dict[str, Split], notes: list[str]) -> dict[str, Split]:
    """`given` plus calibration and holdout; `notes` gains a sentence for each that was derived.

    Training inputs serve first, then test inputs. The two never share a sample.
    Raises TaskError when nothing was given.
    """
    if not given:
        raise TaskError("there is no data; give at least one of test, train, calibration, holdout")
    missing = [name for name in ("calibration", "holdout") if name not in given]
    if not missing:
        return given
    if "train" in given:
        source, share = "train", 2
    elif "test" in given and "calibration" in missing:
        source, share = "test", 4
    else:
        source, share = "holdout" if "holdout" in given else "calibration", 2
    names = missing if source in ("train", "test") else ["calibration", "holdout"]
    pieces = dict(zip(names, _two(given[source], share), strict=False))
    notes.append(f"{' and '.join(missing)}: taken from the inputs of {source}")
    if source == "test":
        notes[-1] += ", so figures on test are optimistic; give train or calibration"
    if isinstance(last := pieces.get("holdout"), Rows) and not last.count:
        notes.append("holdout is empty: there are too few samples to keep one apart")
    return given | pieces


def _two(split: Split, share: int) -> tuple[Split, Split]:
    """Two disjoint pieces, each at most a `share`-th of `split`."""
    if isinstance(split, Rows):
        first, second = _sizes(split.count, share)
        # Data is often sorted by class, and a stride may fall in step with the classes.
        order = torch.randperm(split.count, generator=torch.Generator().manual_seed(0))
        return split.take(order[:first]), split.take(order[first : first + second])
    batches = _start(split)
    first, second = _sizes(sum(rows_in(inputs) for inputs, _ in batches), share)
    return Fixed(_span(batches, 0, first)), Fixed(_span(batches, first, first + second))


def _sizes(rows: int, share: int) -> tuple[int, int]:
    most = max(1, rows // share)
    return min(CALIBRATION, most), min(HOLDOUT, most, rows - 1)


def _start(split: Stream | Fixed) -> list[Batch]:
    """Enough batches from the start of a loader, which cannot be asked for samples by position."""
    if isinstance(split, Stream):
        split = Stream(in_order(split.loader), split.read)
    batches: list[Batch] = []
    rows = 0
    with _one_seed():
        for batch in split.batches():
            batches.append(batch)
            rows += rows_in(batch[0])
            if rows >= 4 * CALIBRATION:
                break
    return batches


@contextmanager
def _one_seed() -> Iterator[None]:
    """Inside, crops and mirrors are those of any other process: a task is known by its samples."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _span(batches: list[Batch], start: int, stop: int) -> tuple[Batch, ...]:
    """Rows `start` to `stop` of the batches laid end to end, without their targets."""
    found: list[Batch] = []
    at = 0
    for inputs, _ in batches:
        low, high = max(start - at, 0), min(stop - at, rows_in(inputs))
        if low < high:

            def cut(tensor: Tensor, low: int = low, high: int = high) -> Tensor:
                return tensor[low:high].clone()

            found.append((apply(cut, inputs), None))
        at += rows_in(inputs)
    return tuple(found)
