"""The server: the state that all clients are to have, and the log of its changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import FileError
from tersor.federated.layout import (
    check_shapes,
    identity,
    layout_of,
    length,
    put_state,
    state_of,
)
from tersor.federated.messages import (
    FULL,
    MOST_BODIES,
    Download,
    Update,
    changed,
    is_lost,
    read_update,
    write_download,
)
from tersor.federated.options import check_count, check_number
from tersor.federated.packing import Packer, Packing, unpack

LARGEST = 2**24
"""Samples that one client may claim, unless a server allows others."""
FAR = 1000
"""Times the state and a 1 for each number: the length that no update may exceed by default."""
_START = Packing(bits=8)


class Server:
    """Keeps the state of a federation.

    A round is: `download` for each client, `read` of what they answer, `advance` by the mean.

    round: counted from 0; also the version of the state
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        packing: Packing | None = None,
        longest: float | None = None,
        most_samples: int = LARGEST,
        generator: torch.Generator | None = None,
    ) -> None:
        """Everyone begins with the network's weights, or with what clients read of them.

        packing: how the state, at first in 8 bits, and its changes are made small on their way
            down; None sends whole states in floats
        longest: the length that an update may have, as one vector; None for 1000 times the length
            of the state and of a 1 for each number together, which only failed training exceeds
        most_samples: that a client may claim, which is its weight in the mean
        generator: draws roundings without feedback
        """
        if longest is not None:
            check_number("longest", longest)
        check_count("most_samples", most_samples, most=2**32 - 1)
        self.round = 0
        self.layout = layout_of(model)
        self.state = state_of(model, self.layout)
        self._model = model
        self._packer = Packer(self.layout, packing, generator or torch.Generator())
        self._longest, self.most_samples = longest, most_samples
        # By client: the version it is known to hold, and the last round its update was counted in.
        self._held: dict[int, int] = {}
        self._counted: dict[int, int] = {}
        # Bodies that lead from version round - len(log) to this one.
        self._log: list[bytes] = []
        # The state of now in floats, and that of the start in few bits: empty where not made.
        self._full = self._start = b""
        if packing is not None:
            self._begin()

    @property
    def identity(self) -> bytes:
        """Of the state of this round."""
        return identity(self.state)

    def download(self, client: int) -> bytes:
        """What a client needs to begin this round: changes that it missed, or the whole state."""
        held = self._held.get(client)
        first, bodies = FULL, None
        if held is not None and (missed := self.round - held) <= len(self._log):
            first, bodies = held, self._log[len(self._log) - missed :]
        elif self._start and len(self._log) == self.round:
            bodies = [self._start, *self._log]
        if bodies is None or sum(map(len, bodies)) > len(self._whole()):
            first, bodies = FULL, [self._whole()]
        counted = self._counted.get(client, -1) + 1
        return write_download(Download(self.round, counted, first, self.identity, bodies))

    def read(self, client: int, message: bytes) -> Update:
        """One client's answer. Raises FileError, with the reason, for what is not to be counted."""
        self.check_followed(client, message)
        update = read_update(
            message,
            self.layout,
            round_=self.round,
            start=self.identity,
            most_samples=self.most_samples,
        )
        for place in self.layout.variances:
            if (least := float(update.change[place].min())) < 0:
                raise FileError(
                    f"the update has a variance of {least:.4g}, and none is below 0; leave it out"
                )
        found, longest = length(self._differences(update)), self._farthest()
        if not found <= longest:
            raise FileError(
                f"the update is {found:.4g} long, where {longest:g} is the longest allowed; raise "
                "longest if honest clients send such updates"
            )
        self._held[client] = self._counted[client] = self.round
        return update

    def check_followed(self, client: int, message: bytes) -> None:
        """Raises FileError where a client answers that it cannot follow its download.

        It is believed to hold nothing from then on, so that its next download is the whole state.
        """
        if is_lost(message, self.round):
            self._held.pop(client, None)
            raise FileError(
                "the client lost the state that its changes begin with; the next download brings "
                "it the whole one"
            )

    def answered(self, client: int) -> None:
        """The client has this round's state, whatever became of its update."""
        self._held[client] = self.round

    def mean(self, updates: Sequence[Update]) -> list[Tensor]:
        """By samples, summed in double precision."""
        total = sum(update.samples for update in updates)
        found = [torch.zeros(shape, dtype=torch.float64) for shape in self.layout.shapes]
        for update in updates:
            for mean, tensor in zip(found, update.change, strict=True):
                mean.add_(tensor, alpha=update.samples / total)
        return [tensor.float() for tensor in found]

    def advance(self, change: Sequence[Tensor] | None) -> None:
        """The next round, behind a change of trained tensors and with new values of statistics.

        change: None where no update was counted
        """
        if change is None:
            zeros = [torch.zeros(shape) for shape in self.layout.shapes[: self.layout.trained]]
            change = zeros + self.state[self.layout.trained :]
        if self._packer.packing is None:
            trained = [
                s + c for s, c in zip(self.state, change[: self.layout.trained], strict=False)
            ]
            self.state = trained + list(change[self.layout.trained :])
        else:
            self._log.append(self._packer.pack(change))
            self.state = changed(self.state, self._log[-1], self.layout)
        self.round += 1
        self._full = b""
        # What is longer than the state is never sent again; one body more may be the start.
        longest = 5 * self.layout.numbers + 1024
        while len(self._log) >= MOST_BODIES or sum(map(len, self._log)) > longest:
            self._log.pop(0)
        put_state(self._model, self.layout, self.state)

    def store(self) -> dict[str, Any]:
        """All that it must remember between rounds: tensors, numbers and texts."""
        return {
            "made": self._made(),
            "round": self.round,
            "state": self.state,
            "owed": self._packer.residual,
            "drawn": self._packer.generator.get_state(),
            "held": dict(self._held),
            "counted": dict(self._counted),
            "start": _as_tensor(self._start),
            "log": [_as_tensor(body) for body in self._log],
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        """The inverse. Raises ValueError, and changes nothing, for what another server stored."""
        if stored["made"] != self._made():
            raise ValueError(f"it is of a server of {stored['made']}, and this is {self._made()}")
        check_shapes(stored["state"], self.layout.shapes)
        check_shapes(stored["owed"], self.layout.shapes[: self.layout.trained])
        start, log = _as_bytes(stored["start"]), [_as_bytes(body) for body in stored["log"]]
        self._packer.generator.set_state(stored["drawn"])
        self.round, self.state = stored["round"], stored["state"]
        self._packer.residual = stored["owed"]
        self._held, self._counted = dict(stored["held"]), dict(stored["counted"])
        self._start, self._log, self._full = start, log, b""
        put_state(self._model, self.layout, self.state)

    def _made(self) -> str:
        """What must be the same at a server that goes on."""
        return f"{self._packer.packing} for {self.layout}"

    def _farthest(self) -> float:
        if self._longest is not None:
            return self._longest
        return FAR * (length(self.state) + math.sqrt(self.layout.numbers))

    def _differences(self, update: Update) -> list[Tensor]:
        """Of all tensors, statistics too."""
        count = self.layout.trained
        apart = zip(update.change[count:], self.state[count:], strict=True)
        return update.change[:count] + [value - now for value, now in apart]

    def _begin(self) -> None:
        """The start is sent to all: in 8 bits, and what they lose is owed to the first change."""
        first = Packer(self.layout, _START, torch.Generator())
        self._start = first.pack(self.state)
        self.state = unpack(self._start, self.layout)
        self._packer.residual = first.residual
        put_state(self._model, self.layout, self.state)

    def _whole(self) -> bytes:
        if not self._full:
            self._full = Packer(self.layout, None, torch.Generator()).pack(self.state)
        return self._full


def _as_tensor(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
