"""What is exchanged: the trained tensors of a network, and the statistics beside them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.codec.coders import Shape
from tersor.codec.geometry import matrix_of
from tersor.errors import ModelError
from tersor.train.states import put, shared_statistics


@dataclass(frozen=True)
class Layout:
    """Shapes in the network's order. Both ends know them, so that no message has to say them.

    trained: how many of them are trained; the others are statistics, as of batch norms
    variances: places of those that are never negative
    left_out: places among the network's buffers of those that are no statistics but masks: nothing
        but infinities and zeros
    """

    shapes: tuple[tuple[int, ...], ...]
    trained: int
    variances: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()

    @property
    def numbers(self) -> int:
        """In all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def matrices(self) -> list[Shape]:
        """Of the trained tensors, as they are coded."""
        return [matrix_of(shape, shape) for shape in self.shapes[: self.trained]]


def layout_of(model: nn.Module) -> Layout:
    """Raises ModelError where a network has nothing to train."""
    left_out = _masks(model)
    parameters, buffers = _tensors(model, left_out)
    if not parameters:
        raise ModelError(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is "
            "nothing to exchange; train it before it is quantized, or call requires_grad_(True)"
        )
    shapes = tuple(tuple(tensor.shape) for tensor in (*parameters, *buffers))
    spread = {id(b) for name, b in model.named_buffers() if name.endswith("running_var")}
    places = (at for at, b in enumerate(buffers, len(parameters)) if id(b) in spread)
    return Layout(shapes, len(parameters), tuple(places), left_out)


def state_of(model: nn.Module, layout: Layout) -> list[Tensor]:
    """Copies in float32 on the CPU. Whole-number buffers, as counts of batches, are not in it."""
    found = itertools.chain(*_tensors(model, layout.left_out))
    return [tensor.detach().to("cpu", torch.float32, copy=True) for tensor in found]


def put_state(model: nn.Module, layout: Layout, state: Sequence[Tensor]) -> None:
    """The inverse of `state_of`, in place."""
    with torch.no_grad():
        put([*itertools.chain(*_tensors(model, layout.left_out))], state)


def identity(state: Sequence[Tensor]) -> bytes:
    """8 bytes that tell one state from another, to find ends that no longer agree."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in state:
        # Adding 0 makes one of both zeros.
        digest.update((tensor + 0.0).contiguous().numpy().tobytes())
    return digest.digest()


def check_shapes(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises ValueError unless these are float32 tensors of these shapes."""
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != torch.float32:
            raise ValueError(f"{tuple(tensor.shape)} in {tensor.dtype} where {tuple(shape)} is")


def length(tensors: Sequence[Tensor]) -> float:
    """Of all of them as one vector, in double precision."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _masks(model: nn.Module) -> tuple[int, ...]:
    """Places among the shared statistics. Those of norms are none even where they have run away."""
    norms = {id(b) for name, b in model.named_buffers() if "running_" in name}
    return tuple(
        at
        for at, b in enumerate(shared_statistics(model))
        if id(b) not in norms and b.isinf().any() and bool((b.isinf() | (b == 0)).all())
    )


def _tensors(model: nn.Module, left_out: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Trained parameters and floating statistics; tied ones once."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    found = enumerate(shared_statistics(model))
    return parameters, [buffer for at, buffer in found if at not in left_out]
