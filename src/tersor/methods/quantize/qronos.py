"""Qronos: GPTQ towards what the original gives, so that later layers undo errors of earlier ones.

`quantize.gptq` with another target, and the better choice whenever errors of several layers add up,
at 4 bits and below; it runs the original network beside the quantized one, so it takes twice the
memory and time of the forward pass.

Source: Zhang, Zhang, Colbert, Saab 2026 (Qronos), arXiv:2505.11695, eq. 3 (the objective), and Li
et al. 2025 (GPTAQ), arXiv:2504.02692, eq. 5 (the same for GPTQ).
Differs from the papers: Qronos chooses the first code before it moves the other columns, and GPTAQ
follows errors one column at a time; here the weight is replaced by the least-squares solution for
the inputs it really gets, damped towards itself, and GPTQ rounds that. For whichever codes have
been fixed, what is left then has the same best continuation.
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
def qronos(
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

    Raises as `quantize.gptq` does.
    """
    return affine_layers(
        "quantize.qronos",
        model,
        task,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        samples=samples,
        sites=(include, exclude),
        original=True,
    )
