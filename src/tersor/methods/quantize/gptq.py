"""GPTQ: codes column after column, each column making up for the errors of those before it.

The method for 4 and 3 bits where calibration data is at hand; layers are quantized in order, each
for what the quantized layers before it give. At 8 bits `quantize.rtn` does as well. At 2 bits a
network usually needs smaller groups, or `quantize.trellis`.

Source: Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1, with columns in
the order of falling energy as in its code.
Differs from the paper: ranges are those of least error, weighed by the energy of the inputs, and
belong to groups of inputs as they are stored, whatever the order; after it the codes are gone over
again, and scales are fitted to them, which only lowers the same error.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from tersor.methods.calibrated import affine_layers
from tersor.recipe import method
from tersor.surgery.walk import Patterns
from tersor.task import Task


@method
def gptq(
    model: nn.Module,
    task: Task | None = None,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 4,
    group_size: Annotated[int, Field(ge=1)] | None = None,
    symmetric: bool = True,
    samples: Annotated[int, Field(ge=1)] = 512,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as `bits`-bit codes, in place.

    bits: bits per weight, 2 to 8
    group_size: inputs that share one scale; None for one scale per output channel
    symmetric: levels -top..top times the scale; otherwise with a zero point
    samples: calibration inputs to use, at most
    include, exclude: patterns on names and types, see `walk`

    Raises TaskError without data, OptionError for a weight that is quantized already, or a pruned
    layer with symmetric=False, ModelError for inputs of a layer that are not finite.
    """
    return affine_layers(
        "quantize.gptq",
        model,
        task,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        samples=samples,
        sites=(include, exclude),
        original=False,
    )
