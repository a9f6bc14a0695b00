"""Plain modules that hold the tensors of a rebuilt network, and its named outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import FileError
from tersor.program.program import split_name


class Container(nn.Module):
    """A module without a forward: it only holds tensors and other containers by name.

    kind: layer type of the original ("Conv2d"), or "" where it owned no tensors
    """

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind

    def __getitem__(self, index: int) -> nn.Module:
        child = self._modules.get(str(index))
        if child is None:
            raise IndexError(f"there is no child {index}; there are {list(self._modules)}")
        return child

    def _get_name(self) -> str:
        return self.kind or "Container"


class Record(OrderedDict[str, Any]):
    """Named outputs, read as `out["name"]`, `out.name` or by position as `out[0]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {list(self)}") from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs in order, without their names."""
        return tuple(self.values())


def _flatten_record(record: Record) -> tuple[list[Any], list[str]]:
    return list(record.values()), list(record)


# Lets a model with named outputs be exported again.
torch.utils._pytree.register_pytree_node(
    Record,
    _flatten_record,
    lambda values, names: Record(zip(names, values, strict=True)),
    serialized_type_name="tersor.Record",
    flatten_with_keys_fn=lambda record: (
        [(torch.utils._pytree.MappingKey(name), value) for name, value in record.items()],
        list(record),
    ),
)


def skeleton(
    tensors: Mapping[str, Tensor | Sequence[int]],
    kinds: Mapping[str, str] | None = None,
    buffers: Collection[str] = (),
) -> Container:
    """Builds nested containers that hold `tensors` under their dotted names.

    tensors: name -> the tensor, or its shape for a placeholder on the meta device
    kinds: path of a module -> its layer type (`Program.kinds`)
    buffers: names that become buffers; integer tensors always do

    One tensor given under two names is shared by both.
    """
    kinds, root = kinds or {}, Container()
    shared: dict[int, nn.Parameter] = {}
    for path in kinds:
        _descend(root, path).kind = kinds[path]
    for name, given in tensors.items():
        path, leaf = split_name(name)
        tensor = given if isinstance(given, Tensor) else torch.empty(tuple(given), device="meta")
        holder = _descend(root, path)
        if hasattr(holder, leaf):
            raise FileError(f'tensor "{name}" clashes with another part of the stored model')
        if name in buffers or not (tensor.is_floating_point() or tensor.is_complex()):
            holder.register_buffer(leaf, tensor)
        else:
            parameter = shared.setdefault(id(given), _parameter(tensor))
            holder.register_parameter(leaf, parameter)
    return root


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _descend(root: Container, path: str) -> Container:
    here = root
    for part in path.split(".") if path else ():
        child = here._modules.get(part)
        if child is None:
            if hasattr(here, part):
                raise FileError(f'module "{path}" clashes with another part of the stored model')
            child = Container()
            here.add_module(part, child)
        if not isinstance(child, Container):
            raise FileError(f'module "{path}" clashes with another part of the stored model')
        here = child
    return here
