"""A checkpoint's tensors under the names that a network has for them, loaded a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tersor.checkpoints.layout import Held
from tersor.checkpoints.quantizing import pieces
from tersor.errors import ModelError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Weights:
    """What `model` has to be filled with.

    names: in the checkpoint, by the name that the network has
    """

    def __init__(self, model: nn.Module, held: Mapping[str, Held]) -> None:
        """Raises ModelError unless the checkpoint has every tensor, in its shape, as floats."""
        self._held = held
        self.names: dict[str, str] = {}
        wanted = dict(_stored(model))
        prefix = getattr(model, "base_model_prefix", "")
        # Of tied tensors a checkpoint mostly has one name.
        found = {
            id(tensor): own
            for name, tensor in wanted.items()
            if (own := self._named(name, prefix)) is not None
        }
        for name, tensor in wanted.items():
            own = self._named(name, prefix) or found.get(id(tensor))
            if own is None:
                raise ModelError(
                    f'the checkpoint lacks "{name}" of shape {tuple(tensor.shape)}, which '
                    f"{type(model).__name__} has; download it in full, or check config.json"
                )
            self._check(own, tensor)
            self.names[name] = own

    def tensor(self, name: str) -> Tensor:
        """Its elements, where they lie."""
        return self._held[self.names[name]].tensor()

    def fill(self, module: nn.Module, path: str, *, inside: bool = True) -> None:
        """Loads the tensors of a module as float32. inside: those of its children as well"""
        for prefix, owner in module.named_modules(prefix=path) if inside else [(path, module)]:
            for name, old in [*owner._parameters.items(), *owner._buffers.items()]:
                full = f"{prefix}.{name}" if prefix else name
                if old is None or full not in self.names:
                    continue
                value = self.tensor(full)
                # Copied even where it is float32 already: methods change weights in place.
                value = value.to(torch.float32 if old.is_floating_point() else old.dtype, copy=True)
                self._held[self.names[full]].shard.forget()
                if name in owner._parameters:
                    value = nn.Parameter(value, requires_grad=False)
                setattr(owner, name, value)

    def forget(self) -> None:
        """Lets go of the pages that were read, which count as memory while they are mapped."""
        for shard in {id(held.shard): held.shard for held in self._held.values()}.values():
            shard.forget()

    def check_finite(self) -> Iterator[int]:
        """Reads all weights once, yielding the bytes of each. Raises ModelError for NaN."""
        for name, own in self.names.items():
            tensor = self._held[own].tensor()
            if not all(bool(piece.isfinite().all()) for piece in pieces(tensor)):
                bad = sum(int((~piece.isfinite()).sum()) for piece in pieces(tensor))
                raise ModelError(
                    f'"{name}" of shape {tuple(tensor.shape)} holds NaN or infinity in {bad} of '
                    f"its {tensor.numel()} values; load a checkpoint that trained cleanly"
                )
            self._held[own].shard.forget()
            yield tensor.nbytes

    def _named(self, name: str, prefix: str) -> str | None:
        """The name in the checkpoint: some were saved from the network without its head."""
        for candidate in (name, name.removeprefix(f"{prefix}.")):
            if candidate in self._held:
                return candidate
        return None

    def _check(self, own: str, wanted: Tensor) -> None:
        stored = self._held[own].stored
        if stored.shape != tuple(wanted.shape):
            raise ModelError(
                f'"{own}" has shape {stored.shape} in the checkpoint and {tuple(wanted.shape)} in '
                "the network; check that config.json belongs to these weights"
            )
        dtype = self._held[own].tensor().dtype
        if wanted.is_floating_point() and dtype not in _FLOATS:
            raise ModelError(
                f'"{own}" of shape {stored.shape} is stored as {stored.kind}, which was quantized '
                "already; take the checkpoint that it was made from"
            )


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer, under all its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, tensor
