"""Skipping: a block computes nothing any more and hands on what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.surgery.structure import Structure, note


class Skipped(nn.Module):
    """Returns its first input. What code around the block reads of its settings is still there."""

    def __init__(self, block: nn.Module, several: int) -> None:
        """several: length of the tuple that the block returns, 0 for a tensor"""
        super().__init__()
        settings = {k: v for k, v in vars(block).items() if not k.startswith("_")}
        self.__dict__.update(settings)
        self.several = several

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first input; in a tuple, with nothing beside it, where the block gave one."""
        first = next(iter((*args, *kwargs.values())))
        return (first, *[None] * (self.several - 1)) if self.several else first


def skip(model: nn.Module, blocks: Mapping[str, int]) -> nn.Module:
    """Skips blocks, in place. blocks: by path, see `Structure.skipped`.

    Raises ModelError for a path without a module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in blocks:
        if not path or path not in modules:
            raise ModelError(f'the structure does not fit: there is no block "{path}" to skip')
    for path, several in blocks.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Skipped(modules[path], several))
    note(model, Structure(skipped=dict(blocks)))
    return model


def returned(given: Any, outcome: Any) -> int | None:
    """What a block would return if it were skipped, as in `Structure.skipped`; None if it cannot.

    given: its first input; outcome: what it returns
    """
    if isinstance(outcome, Tensor):
        return 0 if _alike(given, outcome) else None
    if isinstance(outcome, tuple) and outcome and _alike(given, outcome[0]):
        return len(outcome) if all(part is None for part in outcome[1:]) else None
    return None


def _alike(given: Any, outcome: Any) -> bool:
    return (
        isinstance(given, Tensor)
        and isinstance(outcome, Tensor)
        and given.shape == outcome.shape
        and given.dtype == outcome.dtype
    )
