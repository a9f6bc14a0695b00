"""Where samples come from: rows that can be asked for by position, loaders, and fixed batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from tersor.errors import OptionError, TaskError

SPLITS = ("test", "train", "calibration", "holdout")
MOST_BATCHES = 1_000_000
"""Of a loader that does not say how many it has."""
Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Batch: TypeAlias = tuple[Inputs, Tensor | None]


@dataclass(frozen=True)
class Rows:
    """Samples that can be asked for by position; `gather` makes a batch of some of them."""

    count: int
    gather: Callable[[Tensor], Batch]
    batch_size: int

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """All samples in order, or shuffled by `generator`."""
        order = torch.arange(self.count)
        if generator is not None:
            order = torch.randperm(self.count, generator=generator)
        # Not torch.split, which gives one empty batch where there are no samples.
        for start in range(0, self.count, self.batch_size):
            stop = start + self.batch_size
            # A batch norm cannot train on one that is left over, so it joins the batch before.
            if self.count - stop == 1 and self.batch_size > 1:
                yield self.gather(order[start:])
                return
            yield self.gather(order[start:stop])

    def __len__(self) -> int:
        """Batches."""
        whole, rest = divmod(self.count, self.batch_size)
        alone = rest == 1 and self.batch_size > 1 and whole > 0
        return whole + (rest > 0 and not alone)

    def take(self, positions: Tensor) -> Rows:
        """Only the samples at `positions`."""
        return replace(self, count=len(positions), gather=lambda at: self.gather(positions[at]))


@dataclass(frozen=True)
class Stream:
    """A loader that can be read again; `read` makes a batch of each thing it yields."""

    loader: Iterable[Any]
    read: Callable[[Any], Batch]

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """All batches in the loader's own order, which is the loader's to shuffle."""
        for item in self.loader:
            yield self.read(item)

    def __len__(self) -> int:
        """Batches, as the loader says; one that does not is read through.

        Raises TaskError where it does not end.
        """
        if isinstance(self.loader, Sized):
            # The loader of a dataset without a length has `__len__` too.
            with suppress(TypeError, NotImplementedError):
                return len(self.loader)
        count = sum(1 for _ in itertools.islice(self.loader, MOST_BATCHES + 1))
        if count > MOST_BATCHES:
            raise TaskError(
                f"the loader gives more than {MOST_BATCHES:,} batches, so an epoch may have no "
                "end; give it a __len__, or let it end"
            )
        return count


@dataclass(frozen=True)
class Fixed:
    """Batches kept in memory."""

    kept: tuple[Batch, ...]

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """All batches in order."""
        yield from self.kept

    def __len__(self) -> int:
        """Batches."""
        return len(self.kept)


Split: TypeAlias = Rows | Stream | Fixed


def given(*sources: Any) -> dict[str, Any]:
    """The sources of test, train, calibration and holdout by name, without those that are None."""
    named = zip(SPLITS, sources, strict=True)
    return {name: source for name, source in named if source is not None}


def spread(rows: Rows, numbers: int) -> Iterator[Batch]:
    """Batches of samples from first to last, so many that their inputs hold about `numbers`."""
    if not rows.count:
        return
    inputs, _ = rows.gather(torch.zeros(1, dtype=torch.long))
    size = max(1, sum(tensor.numel() for tensor in tensors_of(inputs).values()))
    count = max(1, min(rows.count, numbers // size))
    yield from rows.take(torch.arange(count) * rows.count // count).batches()


def tensors_of(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a batch by name; a lone tensor's name is "", a tuple's are "0", "1", ..."""
    if isinstance(inputs, dict):
        return inputs
    if isinstance(inputs, tuple):
        return {str(i): tensor for i, tensor in enumerate(inputs)}
    return {"": inputs}


def add_to(digest: Any, name: str, tensor: Tensor) -> None:
    """Adds name, shape, type and raw bytes to a hash, so that no two tensors read alike."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())


def apply(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`function` on each tensor of a batch."""
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(tensor) for tensor in inputs)
    return function(inputs)


def rows_in(inputs: Inputs) -> int:
    """How many rows a batch has."""
    return len(next(iter(tensors_of(inputs).values())))


def pieces(batches: Iterable[Inputs], rows: int) -> Iterator[Inputs]:
    """The same samples in batches of at most `rows` rows, about as many in each.

    A batch norm cannot train on a single one that is left over. An even number of rows, which may
    be pairs, comes in even numbers; `rows` is even then.
    """
    for batch in batches:
        count = rows_in(batch)
        size = -(-count // max(1, -(-count // rows)))
        size += size % 2 if count % 2 == 0 and rows % 2 == 0 else 0
        for start in range(0, count, max(1, size)):
            yield between(batch, start, start + size)


def between(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Rows `start` to `stop` of a batch."""
    return apply(lambda tensor: tensor[start:stop], inputs)


def head(inputs: Inputs, rows: int) -> Inputs:
    """The first `rows` rows of a batch."""
    return apply(lambda tensor: tensor[:rows], inputs)


def described(inputs: Inputs) -> str:
    """ "shape (8, 3, 32, 32), float32", for messages."""
    parts = [
        f"{name} " * bool(name) + f"shape {tuple(t.shape)}, {str(t.dtype).removeprefix('torch.')}"
        for name, t in tensors_of(inputs).items()
        if isinstance(t, Tensor)
    ]
    return "; ".join(parts)


def as_tensor(value: Any, where: str) -> Tensor:
    """An array, a tensor or a list of numbers as a tensor; float64 becomes float32."""
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise TaskError(
                f"{where}: the samples have different shapes, so they do not form an array; pad or "
                "crop them to one shape first"
            ) from error
        if array.dtype.kind not in "biuf":
            raise TaskError(
                f"{where}: an array of dtype {array.dtype} holds no numbers that a model can read; "
                "convert it, for example with array.astype('float32')"
            )
        # torch neither reads foreign byte orders nor wants read-only memory.
        value = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), copy=True))
    tensor: Tensor = value.detach()
    if not tensor.dim():
        raise TaskError(f"{where}: a single number is not a set of samples; give an array")
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def as_inputs(value: Any, where: str) -> Inputs:
    """Arrays as the inputs of a batch. Raises TaskError when they disagree on how many rows."""
    if isinstance(value, Mapping):
        inputs: Inputs = {str(k): as_tensor(v, f"{where}, {k!r}") for k, v in value.items()}
    elif isinstance(value, tuple):
        inputs = tuple(as_tensor(v, f"{where}, input {i}") for i, v in enumerate(value))
    else:
        inputs = as_tensor(value, where)
    counts = {name: len(tensor) for name, tensor in tensors_of(inputs).items()}
    if not counts or not min(counts.values()):
        raise TaskError(f"{where}: there are no samples; give at least one")
    if len(set(counts.values())) > 1:
        raise TaskError(f"{where}: the inputs differ in length: {counts}; all need one row each")
    return inputs


def finite(tensor: Tensor, where: str) -> None:
    """Raises TaskError naming the first sample with a NaN or an infinity."""
    if not tensor.is_floating_point():
        return
    for start in range(0, len(tensor), 1024):
        good = tensor[start : start + 1024].isfinite().flatten(1 if tensor.dim() > 1 else 0)
        if not good.all():
            rows = good.all(1) if tensor.dim() > 1 else good
            first = start + int(rows.logical_not().nonzero()[0])
            raise TaskError(
                f"{where}: sample {first} has a NaN or an infinity; repair it or leave it out"
            )


def check_count(value: object, name: str) -> int:
    """`value` when it is a whole number of at least 1. Raises OptionError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r} must be a whole number of at least 1")
    return value


def in_order(loader: Iterable[Any]) -> Iterable[Any]:
    """The same loader without shuffling, so that two passes over it pair up."""
    if isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
        return DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )
    return loader
