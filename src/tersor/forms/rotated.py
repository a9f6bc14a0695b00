"""Rotated form: what another form stores is the weight, turned by a random rotation on both sides.

A rotation spreads outliers over whole rows and columns, so that all numbers look drawn from the
same normal distribution, which is what coarse codes are best at. It costs a seed in the file, and
time whenever the weight is read.

Source: Chee et al. 2023 (QuIP), arXiv:2307.13304, section 4, for rotating both sides; Tseng et al.
2024 (QuIP#), arXiv:2402.04396, section 3, for Hadamard transforms with random signs.
Differs: a size that is no power of two is turned by two transforms that overlap.
"""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.forms.affine import from_matrix, matrix_shape
from tersor.forms.form import Form, Part, check_axis

_MASK = 2**64 - 1
_FAN = 64


class Rotated(Form):
    """weight = U^T turned V, with the weight as (outputs, inputs).

    U turns vectors of outputs and V vectors of inputs; see `turn`. Another form holds `turned`.

    turned: (outputs, inputs) float32
    seed: 0 to 2**32 - 1; says the signs of both rotations
    axis: the output channel of the weight; None for one row
    """

    kind = "rotated"

    def __init__(
        self, turned: Tensor, *, seed: int, axis: int | None, shape: tuple[int, ...], dtype: Any
    ) -> None:
        """turned: for example `turn_both(matrix, seed)`, before another form holds it"""
        super().__init__(shape, dtype)
        self.seed, self.axis = seed, axis
        self.register_buffer("turned", turned.contiguous())
        self.turned: Tensor

    def dense(self) -> Tensor:
        """The weight."""
        matrix = turn_back(self.turned.float(), self.seed)
        return from_matrix(matrix, self.shape, self.axis).to(self.dtype)

    def parts(self) -> tuple[Part, ...]:
        """What is held by another form."""
        return (("turned", 32),)

    def config(self) -> dict[str, Any]:
        """Seed, and layout."""
        return {"seed": self.seed, "axis": self.axis}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        seed, axis, turned = config["seed"], config["axis"], parts["turned"]
        check_seed(seed)
        if 0 in shape:
            raise ValueError("an empty weight cannot be rotated")
        check_axis(shape, axis, none="one row")
        wanted = matrix_shape(shape, axis)
        if turned.dtype != torch.float32 or tuple(turned.shape) != wanted:
            raise ValueError(f"turned must be float32 of shape {wanted}")
        return cls(turned, seed=seed, axis=axis, shape=shape, dtype=dtype)


def check_seed(seed: object) -> None:
    """Raises OptionError unless a seed is a whole number of 32 bits."""
    if not (type(seed) is int and 0 <= seed < 2**32):
        raise OptionError(f"seed={seed!r:.40}; choose a whole number from 0 to 2**32 - 1")


def turn_both(matrix: Tensor, seed: int) -> Tensor:
    """U matrix V^T, float32 (outputs, inputs): what `Rotated` stores of it."""
    return turn(turn(matrix.float().T, 2 * seed).T, 2 * seed + 1).contiguous()


def turn_back(turned: Tensor, seed: int) -> Tensor:
    """The inverse of `turn_both`, its transpose."""
    return turn(turn(turned, 2 * seed + 1, back=True).T, 2 * seed, back=True).T


def turn(x: Tensor, seed: int, *, back: bool = False) -> Tensor:
    """Rotates the last dimension of `x`, of size n; `back` undoes it.

    With p the largest power of two that is at most n: random signs, then a Hadamard transform of
    the first p, and the same again of the last p where p < n.
    """
    n = x.shape[-1]
    size = 1 << (n.bit_length() - 1)
    starts = (0, n - size) if size < n else (0,)
    turns = list(zip(starts, signs(n * len(starts), seed).to(x).view(-1, n), strict=True))
    for start, sign in reversed(turns) if back else turns:
        x = x if back else x * sign
        middle = hadamard(x[..., start : start + size])
        x = torch.cat([x[..., :start], middle, x[..., start + size :]], -1)
        x = x * sign if back else x
    return x


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of the last dimension, of size 2**k, its own inverse."""
    size, done = x.shape[-1], 1
    # Along the first dimension the products are of few rows and many columns, which is quick.
    turned = x.reshape(-1, size).T
    while done < size:
        # Bits of the index are transformed independently: up to six of them in one product.
        fan = min(_FAN, size // done)
        turned = _sylvester(fan).to(x) @ turned.reshape(done, fan, -1)
        done *= fan
    return turned.reshape(size, -1).T.reshape(x.shape) / math.sqrt(size)


def _sylvester(size: int) -> Tensor:
    """The matrix of signs (-1)**popcount(i & j)."""
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return torch.from_numpy(matrix)


def signs(count: int, seed: int) -> Tensor:
    """`count` signs, -1 or 1, int8: the bits of SplitMix64 from `seed`, lowest first."""
    number = np.arange(1, -(-count // 64) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(seed & _MASK) + number * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    bits = np.unpackbits(z.astype("<u8").view(np.uint8), bitorder="little")[:count]
    return torch.from_numpy(1 - 2 * bits.astype(np.int8))
