"""Memory: the exact peak of a forward pass, tensor by tensor, and what the process has used."""

from __future__ import annotations

import gc
import resource
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.measure.figures import Figures
from tersor.measure.running import Inputs, Watching, evaluating, tensors_in
from tersor.measure.size import stored_tensors
from tersor.surgery.hold import held
from tersor.task import call, placed


@dataclass(frozen=True)
class Memory(Figures):
    """Bytes of one evaluation pass.

    activations: most bytes alive at once in tensors that the pass made, its outputs included
    weights: all parameters and buffers, decoded
    inputs: the batch itself
    """

    activations: int
    weights: int
    inputs: int

    @property
    def total(self) -> int:
        """What the pass needs in all."""
        return self.activations + self.weights + self.inputs


def peak_memory(model: nn.Module, inputs: Inputs) -> Memory:
    """Peak of one decoded evaluation pass on the batch `inputs`. The same figure every time.

    Scratch space inside an operator is not seen, nor is what the allocator keeps; see
    `process_peak_rss` for those.
    """
    inputs = placed(model, inputs)
    with evaluating(model):
        # Decoded weights count as weights, though operators give views of them.
        weights = [form.value() for _, form in held(model)]
        known = (*tensors_in(inputs), *model.parameters(), *model.buffers(), *weights)
        given = {_key(t): t for t in known}
        with _Alive(set(given)) as alive:
            outputs = call(model, inputs)
        del outputs
    stored = {
        id(t): torch.Size(t.shape).numel() * t.dtype.itemsize for *_, t in stored_tensors(model)
    }
    batch = {_key(t): t.untyped_storage().nbytes() for t in tensors_in(inputs)}
    return Memory(alive.peak, sum(stored.values()), sum(batch.values()))


def process_peak_rss() -> int:
    """Most bytes of memory that this process ever held: interpreter, libraries, everything."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would report the peak of the parent that started this process, if it was higher.
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _Alive(Watching):  # type: ignore[no-untyped-call]
    """Adds a storage when an operator first returns it, and takes it off when it is freed."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known = known

    def __enter__(self) -> _Alive:
        # Cycles left from before would free at a random moment.
        gc.collect()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
