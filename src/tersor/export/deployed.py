"""A file of some runtime as a module: inputs and outputs arranged as the model arranged them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.program.skeleton import Record


class Deployed(nn.Module):
    """Called like the model that the file was made from, on the CPU.

    Inputs go by position or by name. A subclass computes `_run`.
    """

    def __init__(
        self,
        path: Path,
        types: Mapping[str, torch.dtype],
        outputs: list[str],
        call: Mapping[str, Any],
    ) -> None:
        """Keeps how the file is called.

        types: what each of the file's inputs is
        outputs: names of the file's outputs, in their order
        call: the model's arguments and what it returns, as trees of these names; empty for a file
            that tersor did not write, which takes its inputs in their order and returns a tensor,
            or a tuple
        """
        super().__init__()
        self.path, self._types, self._names = path, dict(types), outputs
        self._inputs: dict[str, Any] = call.get("inputs") or {name: name for name in types}
        tensors = [{"tensor": name} for name in outputs]
        self._output = call.get("output") or (
            tensors[0] if len(tensors) == 1 else {"tuple": tensors}
        )

    def _run(self, feed: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        raise NotImplementedError

    @property
    def input_names(self) -> list[str]:
        """Names of the arguments, in their order."""
        return list(self._inputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, as torch tensors."""
        given = dict(zip(self._inputs, args, strict=False)) | kwargs
        unknown = given.keys() - self._inputs.keys()
        if unknown or len(args) > len(self._inputs):
            raise ModelError(
                f"{self.path.name} takes {self.input_names}, not {len(args)} inputs by position "
                f"and {sorted(kwargs)} by name"
            )
        feed: dict[str, Any] = {}
        for name, tree in self._inputs.items():
            self._collect(tree, given.get(name), name, feed)
        found = zip(self._names, self._run(feed), strict=True)
        return _arranged(self._output, {name: torch.from_numpy(array) for name, array in found})

    def _collect(self, tree: Any, value: Any, name: str, feed: dict[str, Any]) -> None:
        if isinstance(tree, str):
            if not isinstance(value, Tensor):
                raise ModelError(
                    f"input {name!r} of {self.path.name} must be a tensor, not {value!r}"
                )
            if tree in self._types:
                feed[tree] = value.detach().cpu().to(self._types[tree]).contiguous().numpy()
        elif isinstance(tree, Mapping | list):
            for key, part in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
                try:
                    inner = value[key]
                except (TypeError, KeyError, IndexError):
                    raise ModelError(
                        f"input {name!r} of {self.path.name} must hold {key!r}, which "
                        f"{value!r:.60} does not"
                    ) from None
                self._collect(part, inner, f"{name}.{key}", feed)


def _arranged(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = tree.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "list":
            return [_arranged(part, tensors) for part in content]
        case "tuple":
            return tuple(_arranged(part, tensors) for part in content)
        case "dict" | "record":
            fields = {name: _arranged(part, tensors) for name, part in content.items()}
            return Record(fields) if kind == "record" else fields
    return content
