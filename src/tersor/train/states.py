"""States of the tensors that training changes: the best so far, and a running average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tersor.surgery.hold import held


def statistics(model: nn.Module) -> list[Tensor]:
    """Buffers, as of batch norms, that training changes; those of forms it does not."""
    stored = {id(buffer) for _, form in held(model) for buffer in form.buffers()}
    return [buffer for buffer in model.buffers() if id(buffer) not in stored]


def shared_statistics(model: nn.Module) -> list[Tensor]:
    """Those of `statistics` that many workers average: what a network stores, in floats.

    What it makes anew, as rotary frequencies, is the same on each of them.
    """
    made = {
        id(module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    }
    return [
        buffer
        for buffer in statistics(model)
        if buffer.is_floating_point() and id(buffer) not in made
    ]


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The network's `state_dict` with each held weight as it computes, by its own name."""
    forms = dict(held(model))
    inner = tuple(f"{name}_form." for name in forms)
    plain = {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not name.startswith(inner)
    }
    return plain | {name: form.dense() for name, form in forms.items()}


class Snapshot:
    """The values of tensors at some time."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.note()

    def note(self) -> None:
        """Keeps the values of now."""
        self.values = [tensor.detach().clone() for tensor in self._tensors]

    def restore(self) -> None:
        """Puts the kept values back."""
        put(self._tensors, self.values)


class Average:
    """An exponential moving average of tensors, over fewer steps at the start (as of 1/10).

    Source: Polyak, Juditsky 1992; the start as TensorFlow's `ExponentialMovingAverage` documents it
    for `num_updates`
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float) -> None:
        self._tensors, self._decay, self._steps = tensors, decay, 0
        # In few bits an average would stand still.
        self.values = [
            t.detach().float() if t.is_floating_point() and t.itemsize < 4 else t.detach().clone()
            for t in tensors
        ]
        # An infinity, as in a mask, is no number to average.
        self._moving = [v.is_floating_point() and bool(v.isfinite().all()) for v in self.values]

    @torch.no_grad()
    def add(self) -> None:
        """One step more."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for value, tensor, moving in zip(self.values, self._tensors, self._moving, strict=True):
            if moving:
                value.lerp_(tensor.to(value.dtype), 1 - decay)
            else:
                value.copy_(tensor)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The network is its average inside; what happens to its tensors there happens to it."""
        live = [tensor.detach().clone() for tensor in self._tensors]
        put(self._tensors, self.values)
        shown = [tensor.detach().clone() for tensor in self._tensors]
        try:
            yield
        finally:
            for value, tensor, before in zip(self.values, self._tensors, shown, strict=True):
                changed = tensor.detach() != before
                value.copy_(torch.where(changed, tensor.detach().to(value.dtype), value))
            put(self._tensors, live)

    def restart(self) -> None:
        """Forgets what was before now."""
        self._steps = 0
        put(self.values, self._tensors)

    def state(self) -> dict[str, object]:
        """As a checkpoint holds it."""
        return {"steps": self._steps, "values": self.values}

    def restore(self, state: dict[str, object]) -> None:
        """The inverse of `state`."""
        steps, values = state["steps"], state["values"]
        assert isinstance(steps, int)
        assert isinstance(values, list)
        self._steps = steps
        put(self.values, values)


@torch.no_grad()
def put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Values into tensors, one by one."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def random_numbers(device: torch.device) -> list[Tensor]:
    """The states of torch's own random numbers, with those of the device."""
    more = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *more]


def set_random_numbers(states: Sequence[Tensor], device: torch.device) -> None:
    """The inverse of `random_numbers`."""
    torch.set_rng_state(states[0])
    for state in states[1:] if device.type == "cuda" else ():
        torch.cuda.set_rng_state(state, device)
