"""Product codebook form: neighbouring inputs share one code, which stands for a value of each.

Sister: `Codebook`, with a code for every weight.

Source: Jegou, Douze, Schmid 2011, "Product quantization for nearest neighbor search", IEEE TPAMI
33(1), section 2.2; Stock et al. 2020, arXiv:1907.05686, section 3.1, for weights.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersor.forms.affine import matrix_shape
from tersor.forms.codebook import bits_for
from tersor.forms.form import Form, Part, check_axis, unrows

MOST_VALUES = 4096


class ProductCodebook(Form):
    """weight as (outputs, inputs), input d * b + i of output o = values[codes[o, b], i]

    codes: (outputs, ceil(inputs / d)) uint8, int16 for more than 256 values
    values: (k, d) floats, k <= 4096; the last ones of a row are cut short
    axis: the output channel of the weight; the rest, flattened, are its inputs
    """

    kind = "product_codebook"

    def __init__(
        self,
        codes: Tensor,
        values: Tensor,
        *,
        axis: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """codes, values: as above"""
        super().__init__(shape, dtype)
        self.axis = axis
        self.register_buffer("codes", codes.contiguous())
        self.values = nn.Parameter(values.contiguous(), requires_grad=False)
        self.codes: Tensor

    def dense(self) -> Tensor:
        """The weight."""
        outputs, inputs = matrix_shape(self.shape, self.axis)
        found = self.values.to(self.dtype)[self.codes.int()].reshape(outputs, -1)
        return unrows(found[:, :inputs], self.shape, self.axis)

    def parts(self) -> tuple[Part, ...]:
        """Codes at as many bits as tell the values apart, and the table."""
        bits = bits_for(len(self.values))
        return (("codes", bits), ("values", self.values.element_size() * 8))

    def config(self) -> dict[str, Any]:
        """Layout."""
        return {"axis": self.axis}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        axis, codes, values = config["axis"], parts["codes"], parts["values"]
        check_axis(shape, axis)
        if 0 in shape:
            raise ValueError("an empty weight has no codes")
        outputs, inputs = matrix_shape(shape, axis)
        if values.dim() != 2 or not values.is_floating_point():
            raise ValueError("values must be a matrix of floats")
        count, length = values.shape
        if not 1 <= count <= MOST_VALUES or not 1 <= length <= inputs:
            raise ValueError(f"values must be 1 to {MOST_VALUES} rows of 1 to {inputs}")
        wanted = (outputs, -(-inputs // length))
        kind = code_type(count)
        if tuple(codes.shape) != wanted or codes.dtype != kind:
            raise ValueError(f"codes must be {kind} of shape {wanted}")
        if int(codes.min()) < 0 or int(codes.max()) >= count:
            raise ValueError(f"a code points past the {count} values")
        return cls(codes, values, axis=axis, shape=shape, dtype=dtype)


def code_type(values: int) -> torch.dtype:
    """The type that codes of so many values have."""
    return torch.uint8 if values <= 256 else torch.int16
