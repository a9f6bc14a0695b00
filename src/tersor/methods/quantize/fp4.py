"""4-bit floats: NVFP4 or MXFP4, the formats that recent accelerators multiply with. No data needed.

At 4.5 and 4.25 bits a weight. On normally distributed weights NVFP4 with the choice of four or six
has 20 % less squared error than `quantize.rtn` at the same size (4 bits, group 32). On a CPU no
runtime computes with such codes, so `quantize.hqq` or `quantize.gptq` serve better there.

Source: Open Compute Project 2023, "OCP Microscaling Formats (MX) Specification" v1.0, section 6.3;
NVIDIA 2025, arXiv:2509.25149, appendix B; Cook et al. 2025 (Four Over Six), arXiv:2512.02010,
section 3.
Differs from the papers: with four over six the scale of the whole tensor is the one without it
(Cook et al. lower it, so that its largest block too may choose four).
"""

from __future__ import annotations

from torch import nn

from tersor.errors import OptionError
from tersor.forms import BlockFloat
from tersor.forms.block_float import Format
from tersor.methods.sparse import check_uncoded, keep_zeros, sparse_form
from tersor.recipe import method
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task


@method
def fp4(
    model: nn.Module,
    task: Task | None = None,
    *,
    format: Format = "nvfp4",
    four_over_six: bool | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Stores every weight of two or more dimensions as 4-bit floats, in place.

    format: "nvfp4", blocks of 16 inputs with an 8-bit float scale; "mxfp4", blocks of 32 with a
        power of two
    four_over_six: each block of nvfp4 brings its largest weight to 6 or to 4, whichever has the
        less squared error; None for yes with nvfp4. Reading takes the same time either way
    include, exclude: patterns on names and types, see `walk`

    A pruned layer keeps its zeros. Raises OptionError for a weight that is quantized already, or
    for four_over_six with mxfp4.
    """
    if four_over_six and format != "nvfp4":
        raise OptionError(
            f'four_over_six=True for format="{format}", whose scales are powers of two; leave it '
            'out, or choose format="nvfp4"'
        )
    sites = walk(model, include, exclude)
    check_uncoded(sites)
    choice = format == "nvfp4" if four_over_six is None else four_over_six
    for site in sites:
        sparse = sparse_form(site.form)
        form = BlockFloat.encode(site.weight, format=format, four_over_six=choice, axis=site.axis)
        if sparse is not None:
            keep_zeros(form, sparse)
        site.hold(form)
    return model
