"""Tasks on recordings: waveforms of different lengths, cut or padded to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tersor.errors import TaskError
from tersor.task.data import Batch, Rows, as_tensor, check_count, finite, given
from tersor.task.makers import classification_of, labels_of
from tersor.task.task import Task


def audio_classification(
    test: Any = None,
    train: Any = None,
    calibration: Any = None,
    holdout: Any = None,
    *,
    length: int,
    channel: bool = True,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
) -> Task:
    """A task of telling the classes of recordings apart.

    Each split: (waveforms, labels); calibration and holdout may be waveforms alone. A waveform is
    (samples,), of floats or of whole numbers that become -1..1. It keeps its first `length`
    samples and gains zeros at its end.

    channel: inputs (n, 1, length) as convolutions want them, instead of (n, length)
    """
    check_count(length, "length")
    check_count(batch_size, "batch_size")
    splits = {}
    for name, source in given(test, train, calibration, holdout).items():
        waveforms, labels = source if isinstance(source, tuple) else (source, None)
        made = _waveforms(waveforms, name)
        numbers = labels_of(name, labels, len(made), classes)
        splits[name] = _rows(made, numbers, length, channel, batch_size)
    return classification_of(splits, classes)


def _waveforms(source: Any, name: str) -> list[Tensor]:
    """Each recording as stored; one that is empty, not finite or not a row is refused."""
    if not isinstance(source, Iterable):
        raise TaskError(f"{name}={source!r} is not a list of waveforms")
    waveforms = []
    for number, value in enumerate(source):
        where = f"{name}, waveform {number}"
        waveform = as_tensor(value, where)
        if waveform.dim() != 1 or not len(waveform):
            raise TaskError(f"{where} has shape {tuple(waveform.shape)}; it must be (samples,)")
        finite(waveform[None], where)
        waveforms.append(waveform)
    if not waveforms:
        raise TaskError(f"{name}: there are no waveforms; give at least one")
    return waveforms


def _rows(
    waveforms: list[Tensor], labels: Tensor | None, length: int, channel: bool, batch_size: int
) -> Rows:
    def gather(positions: Tensor) -> Batch:
        made = [_fitted(waveforms[at], length) for at in positions.tolist()]
        inputs = torch.stack(made) if made else torch.empty(0, length)
        inputs = inputs[:, None] if channel else inputs
        return inputs, None if labels is None else labels[positions]

    return Rows(len(waveforms), gather, batch_size)


def _fitted(waveform: Tensor, length: int) -> Tensor:
    kept = waveform[:length]
    if kept.dtype == torch.uint8:
        kept = (kept.float() - 128) / 128
    elif not kept.is_floating_point():
        kept = kept.float() / -torch.iinfo(kept.dtype).min
    return functional.pad(kept.float(), (0, length - len(kept)))
