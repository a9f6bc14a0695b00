"""What workers tell each other: an algorithm yields messages, and whoever drives it delivers them.

An algorithm is a generator, written for one worker as its paper is. `in_one_process` runs those of
all workers side by side; `in_processes` runs one, and torch.distributed carries the messages. So a
simulation and a training on many machines run the same code, and bytes are counted at one place.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, distributed

from tersor.errors import OptionError

T = TypeVar("T")
Group: TypeAlias = "distributed.ProcessGroup | None"
"""Of processes; None means all that there are."""


@dataclass(frozen=True)
class Message:
    """Tensors that a worker hands over. Shapes and types are the same on every worker.

    read: what to make of everyone's tensors, in the order of workers, alike on each; None for
        their means, which a network may take on the way
    """

    tensors: list[Tensor]
    read: Callable[[list[list[Tensor]]], Any] | None = None

    @property
    def bytes(self) -> int:
        """On the wire, without what a network adds."""
        return sum(tensor.nbytes for tensor in self.tensors)


Talk: TypeAlias = Generator[Message, Any, T]
"""Yields messages, is sent the answers, and returns a T."""


def mean(tensors: Sequence[Tensor]) -> Talk[list[Tensor]]:
    """The means over all workers, the same on each: an all-reduce."""
    answer: list[Tensor] = yield Message(list(tensors))
    return answer


def gathered(tensors: Sequence[Tensor], read: Callable[[list[list[Tensor]]], T]) -> Talk[T]:
    """What `read` makes of what each worker handed over: an all-gather."""
    answer: T = yield Message(list(tensors), read)
    return answer


def in_one_process(talks: Sequence[Talk[T]]) -> tuple[list[T], int]:
    """Runs the talks of all workers in step. Returns their results, and bytes sent by each."""
    results, sent = [], 0
    answers: list[Any] = [None] * len(talks)
    while True:
        messages = []
        for talk, answer in zip(talks, answers, strict=True):
            try:
                messages.append(talk.send(answer))
            except StopIteration as end:
                results.append(end.value)
        if not messages:
            return results, sent
        _check_alike(messages, len(talks))
        sent += messages[0].bytes
        answers = [_delivered(messages)] * len(talks)


def in_processes(talk: Talk[T], group: Group = None) -> tuple[T, int]:
    """Runs this process's talk with those of the other processes of `group`.

    Returns its result, and the bytes that this process sent. Raises OptionError without a group.
    """
    workers, sent = world(group)[1], 0
    answer: Any = None
    while True:
        try:
            message = talk.send(answer)
        except StopIteration as end:
            return end.value, sent
        sent += message.bytes
        if message.read is None:
            answer = _reduced(message, workers, group)
        else:
            answer = message.read(_all(message, workers, group))


def world(group: Group = None) -> tuple[int, int]:
    """Rank of this process in `group`, and how many there are. Raises OptionError without any."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise OptionError(
            f"group={group!r}: there is no process group in this process; call torch.distributed."
            'init_process_group("gloo") first, in a program that torchrun starts'
        )
    return distributed.get_rank(group), distributed.get_world_size(group)


def _check_alike(messages: Sequence[Message], workers: int) -> None:
    shapes = [[tuple(tensor.shape) for tensor in message.tensors] for message in messages]
    if len(messages) != workers or any(shape != shapes[0] for shape in shapes):
        counts = sorted({len(shape) for shape in shapes})
        raise OptionError(
            f"gradients: workers hand over tensors that differ in number ({counts}) or in shape; "
            "give each worker the gradients of the same parameters in the same order"
        )


def _delivered(messages: Sequence[Message]) -> Any:
    """What every worker is told, made once for all of them."""
    if (read := messages[0].read) is not None:
        return read([message.tensors for message in messages])
    columns = zip(*(message.tensors for message in messages), strict=True)
    return [torch.stack(column).mean(0) for column in columns]


def _reduced(message: Message, workers: int, group: Group) -> list[Tensor]:
    """Means, by one all-reduce of all tensors in a row."""
    flat = torch.cat([tensor.reshape(-1) for tensor in message.tensors])
    distributed.all_reduce(flat, group=group)
    parts = torch.split(flat / workers, [tensor.numel() for tensor in message.tensors])
    return [part.view_as(old) for part, old in zip(parts, message.tensors, strict=True)]


def _all(message: Message, workers: int, group: Group) -> list[list[Tensor]]:
    """Every worker's tensors, by one all-gather of their bytes in a row."""
    flat = torch.cat([_as_bytes(tensor) for tensor in message.tensors])
    rows = [torch.empty_like(flat) for _ in range(workers)]
    distributed.all_gather(rows, flat, group=group)
    sizes = [tensor.nbytes for tensor in message.tensors]
    return [
        # Copies, for a part that starts at an odd byte cannot be read as wider numbers.
        [
            part.clone().view(old.dtype).view_as(old)
            for part, old in zip(torch.split(row, sizes), message.tensors, strict=True)
        ]
        for row in rows
    ]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
