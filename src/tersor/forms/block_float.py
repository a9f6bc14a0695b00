"""Block-float form: 4-bit floats with a narrow scale per block of inputs, NVFP4 or MXFP4.

The levels lie closer together near zero, where most weights are, and small blocks keep one large
weight from spoiling many. Sister: `Affine`, whose levels are even and whose groups are of any size.

Source: Open Compute Project 2023, "OCP Microscaling Formats (MX) Specification" v1.0, sections 5.3
and 6.3; NVIDIA 2025, "Pretraining Large Language Models with NVFP4", arXiv:2509.25149, section 2
and appendix B; Cook et al. 2025 (Four Over Six), arXiv:2512.02010, section 3.
Differs: a code is the signed place of its value among the magnitudes, not its bit pattern, so that
an entropy coder sees numbers in order; E2M1's minus zero becomes zero.
"""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from tersor.errors import OptionError
from tersor.forms.affine import as_matrix, from_matrix, matrix_shape, split_groups, spread
from tersor.forms.form import Form, Part, check_axis

Format = Literal["nvfp4", "mxfp4"]
BLOCK = {"nvfp4": 16, "mxfp4": 32}
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*MAGNITUDES, 0.0, *(-size for size in reversed(MAGNITUDES[1:])))
"""The value of each code; negative codes count from the end. Code -8 is unused."""

_MOST_E4M3 = 448.0
_LEAST_E4M3 = 2.0**-9
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class BlockFloat(Form):
    """weight[o, i] = VALUES[codes[o, i]] * factor(scale[o, g]),   g = i // block

    nvfp4: block 16, factor = scale * tensor_scale; mxfp4: block 32, factor = 2**(scale - 127)

    codes: (outputs, inputs) int8 in [-7, 7], the sign and the place in MAGNITUDES
    scale: (outputs, blocks) float8_e4m3fn >= 0 (nvfp4), or uint8 exponents below 255 (mxfp4)
    tensor_scale: (1,) float32 >= 0, None for mxfp4
    format: "nvfp4" or "mxfp4"
    axis: the output channel of the weight; the rest, flattened, are its inputs, and the last block
        may be shorter
    """

    kind = "block_float"
    bits = 4

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        tensor_scale: Tensor | None,
        *,
        format: Format,
        axis: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        """Use `encode` to make one from a weight."""
        super().__init__(shape, dtype)
        self.format, self.axis = format, axis
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("tensor_scale", tensor_scale)
        self.codes: Tensor
        self.scale: Tensor
        self.tensor_scale: Tensor | None

    @classmethod
    def encode(
        cls,
        weight: Tensor,
        *,
        format: Format = "nvfp4",
        four_over_six: bool = False,
        axis: int = 0,
    ) -> Self:
        """Rounds to the nearest value, ties to an even mantissa, what is beyond the last to it.

        four_over_six: for nvfp4, lets each block bring its largest weight to 6 or to 4, whichever
            has the less squared error: between 4 and 6 there is no value
        """
        check_format(tuple(weight.shape), format=format, axis=axis)
        if four_over_six and format != "nvfp4":
            raise OptionError(
                f"four_over_six=True for {format}, whose scales are powers of two; it needs nvfp4"
            )
        matrix = as_matrix(weight.detach().float(), axis)
        grouped = split_groups(matrix, BLOCK[format])
        largest = grouped.abs().amax(-1)
        tensor_scale: Tensor | None = None
        if format == "mxfp4":
            scale = _exponents(largest)
        else:
            top = largest.amax() if largest.numel() else largest.new_zeros(())
            tensor_scale = (top / (MAGNITUDES[-1] * _MOST_E4M3)).reshape(1)
            scale = _e4m3(largest, 6.0, tensor_scale)
            if four_over_six:
                scale = _nearer(grouped, scale, _e4m3(largest, 4.0, tensor_scale), tensor_scale)
        codes = _round(grouped, factors(scale, tensor_scale))
        return cls(
            codes.flatten(1)[:, : matrix.shape[1]],
            scale,
            tensor_scale,
            format=format,
            axis=axis,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
        )

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return BLOCK[self.format]

    def dense(self) -> Tensor:
        """The weight."""
        values = torch.tensor(VALUES, device=self.codes.device)[self.codes.int()]
        factor = spread(
            factors(self.scale, self.tensor_scale), self.codes.shape[1], self.group_size
        )
        return from_matrix((values * factor).to(self.dtype), self.shape, self.axis)

    def parts(self) -> tuple[Part, ...]:
        """Codes at 4 bits, scales at 8, and for nvfp4 one scale at 32."""
        whole: tuple[Part, ...] = () if self.tensor_scale is None else (("tensor_scale", 32),)
        return (("codes", self.bits), ("scale", 8), *whole)

    def tunable(self) -> tuple[str, ...]:
        """The scale of the whole weight: those of blocks are too coarse to follow a gradient."""
        return () if self.tensor_scale is None else ("tensor_scale",)

    def config(self) -> dict[str, Any]:
        """Format and layout."""
        return {"format": self.format, "axis": self.axis}

    @classmethod
    def build(
        cls,
        config: dict[str, Any],
        parts: dict[str, Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Self:
        """See `Form.build`."""
        format, axis = config["format"], config["axis"]
        check_format(shape, format=format, axis=axis)
        codes, scale, whole = parts["codes"], parts["scale"], parts.get("tensor_scale")
        wanted = matrix_shape(shape, axis)
        if tuple(codes.shape) != wanted or codes.dtype != torch.int8:
            raise ValueError(f"codes must be int8 of shape {wanted}")
        most = len(MAGNITUDES) - 1
        if bool(((codes < -most) | (codes > most)).any()):
            raise ValueError(f"codes must be at most {most} in size")
        _check_scales(format, scale, whole, (wanted[0], -(-wanted[1] // BLOCK[format])))
        return cls(codes, scale, whole, format=format, axis=axis, shape=shape, dtype=dtype)


def check_format(shape: tuple[int, ...], *, format: Format, axis: int) -> None:
    """Raises OptionError unless the options fit a weight of this shape."""
    if format not in BLOCK:
        raise OptionError(
            f"format={format!r} for a weight of shape {shape}; choose one of {get_args(Format)}"
        )
    check_axis(shape, axis)


def factors(scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """(outputs, blocks) float32: what the values of each block are multiplied by."""
    if tensor_scale is not None:
        return scale.float() * tensor_scale
    # The byte is the exponent of a float32; that of 2**-127 has its one in the mantissa instead.
    exponent = scale.int()
    return torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)


def _check_scales(
    format: Format, scale: Tensor, tensor_scale: Tensor | None, shape: tuple[int, int]
) -> None:
    kind = torch.float8_e4m3fn if format == "nvfp4" else torch.uint8
    if tuple(scale.shape) != shape or scale.dtype != kind:
        raise ValueError(f"scale must be {kind} of shape {shape}")
    if format == "mxfp4":
        if tensor_scale is not None:
            raise ValueError("mxfp4 has no tensor_scale")
        if bool((scale == 255).any()):
            raise ValueError("a scale of 255 stands for no number")
        return
    if tensor_scale is None or tensor_scale.shape != (1,) or tensor_scale.dtype != torch.float32:
        raise ValueError("tensor_scale must be float32 of shape (1,)")
    for name, part in (("scale", scale.float()), ("tensor_scale", tensor_scale)):
        if not bool((part >= 0).all()) or bool(part.isinf().any()):
            raise ValueError(f"{name} must be finite and not negative")


def _e4m3(largest: Tensor, to: float, tensor_scale: Tensor) -> Tensor:
    """Scales that bring the largest weight of each block to the value `to`, as E4M3 has them.

    A scale that would be rounded to zero becomes the smallest one: its block keeps some weights.
    """
    wanted = largest / to / tensor_scale.clamp(min=torch.finfo(torch.float32).tiny)
    return wanted.clamp(_LEAST_E4M3, _MOST_E4M3).to(torch.float8_e4m3fn)


def _exponents(largest: Tensor) -> Tensor:
    """floor(log2(largest)) - 2 as E8M0 has it: 2 is the exponent of 6, the largest value."""
    mantissa_below_one = torch.frexp(largest).exponent
    return (mantissa_below_one - 1 - 2 + 127).clamp(0, 254).to(torch.uint8)


def _nearer(grouped: Tensor, one: Tensor, other: Tensor, tensor_scale: Tensor) -> Tensor:
    """For each block, of two scales the one with less squared error; `one` where it is the same."""
    values = torch.tensor(VALUES, device=grouped.device)
    errors = []
    for scale in (one, other):
        factor = factors(scale, tensor_scale)
        found = values[_round(grouped, factor).int()] * factor[..., None]
        errors.append((found - grouped).square().sum(-1))
    # torch.where knows no float8.
    chosen = torch.where(errors[1] < errors[0], other.view(torch.uint8), one.view(torch.uint8))
    return chosen.view(torch.float8_e4m3fn)


def _round(grouped: Tensor, factor: Tensor) -> Tensor:
    """Codes of (outputs, blocks, block), where `factor` is (outputs, blocks)."""
    middles = torch.tensor(_MIDDLES, device=grouped.device)
    # Every second middle goes down, to the value whose mantissa is even.
    middles[::2] = torch.nextafter(middles[::2], torch.full_like(middles[::2], torch.inf))
    # A factor of zero stands over zeros alone.
    levels = grouped / torch.where(factor > 0, factor, 1.0)[..., None]
    places = torch.bucketize(levels.abs().contiguous(), middles, right=True).to(torch.int8)
    return places * torch.where(levels < 0, -1, 1).to(torch.int8)
