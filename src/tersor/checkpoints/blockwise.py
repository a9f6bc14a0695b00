"""Quantizes a checkpoint that may be larger than memory, one block of its network at a time.

A block is a network, and what the blocks before it give is its calibration data: so any method
that is given a network and a task quantizes it, for what the quantized blocks before it bring.

Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, section 4, for going block by block with the
inputs of the quantized prefix.
Differs: those inputs are kept on disk, and so is all that is finished, so that a run which was
stopped goes on where it was.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn

from tersor.checkpoints.calls import Call, Stem, check_alike, hidden_in
from tersor.checkpoints.job import Job
from tersor.checkpoints.parts import Item, read_part, write_part
from tersor.checkpoints.states import read_states, write_states
from tersor.errors import ModelError
from tersor.forms import Form
from tersor.methods.table import TABLE
from tersor.surgery.hold import decoded, held, hold
from tersor.task import Task
from tersor.task.data import Fixed

BATCH_TOKENS = 1024
"""That go through a block together, at most, unless one sequence has more."""


class Alone(nn.Module):
    """A block by itself, under the path that it has in its network, called as the network does."""

    def __init__(self, path: str, block: nn.Module, call: Call | None) -> None:
        super().__init__()
        owner: nn.Module = self
        *above, last = path.split(".")
        for name in above:
            owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(last, block)
        self.__dict__["_block"], self.__dict__["_call"] = block, call

    def forward(self, hidden: Tensor) -> Tensor:
        call: Call = self.__dict__["_call"]
        return hidden_in(call(self.__dict__["_block"], hidden))


@dataclass(frozen=True)
class Done:
    """A block that is quantized.

    error: of what it gives, relative, for the first inputs that the quantized blocks before it
        bring; None without calibration data
    """

    path: str
    seconds: float
    error: float | None


class Blockwise:
    """The blocks of a job, quantized one after another, with all that is finished on disk."""

    def __init__(self, job: Job, table: Callable[[Tensor], Tensor] | None) -> None:
        """table: rows of the token embedding as the finished file has them, see `Stem`"""
        self._job, self._table = job, table
        self._calls: list[Call] = []
        self._rows = 1

    def run(self, after: Callable[[Done, int], None]) -> list[Done]:
        """Quantizes what is not yet. after: is told of each block, and how many are left"""
        job, count = self._job, len(self._job.blocks)
        if job.tokens is not None:
            self._begin(job.tokens)
        for at in range(count):
            if not job.part(at).exists():
                self._quantize(at)
                after(_done(job, at), count - at - 1)
            if job.tokens is not None and at + 1 < count and not job.part(at + 1).exists():
                self._advance(at)
        return [_done(job, at) for at in range(count)]

    def _begin(self, tokens: Tensor) -> None:
        """Finds out how blocks are called, and writes what the first one is given."""
        job = self._job
        self._rows = _rows_together(*tokens.shape)
        batches = list(torch.split(tokens, self._rows))
        stem = Stem(job.model, job.path, job.weights, self._table)
        hidden, call = stem.first(batches[0])
        with torch.no_grad():
            given = call(self._loaded(0), hidden)
        self._calls = stem.calls(batches[0], tuples=not isinstance(given, Tensor))
        if job.part(0).exists() or job.states(0).exists():
            return

        def states() -> Iterator[Tensor]:
            for batch in batches:
                found, other = stem.first(batch)
                check_alike(call, other)
                yield found

        write_states(job.states(0), (*tokens.shape, hidden.shape[-1]), states())
        job.weights.forget()

    def _loaded(self, at: int) -> nn.Module:
        """A block with the checkpoint's weights."""
        block = copy.deepcopy(self._job.blocks[at])
        self._job.weights.fill(block, self._job.block_path(at))
        return block.eval()

    def _quantize(self, at: int) -> None:
        """Writes the part of a block."""
        started, job = time.monotonic(), self._job
        alone = Alone(
            job.block_path(at), self._loaded(at), self._calls[at] if self._calls else None
        )
        names = job.chosen[at]
        error, task, first, before = None, None, None, None
        if job.tokens is not None:
            states, shard = read_states(job.states(at))
            batches = tuple((batch, None) for batch in torch.split(states, self._rows))
            task = Task("regression", {}, {"calibration": Fixed(batches), "holdout": Fixed(())})
            first = batches[0][0]
            before = _given(alone, first)
        if names:
            function, options = TABLE[job.method], dict(job.options)
            if "include" in signature(function).parameters:
                options |= {"include": names, "exclude": None}
            function(alone, task, **options)
        if first is not None and before is not None:
            error = _apart(before, _given(alone, first))
            shard.forget()
        notes = {"seconds": time.monotonic() - started, "error": error}
        write_part(job.part(at), _changed(alone, job), notes)

    def _advance(self, at: int) -> None:
        """Writes what the next block is given, from what this one was."""
        job = self._job
        if job.states(at + 1).exists():
            return
        states, shard = read_states(job.states(at))
        part = read_part(job.part(at))
        alone = Alone(job.block_path(at), self._loaded(at), self._calls[at])
        for name, item in part.items.items():
            _put(alone, name, item)

        def given() -> Iterator[Tensor]:
            with torch.no_grad(), decoded(alone):
                for batch in torch.split(states, self._rows):
                    yield alone(batch)
                    shard.forget()

        write_states(job.states(at + 1), tuple(states.shape), given())
        job.states(at).unlink()


def _done(job: Job, at: int) -> Done:
    notes = read_part(job.part(at)).notes
    return Done(job.block_path(at), float(notes["seconds"]), notes["error"])


def _given(alone: Alone, hidden: Tensor) -> Tensor:
    with torch.no_grad(), decoded(alone):
        found: Tensor = alone(hidden)
    if found.shape != hidden.shape:
        raise ModelError(
            f"a block makes {tuple(found.shape)} of hidden states {tuple(hidden.shape)}; blocks "
            "that change them cannot be quantized one by one: load it whole and use tersor.run"
        )
    return found


def _apart(before: Tensor, after: Tensor) -> float:
    return float((after - before).norm() / before.norm().clamp(min=1e-30))


def _changed(alone: Alone, job: Job) -> dict[str, Item]:
    """What is no longer as in the checkpoint: forms, and tensors that the method has changed."""
    items: dict[str, Item] = dict(held(alone))
    inside = tuple(f"{name}_form." for name in items)
    for name, tensor in alone.state_dict().items():
        if name.startswith(inside):
            continue
        if name not in job.weights.names:
            raise ModelError(
                f'{job.method} adds "{name}" to the network, which a checkpoint has no place for; '
                "load the network whole and use tersor.run"
            )
        original = job.weights.tensor(name)
        if not torch.equal(tensor, original.to(tensor.dtype)):
            items[name] = tensor.to(original.dtype)
    return items


def _put(alone: Alone, name: str, item: Item) -> None:
    path, _, leaf = name.rpartition(".")
    owner = alone.get_submodule(path)
    if isinstance(item, Form):
        hold(owner, leaf, item)
    else:
        getattr(owner, leaf).copy_(item)


def _rows_together(sequences: int, length: int) -> int:
    """How many sequences make a batch, all batches alike."""
    most = max(1, BATCH_TOKENS // length)
    return max(n for n in range(1, sequences + 1) if sequences % n == 0 and n <= most)
