"""Structure: what was changed about a network beside its tensors, so that it can be done again.

It is noted on the network and kept in its file. A fresh network of the same class gets it before
its tensors are set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import ModelError

_NOTE = "_structure"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """By path of a module.

    cut: whether weights lost slices
    numbers: what modules remember and was changed with them, such as a number of heads
    chains: layers that several take the place of: how they were made, and their ranks
    skipped: blocks that hand on what they are given: the length of the tuple they return, 0 for a
        tensor
    """

    cut: bool = False
    numbers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    chains: Mapping[str, tuple[str, Shape]] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self != Structure()

    def as_json(self) -> dict[str, Any]:
        """Without what is empty."""
        chains = {path: [made_by, list(ranks)] for path, (made_by, ranks) in self.chains.items()}
        fields = {
            "chains": chains,
            "cut": self.cut,
            "numbers": {path: dict(numbers) for path, numbers in self.numbers.items()},
            "skipped": dict(self.skipped),
        }
        return {name: value for name, value in fields.items() if value}

    @classmethod
    def from_json(cls, data: Any) -> Structure:
        """The inverse. Raises ModelError for anything else."""
        _expect(isinstance(data, dict), "it is no mapping")
        _expect(data.keys() <= {"chains", "cut", "numbers", "skipped"}, "it has unknown fields")
        _expect(data.get("cut", True) is True, '"cut" is not true')
        numbers, chains, skipped = (data.get(n, {}) for n in ("numbers", "chains", "skipped"))
        for what in (numbers, chains, skipped):
            _expect(isinstance(what, dict), "it names no modules")
        for row in numbers.values():
            _expect(isinstance(row, dict) and all(map(_counts, row.values())), "a number is none")
        for row in chains.values():
            fits = isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)
            fits = fits and isinstance(row[1], list) and all(map(_counts, row[1]))
            _expect(fits, "a chain is not told by a name and its ranks")
        _expect(all(map(_counts, skipped.values())), "a length is none")
        return cls(
            bool(data.get("cut")),
            numbers,
            {path: (made_by, tuple(ranks)) for path, (made_by, ranks) in chains.items()},
            skipped,
        )


def structure_of(model: nn.Module) -> Structure:
    """What was changed about `model`, nothing for an untouched one."""
    found = getattr(model, _NOTE, None)
    return found if isinstance(found, Structure) else Structure()


def note(model: nn.Module, new: Structure) -> None:
    """Adds to what was changed about `model`.

    What lay inside a block that is skipped now, or inside a layer that is a chain now, is forgotten
    with it.
    """
    old = structure_of(model)
    gone = [*new.skipped, *new.chains]

    def kept(paths: Mapping[str, Any]) -> dict[str, Any]:
        return {p: v for p, v in paths.items() if not any(_inside(p, other) for other in gone)}

    numbers = kept(old.numbers)
    for path, row in new.numbers.items():
        numbers[path] = {**numbers.get(path, {}), **row}
    merged = Structure(
        old.cut or new.cut,
        numbers,
        {**kept(old.chains), **new.chains},
        {**kept(old.skipped), **new.skipped},
    )
    vars(model)[_NOTE] = merged


def resize(layer: nn.Module) -> None:
    """Sets what a layer of torch says of itself to the shape of its weight."""
    weight = layer._parameters.get("weight")
    match layer:
        case nn.Linear() if weight is not None:
            layer.out_features, layer.in_features = weight.shape
        case nn.modules.conv._ConvNd() if weight is not None:
            first, second = weight.shape[:2]
            old = layer.in_channels if layer.transposed else layer.out_channels
            layer.groups = max(1, layer.groups * first // old)
            if layer.transposed:
                layer.in_channels, layer.out_channels = first, second * layer.groups
            else:
                layer.out_channels, layer.in_channels = first, second * layer.groups
        case nn.modules.batchnorm._NormBase():
            known = weight if weight is not None else layer._buffers.get("running_mean")
            if known is not None:
                layer.num_features = len(known)
        case nn.GroupNorm() if weight is not None:
            layer.num_groups = layer.num_groups * len(weight) // layer.num_channels
            layer.num_channels = len(weight)
        case nn.LayerNorm() | nn.RMSNorm() if weight is not None:
            layer.normalized_shape = tuple(weight.shape)
        case nn.Embedding() if weight is not None:
            layer.num_embeddings, layer.embedding_dim = weight.shape
        case nn.RNNBase():
            layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]
            layer.hidden_size = layer.get_parameter("weight_hh_l0").shape[1]
            layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


def shrink(model: nn.Module, shapes: Mapping[str, Shape]) -> None:
    """Gives tensors of a fresh network the shapes that cutting left; their values are yet to come.

    shapes: by name. Raises ModelError for one that cutting cannot have left.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    both = sorted(own.keys() & shapes.keys())
    for name in both:
        before, after = tuple(own[name].shape), shapes[name]
        fits = len(before) == len(after) and all(
            0 < a <= b or a == b for b, a in zip(before, after, strict=True)
        )
        _expect(fits, f'"{name}" of shape {before} cannot have been cut to {after}')
    for name in both:
        tensor = own[name]
        if tuple(tensor.shape) != shapes[name]:
            tensor.data = torch.empty(shapes[name], dtype=tensor.dtype, device=tensor.device)
    for module in model.modules():
        resize(module)


def put_numbers(model: nn.Module, numbers: Mapping[str, Mapping[str, int]]) -> None:
    """Sets what modules remember. Raises ModelError for what they do not, or a larger number."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, row in numbers.items():
        _expect(path in modules, f'there is no module "{path}"')
        for attribute, number in row.items():
            old = vars(modules[path]).get(attribute)
            fits = type(old) is int and 0 < number <= old
            _expect(fits, f'"{attribute}" of "{path}" is {old!r:.40} and cannot become {number}')
    for path, row in numbers.items():
        for attribute, number in row.items():
            setattr(modules[path], attribute, number)


def _inside(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _counts(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _expect(holds: bool, why: str) -> None:
    if not holds:
        raise ModelError(f"the structure does not fit: {why}")
