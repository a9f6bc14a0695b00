"""What every form can do: give its weight back, and say how many bits it stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tersor.errors import OptionError

Part = tuple[str, int]
"""A tensor that a form stores: its attribute name, and the bits that one element needs."""


class Form(nn.Module):
    """A stored weight.

    A subclass registers its tensors as parameters or buffers (contiguous), lists them in `parts`,
    and computes the weight in `dense`. A part may itself be held by a form (`hold(form, "codes",
    Bitmask.encode(form.codes))`): then reading the attribute decodes it, and the inner form's
    bits count instead.

    kind: the form's name in a file
    shape: shape of the weight
    dtype: what `dense` returns; `model.half()` changes it, never the stored tensors
    """

    kind: ClassVar[str]
    training_only: ClassVar[bool] = False

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Subclasses pass the weight's shape and dtype."""
        super().__init__()
        self.shape = tuple(int(n) for n in shape)
        self.dtype = dtype
        self._decoded: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight, shape `self.shape`, dtype `self.dtype`."""
        raise NotImplementedError

    def parts(self) -> tuple[Part, ...]:
        """The stored tensors, in the order of the constructor."""
        raise NotImplementedError

    def tunable(self) -> tuple[str, ...]:
        """Parts that may be trained while the codes stay: by default every float one.

        Those that another form holds are that form's.
        """
        return tuple(
            name
            for name, _ in self.parts()
            if f"{name}_form" not in self._modules and getattr(self, name).is_floating_point()
        )

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that are not tensors, as plain JSON values."""
        raise NotImplementedError

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """The inverse of (`config`, parts): what a loader calls. Raises ValueError on misfits."""
        raise NotImplementedError

    def stored_bits(self) -> int:
        """Bits of all stored tensors before entropy coding, nested forms included."""
        total = 0
        for name, bits in self.parts():
            inner = self._modules.get(f"{name}_form")
            total += (
                inner.stored_bits()
                if isinstance(inner, Form)
                else getattr(self, name).numel() * bits
            )
        return total

    def value(self) -> Tensor:
        """`dense()`, or the copy that `decoded(model)` keeps."""
        return self.dense() if self._decoded is None else self._decoded

    def forms(self) -> Iterator[Form]:
        """This form and every form nested in it."""
        yield from (module for module in self.modules() if isinstance(module, Form))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `half()` or `to(bfloat16)` speak of the weight: they change what `dense` returns, while
        # codes and scales keep the precision they were stored with and only move to the device.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """For `print(model)`."""
        per_weight = self.stored_bits() / max(1, _numel(self.shape))
        return f"{self.kind}, shape={self.shape}, bits/weight={per_weight:.2f}"


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def check_axis(shape: tuple[int, ...], axis: object, *, none: str = "") -> None:
    """Raises OptionError unless `axis` is a dimension of a weight of this shape.

    none: what None stands for, where it may be given
    """
    if (axis is None and none) or (type(axis) is int and 0 <= axis < len(shape)):
        return
    raise OptionError(
        f"axis={axis!r:.40} is no dimension of a weight of shape {shape}; choose 0 to "
        f"{len(shape) - 1}{none and f', or None for {none}'}"
    )


def rows(weight: Tensor, axis: int) -> Tensor:
    """Lays a weight out as (output channels, inputs): channel `axis` first, the rest flattened."""
    moved = weight.movedim(axis, 0)
    return moved.reshape(len(moved), _numel(moved.shape[1:]))


def unrows(matrix: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The inverse of `rows`, contiguous."""
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return matrix.reshape(moved).movedim(0, axis).contiguous()
