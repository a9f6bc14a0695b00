"""Processes that train one network: the same start, averaged gradients, the same end.

Pass `Averaging` to `fit` as a regime, `Portion` as its lessons and `agreed` as its judge, in a
program that torchrun starts. `add_hook` is for a loop of your own, with DistributedDataParallel.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from tersor.errors import OptionError
from tersor.train.distributed.compressor import Compressor
from tersor.train.distributed.exchange import Group, gathered, in_processes, mean, world
from tersor.train.distributed.traffic import Traffic, plain_bytes
from tersor.train.regime import Regime
from tersor.train.states import shared_statistics

_ASKING = 16
"""Steps from one look at all clocks to the next."""
_KEPT = 2
"""Checkpoints of each process, at most."""


class Together(Regime):
    """What all regimes of many processes share: they keep checkpoints at the same steps.

    A process may be killed before it has kept one that another has; so each keeps the one before
    too, and all go on from the last that they have in common.

    group: of processes; None means all
    traffic: what this one has sent
    about: what tells a way of exchange from others, kept with checkpoints
    momentum: that the exchange brings, beside which an optimizer must have none
    trained: parameters that are trained, in the same order on all processes; None for all of the
        network that want a gradient
    """

    alone = False
    about = ""
    momentum = 0.0

    def __init__(self, group: Group = None) -> None:
        self.traffic = Traffic()
        self.trained: Sequence[nn.Parameter] | None = None
        self.group = group
        self._calls = 0

    def _all(self, model: nn.Module) -> list[nn.Parameter]:
        return trained_of(model) if self.trained is None else list(self.trained)

    def due(self, due: bool) -> bool:
        """Whether any process's clock says so; they ask each other now and then alone."""
        self._calls += 1
        if self._calls % _ASKING:
            return False
        own = torch.tensor([float(due)], device=_device(self.group))
        return float(in_processes(mean([own]), self.group)[0][0]) > 0

    def common(self, places: Sequence[int] | None) -> Sequence[int] | None:
        """Those that every process has. Raises OptionError where only some keep checkpoints."""
        own = [places is not None, *(places or ()), -1, -1][: 1 + _KEPT]
        numbers = torch.tensor(own, dtype=torch.int64, device=_device(self.group))
        found, _ = in_processes(gathered([numbers], _numbers), self.group)
        keeping = [bool(one[0]) for one in found]
        if not all(keeping):
            if any(keeping):
                raise OptionError(
                    f"log: {sum(keeping)} of {len(keeping)} processes keep checkpoints; give each "
                    "one a TrainingLog with a folder of its own, or none of them"
                )
            return None
        return [place for place in places or () if all(place in one[1:] for one in found)]


class Averaging(Together):
    """Averages the gradients of all processes, so that their weights stay the same.

    A judge should be the same on all of them: see `agreed`. Checkpoints differ, by what a process
    has yet to send: give each rank's `TrainingLog` a folder of its own.

    compressor: this process's own; every process needs one made alike
    group: of processes; None means all

    Raises OptionError in `begin` without a process group, and where networks differ.
    """

    def __init__(self, compressor: Compressor, *, group: Group = None) -> None:
        super().__init__(group)
        self._compressor = compressor
        self.about, self.momentum = repr(compressor), compressor.momentum

    def begin(self, model: nn.Module, steps: int) -> None:
        """Every process starts from the weights of the first."""
        self._model, self._trained = model, self._all(model)
        begin_alike(model, self.group)

    def gradients(self, step: int) -> None:
        """Puts the mean in the place of each gradient; one that is None counts as zero."""
        own = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad
            for weight in self._trained
        ]
        averaged, sent = in_processes(self._compressor.average(own), self.group)
        for weight, gradient in zip(self._trained, averaged, strict=True):
            weight.grad = gradient
        self.traffic.sent += sent
        self.traffic.plain += plain_bytes(self._trained)

    def enforce(self) -> None:
        """Averages what batch norms remember of each process's batches."""
        self.traffic.sent += average_statistics(self._model, self.group)

    def state(self) -> dict[str, Any]:
        """Of this process; another's differs."""
        traffic = [self.traffic.sent, self.traffic.plain]
        return {"compressor": self._compressor.state(), "traffic": traffic}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self._compressor.restore(state["compressor"])
        self.traffic.sent, self.traffic.plain = state["traffic"]


def agreed(judge: Callable[[], float], group: Group = None) -> Callable[[], float]:
    """A judge whose word is the mean of all processes' words, so that they keep the same state."""

    def common() -> float:
        own = torch.tensor([judge()], dtype=torch.float64, device=_device(group))
        return float(in_processes(mean([own]), group)[0][0])

    return common


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, in the order of the network."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def begin_alike(model: nn.Module, group: Group = None) -> None:
    """Gives every process the weights and statistics of the first.

    Raises OptionError on each of them where they differ in number, shape or type.
    """
    tensors = [*model.parameters(), *model.buffers()]
    layout = str([(tuple(t.shape), str(t.dtype), t.requires_grad) for t in tensors])
    own = torch.tensor([len(tensors), zlib.crc32(layout.encode())], device=_device(group))
    found, _ = in_processes(gathered([own], _numbers), group)
    if any(one != found[0] for one in found):
        raise OptionError(
            f"model: processes have networks that differ, with {[one[0] for one in found]} tensors "
            "by rank; build the same network in each, with the same layers frozen"
        )
    with torch.no_grad():
        for tensor in tensors:
            distributed.broadcast(tensor.data, group=group, group_src=0)


def average_statistics(model: nn.Module, group: Group = None) -> int:
    """Gives every process the mean of all running statistics. Returns the bytes that it sent."""
    found = shared_statistics(model)
    if not found:
        return 0
    # In double, so that what never changes stays as it is, be it the smallest float.
    means, sent = in_processes(mean([buffer.double() for buffer in found]), group)
    for buffer, value in zip(found, means, strict=True):
        buffer.copy_(value)
    return sent


def _numbers(everyone: list[list[Tensor]]) -> list[list[int]]:
    return [parts[0].tolist() for parts in everyone]


def _device(group: Group) -> torch.device:
    """Where tensors must lie for the processes of `group` to exchange them."""
    world(group)
    if distributed.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
