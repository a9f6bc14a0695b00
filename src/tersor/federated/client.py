"""A client: its data, the state it holds, and what its updates still owe."""

from __future__ import annotations

import json
import secrets
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tersor.errors import FileError, TaskError
from tersor.federated.layout import check_shapes, identity, layout_of, put_state, state_of
from tersor.federated.local import Local, Trainer
from tersor.federated.messages import FULL, LostError, changed, read_download, write_update
from tersor.federated.packing import Packer, Packing
from tersor.task import Task

_MIX = 0x9E3779B97F4A7C15
"""Times the round, so that neighbouring rounds and seeds draw different numbers."""


class Client:
    """One participant. `receive` a download, then `update`, round after round.

    version: of the state it holds, None before the first download
    samples: of its training data
    packing: how its updates are made small
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        *,
        trainer: Trainer | None = None,
        packing: Packing | None = None,
        seed: int | None = None,
    ) -> None:
        """The network is a place to work in: clients of one process may share it.

        trainer: what to do with the data, `Local()` unless given
        packing: how updates are made small; None sends them as floats
        seed: of the order of batches, and of roundings that are drawn; None draws one
        """
        if not task.has_train:
            raise TaskError("a client needs data; give its task train=(inputs, targets)")
        self.version: int | None = None
        self.round = 0
        self.samples = sum(len(targets) for _, targets in task.train())
        self._task, self._model = task, model
        self.packing = packing
        self._trainer = trainer or Local()
        self._layout = layout_of(model)
        self._packer = Packer(self._layout, packing, torch.Generator())
        self._seed = secrets.randbits(63) if seed is None else seed
        self._state: list[Tensor] = []
        # One more than the round of its last update; that may have been lost.
        self._sent = 0

    @property
    def generator(self) -> torch.Generator:
        """Of this round's roundings."""
        return self._packer.generator

    def receive(self, message: bytes) -> None:
        """Takes over the server's state. Raises FileError for a message that is not one.

        Raises LostError, with the answer to give, where it is of changes to a state that this
        client does not hold.
        """
        found = read_download(message, self._layout)
        state = self._state
        if found.first == FULL:
            state = [torch.zeros(shape) for shape in self._layout.shapes]
            bodies = found.bodies
        elif self.version is None or not 0 <= self.version - found.first <= len(found.bodies):
            raise LostError(
                f"the download changes state {found.first} and this client holds {self.version}",
                found.round,
            )
        else:
            bodies = found.bodies[self.version - found.first :]
        for body in bodies:
            state = changed(state, body, self._layout)
        if identity(state) != found.identity:
            if found.first != FULL:
                raise LostError(
                    f"the download changes another state {found.first} than this client holds",
                    found.round,
                )
            raise FileError("the download leads to another state than it says; ask for it again")
        self._state, self.version, self.round = state, found.round, found.round
        if self._sent and found.counted != self._sent:
            self._packer.undo()
        self._sent = 0

    def update(self) -> bytes:
        """Trains on its data and says what has changed. Raises ModelError where training fails."""
        change = self.trained()
        body = self._packer.pack(change)
        self._sent = self.round + 1
        return write_update(self.round, identity(self._state), self.samples, body)

    def trained(self) -> list[Tensor]:
        """Trains on its data: changes of trained tensors, values of statistics."""
        if self.version is None:
            raise FileError("this client holds no state yet; give it a download first")
        generator = self._drawn_from()
        put_state(self._model, self._layout, self._state)
        # What layers draw themselves, as dropout does, is to be the same each time, too.
        with torch.random.fork_rng():
            torch.manual_seed(generator.initial_seed())
            self._trainer(self._model, self._task, generator)
        count = self._layout.trained
        found = state_of(self._model, self._layout)
        return [f - s for f, s in zip(found[:count], self._state, strict=False)] + found[count:]

    def store(self) -> bytes:
        """All that it must remember between rounds, for clients whose process ends in between."""
        tensors = {f"state.{i}": tensor for i, tensor in enumerate(self._state)}
        tensors |= {f"owed.{i}": tensor for i, tensor in enumerate(self._packer.residual)}
        # Copies, since both may be the same.
        tensors |= {f"before.{i}": tensor.clone() for i, tensor in enumerate(self._packer.before)}
        plain = {"version": self.version, "round": self.round, "sent": self._sent}
        plain["seed"] = self._seed
        return save_tensors(tensors, {"tersor.client": json.dumps(plain)})

    def restore(self, stored: bytes) -> None:
        """The inverse. Raises FileError for other bytes."""
        try:
            size = int.from_bytes(stored[:8], "little")
            header: dict[str, Any] = json.loads(stored[8 : 8 + size])
            plain = json.loads(header["__metadata__"]["tersor.client"])
            _check_rounds(plain["version"] or 0, plain["round"], plain["sent"], plain["seed"])
            tensors = load_tensors(stored)
            count = len(self._layout.shapes) if plain["version"] is not None else 0
            trained = range(self._layout.trained)
            state = [tensors[f"state.{i}"] for i in range(count)]
            owed = [tensors[f"owed.{i}"] for i in trained]
            before = [tensors[f"before.{i}"] for i in trained]
            check_shapes(
                (*state, *owed, *before),
                (*self._layout.shapes[:count], *2 * self._layout.shapes[: len(trained)]),
            )
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileError(
                f"what was stored is no client of this network ({error!r}); begin without it"
            ) from error
        self._state, self._packer.residual, self._packer.before = state, owed, before
        self.version, self.round, self._sent = plain["version"], plain["round"], plain["sent"]
        self._seed = plain["seed"]

    def _drawn_from(self) -> torch.Generator:
        """A generator of this round, so that a round can be repeated and no state must be kept."""
        seed = (self._seed + _MIX * (self.round + 1)) % 2**63
        self._packer.generator.manual_seed(seed ^ 1)
        return torch.Generator().manual_seed(seed)


def _check_rounds(*found: object) -> None:
    """Raises ValueError for what counts no rounds."""
    for value in found:
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{value!r} where a round is counted")
