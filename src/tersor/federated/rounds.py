"""Federated averaging, round after round: everyone is heard as bytes, and every byte is counted.

Each client trains on data that stays with it, and sends what has changed. The server takes the mean
by samples. With `packing` at both ends that is two orders of magnitude fewer bytes; with `Secure`
the server sees the sum alone; with `Privacy` the result tells of no single client.

Source: McMahan et al. 2017, arXiv:1602.05629, algorithm 1; see `packing`, `secure` and `privacy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tersor.errors import FileError, ModelError, OptionError
from tersor.federated.agreement import Agreement
from tersor.federated.checkpoint import Checkpoint
from tersor.federated.fleet import UPDATE, Fleet
from tersor.federated.grid import Secure
from tersor.federated.hidden import hidden_mean
from tersor.federated.messages import Update
from tersor.federated.options import check_count, check_number
from tersor.federated.privacy import Privacy, private_mean
from tersor.federated.server import Server
from tersor.federated.talk import Talk


@dataclass(frozen=True)
class Round:
    """What happened in a round. Clients by number.

    chosen: who was asked; counted: whose update is in the mean
    silent, refused: why the others' is not
    bytes_down, bytes_up: of all messages, those that were refused too
    judged: what `judge` said behind it
    """

    number: int
    chosen: list[int]
    counted: list[int]
    silent: dict[int, str]
    refused: dict[int, str]
    bytes_down: int
    bytes_up: int
    judged: float | None


@dataclass(frozen=True)
class Federated:
    """All rounds.

    epsilon: what they guarantee each client, where `Privacy` was asked for
    """

    rounds: list[Round]
    epsilon: float | None = None

    @property
    def bytes_down(self) -> int:
        """From the server to clients."""
        return sum(r.bytes_down for r in self.rounds)

    @property
    def bytes_up(self) -> int:
        """From clients to the server."""
        return sum(r.bytes_up for r in self.rounds)


def federate(
    server: Server,
    fleet: Fleet,
    *,
    rounds: int,
    fraction: float = 1.0,
    protection: Privacy | Secure | None = None,
    agreement: Agreement | None = None,
    judge: Callable[[], float] | None = None,
    folder: str | Path | None = None,
    generator: torch.Generator,
) -> Federated:
    """Trains the server's network, in place.

    rounds: at least 1; with a folder, those that it holds are among them
    fraction: of the clients that is asked in a round, above 0, at most 1. With `Privacy` each is
        drawn on its own, with this probability; else so many are, and at least one
    protection: `Privacy` of clients in the result, or `Secure` sums; the same `Secure` as the
        clients' (`Hidden`)
    agreement: of keys, for `Secure`; as the clients have it
    judge: called behind each round
    folder: where what the server must remember is kept behind each round; the same server with the
        same folder goes on where it was killed, to the same weights
    generator: draws the clients, and noise

    A client that is silent or refused is left out of the round, which goes on. Raises ModelError
    where the network keeps statistics that a protection would not cover, and OptionError where the
    folder holds another federation.
    """
    check_count("rounds", rounds)
    check_number("fraction", fraction, most=1.0)
    _check_protection(server, protection)
    settings = {"fraction": fraction, "protection": repr(protection)}
    kept = None if folder is None else Checkpoint(Path(folder), settings)
    done = [] if kept is None else _resumed(kept, server, generator, rounds)
    for _ in range(len(done), rounds):
        chosen = _drawn(fleet.numbers, fraction, protection, generator)
        talk = Talk(server, fleet)
        if isinstance(protection, Secure):
            change = hidden_mean(talk, chosen, protection, agreement)
        elif isinstance(protection, Privacy):
            expected = fraction * len(fleet.numbers)
            change = _private(talk, chosen, protection, expected, generator)
        else:
            change = _plain(talk, chosen)
        number = server.round
        server.advance(change)
        done.append(
            Round(
                number,
                chosen,
                talk.counted,
                talk.silent,
                talk.refused,
                talk.bytes_down,
                talk.bytes_up,
                None if judge is None else judge(),
            )
        )
        if kept is not None:
            kept.store(server, generator, [asdict(each) for each in done])
    spent = protection.epsilon(fraction, rounds) if isinstance(protection, Privacy) else None
    return Federated(done, spent)


def _resumed(
    kept: Checkpoint, server: Server, generator: torch.Generator, rounds: int
) -> list[Round]:
    found = kept.restore(server, generator)
    try:
        done = [Round(**each) for each in found]
    except TypeError as error:
        raise OptionError(
            f"{kept.path} cannot be gone on from: {error}; delete it to start anew, or name "
            "another folder"
        ) from error
    if len(done) > rounds:
        raise OptionError(
            f"rounds={rounds} are fewer than the {len(done)} that {kept.path} holds; ask for "
            f"{len(done)} or more, or name another folder"
        )
    return done


def _check_protection(server: Server, protection: Privacy | Secure | None) -> None:
    if protection is None:
        return
    if not isinstance(protection, Privacy | Secure):
        raise OptionError(
            f"protection={protection!r} must be a Privacy, a Secure or None; try None"
        )
    layout = server.layout
    if layout.trained < len(layout.shapes):
        raise ModelError(
            f"the network keeps {len(layout.shapes) - layout.trained} tensors of statistics, as of "
            f"batch norms, which {type(protection).__name__} does not cover; use group norms, or "
            "protection=None"
        )


def _drawn(
    numbers: Sequence[int],
    fraction: float,
    protection: Privacy | Secure | None,
    generator: torch.Generator,
) -> list[int]:
    if isinstance(protection, Privacy):
        chances = torch.rand(len(numbers), generator=generator)
        return [number for number, x in zip(numbers, chances.tolist(), strict=True) if x < fraction]
    count = max(1, math.floor(fraction * len(numbers) + 0.5))
    order = torch.randperm(len(numbers), generator=generator)[:count]
    return sorted(numbers[place] for place in order.tolist())


def _plain(talk: Talk, chosen: Sequence[int]) -> list[Tensor] | None:
    updates = _read(talk, chosen)
    return talk.server.mean(updates) if updates else None


def _private(
    talk: Talk,
    chosen: Sequence[int],
    privacy: Privacy,
    expected: float,
    generator: torch.Generator,
) -> list[Tensor]:
    """Noise is added to no updates, too: that nobody was drawn must not be seen."""
    changes = [update.change for update in _read(talk, chosen)]
    shapes = talk.server.layout.shapes
    return private_mean(changes, privacy, shapes=shapes, expected=expected, generator=generator)


def _read(talk: Talk, chosen: Sequence[int]) -> list[Update]:
    """The updates that can be counted."""
    found = []
    downloads = {number: talk.server.download(number) for number in chosen}
    for number, message in talk.ask(UPDATE, downloads).items():
        try:
            found.append(talk.server.read(number, message))
        except FileError as error:
            talk.refused[number] = str(error)
            continue
        talk.counted.append(number)
    return found
