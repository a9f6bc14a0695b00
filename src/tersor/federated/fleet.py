"""Whom a server talks to: clients in this process, or an engine that carries messages to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import nn

from tersor.errors import CompressError, FileError, OptionError
from tersor.federated.client import Client
from tersor.federated.local import Trainer
from tersor.federated.messages import LostError
from tersor.federated.options import check_number
from tersor.federated.packing import Packing
from tersor.task import Task

UPDATE = "update"
Network: TypeAlias = Callable[[int, int, str, bytes], bytes | None]
"""From (round, client, step, answer) to what arrives of the answer, None for nothing."""


class Member(Protocol):
    """One client as messages reach it."""

    def answer(self, step: str, message: bytes) -> bytes:
        """Raises CompressError where it cannot."""
        ...


@dataclass(frozen=True)
class Answers:
    """What came back, by client.

    silent: why nothing came from the others
    """

    messages: dict[int, bytes] = field(default_factory=dict)
    silent: dict[int, str] = field(default_factory=dict)


class Fleet(Protocol):
    """All clients."""

    @property
    def numbers(self) -> Sequence[int]:
        """Of the clients that can be asked now."""
        ...

    def ask(self, round_: int, step: str, messages: Mapping[int, bytes]) -> Answers:
        """Sends each client its message and waits for the answers, for some time."""
        ...


@dataclass
class Plain:
    """A client whose updates the server may read."""

    client: Client

    def answer(self, step: str, message: bytes) -> bytes:
        """An update, to a download; to one that it cannot follow, that it needs the whole state."""
        if step != UPDATE:
            raise FileError(f"this client knows no step {step!r}; make it a Hidden one")
        try:
            self.client.receive(message)
        except LostError as lost:
            return lost.answer
        return self.client.update()


class Simulation:
    """Clients in this process, behind a network that may lose or alter answers."""

    def __init__(self, members: Sequence[Member], network: Network | None = None) -> None:
        """Clients are numbered in their order, from 0."""
        if not members:
            raise OptionError("members=[] leaves nobody to train; give at least one client")
        self._members = members
        self._network = network

    @property
    def numbers(self) -> Sequence[int]:
        return range(len(self._members))

    def ask(self, round_: int, step: str, messages: Mapping[int, bytes]) -> Answers:
        """A client that raises CompressError is silent, with its reason."""
        found = Answers()
        for number, message in messages.items():
            try:
                answer: bytes | None = self._members[number].answer(step, message)
            except CompressError as error:
                found.silent[number] = str(error)
                continue
            assert answer is not None
            if self._network is not None:
                answer = self._network(round_, number, step, answer)
            if answer is None:
                found.silent[number] = "never answered"
            else:
                found.messages[number] = answer
        return found


def clients_of(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    trainer: Trainer | None = None,
    packing: Packing | None = None,
    generator: torch.Generator,
) -> list[Client]:
    """A client for each task. They share one copy of the network to work in.

    trainer, packing: as of `Client`
    generator: draws their seeds
    """
    workspace = copy.deepcopy(model)
    return [
        Client(
            task,
            workspace,
            trainer=trainer,
            packing=packing,
            seed=int(torch.randint(2**62, (), generator=generator)),
        )
        for task in tasks
    ]


def lossy(share: float, generator: torch.Generator) -> Network:
    """A network in which each client's answer is lost with the probability `share`.

    Steps before the answer reach the server, as of a client that dies while it trains.
    """
    check_number("share", share, most=1.0, zero=True)

    def carried(round_: int, client: int, step: str, message: bytes) -> bytes | None:
        if step not in (UPDATE, "masked"):
            return message
        lost = float(torch.rand((), generator=generator)) < share
        return None if lost else message

    return carried
