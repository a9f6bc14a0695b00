"""Ways to store one weight, by short names: "gptq 3", "rtn 4 64", "nvfp4"."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tersor.errors import OptionError
from tersor.forms import Affine, BlockFloat
from tersor.forms.block_float import Format
from tersor.forms.form import Form
from tersor.methods.calibrated import affine, best_codes
from tersor.methods.layerwise import Layer
from tersor.methods.quantize.adaround import rounded
from tersor.methods.sparse import keep_zeros

Encoder = Callable[[Layer], Form]
_STEPS = 500


def encoder(choice: str) -> Encoder:
    """What stores a weight so. Raises OptionError for a name that is none."""
    name, *numbers = choice.split()
    if not numbers and name in _BLOCKS:
        return partial(_block_float, _BLOCKS[name])
    if name not in _AFFINE or not 1 <= len(numbers) <= 2 or not all(map(str.isdigit, numbers)):
        raise OptionError(
            f"choices has {choice!r}; a choice is one of {sorted(_AFFINE)} with bits and perhaps a "
            'group size, such as "gptq 4" or "rtn 4 64", or "nvfp4", or "mxfp4"'
        )
    bits, group_size = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else None
    if not 2 <= bits <= 8 or group_size == 0:
        raise OptionError(f"choices has {choice!r}; bits are 2 to 8, and groups have members")
    return partial(_AFFINE[name], bits, group_size)


def _gptq(bits: int, group_size: int | None, layer: Layer) -> Form:
    return affine(layer, bits=bits, group_size=group_size, symmetric=True, choose=best_codes)


def _adaround(bits: int, group_size: int | None, layer: Layer) -> Form:
    return affine(
        layer,
        bits=bits,
        group_size=group_size,
        symmetric=True,
        choose=lambda problem, levels: (rounded(problem, levels, _STEPS), levels),
    )


def _rtn(bits: int, group_size: int | None, layer: Layer) -> Form:
    form = Affine.encode(layer.site.weight, bits=bits, group_size=group_size, axis=layer.site.axis)
    if layer.sparse is not None:
        keep_zeros(form, layer.sparse)
    return form


def _block_float(kind: Format, layer: Layer) -> Form:
    return BlockFloat.encode(layer.site.weight, format=kind, axis=layer.site.axis)


_BLOCKS: dict[str, Format] = {"nvfp4": "nvfp4", "mxfp4": "mxfp4"}
_AFFINE = {"gptq": _gptq, "adaround": _adaround, "rtn": _rtn}
