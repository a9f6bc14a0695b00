"""Squared error of each number format on normally distributed weights, relative to their square.

Takes a few seconds. The bars of the FP4 formats are .0091 (NVFP4), .0076 (four over six) and .0133.
"""

from collections.abc import Callable

import torch
from _record import record
from torch import Tensor

from tersor.forms import Affine, BitPlanes, BlockFloat, Dense, Form
from tersor.methods.quantize.hqq import hqq
from tersor.methods.quantize.ternary import ternary

FORMATS: dict[str, Callable[[Tensor], Form]] = {
    "fp8 e4m3": lambda w: Dense.encode_scaled(w, dtype=torch.float8_e4m3fn),
    "fp8 e5m2": lambda w: Dense.encode_scaled(w, dtype=torch.float8_e5m2),
    "int8 per channel": lambda w: Affine.encode(w, bits=8),
    "nvfp4": BlockFloat.encode,
    "nvfp4, four over six": lambda w: BlockFloat.encode(w, four_over_six=True),
    "mxfp4": lambda w: BlockFloat.encode(w, format="mxfp4"),
    "int4, group 32": lambda w: Affine.encode(w, bits=4, group_size=32),
    "int4, group 128": lambda w: Affine.encode(w, bits=4, group_size=128),
    "hqq 4 bits, group 64": lambda w: held(hqq, w),
    "int2, group 128": lambda w: Affine.encode(w, bits=2, group_size=128, symmetric=False),
    "2 planes of signs": BitPlanes.encode,
    "ternary": lambda w: held(ternary, w),
    "1 plane of signs": lambda w: BitPlanes.encode(w, planes=1),
}


def held(technique: Callable[[torch.nn.Module], torch.nn.Module], weight: Tensor) -> Form:
    """The form that a technique gives a layer of this weight."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    form = technique(layer).get_submodule("weight_form")
    assert isinstance(form, Form)
    return form


def main() -> None:
    """Measures every format and writes bench/results/number_formats.json."""
    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    figures = {}
    for name, encode in FORMATS.items():
        form = encode(weight.clone())
        error = (form.dense().detach() - weight).double().square().mean()
        figures[name] = {
            "relative_squared_error": round((error / weight.double().square().mean()).item(), 6),
            "bits": round(form.stored_bits() / weight.numel(), 3),
        }
        print(name, figures[name], flush=True)
    record("number_formats", figures)


if __name__ == "__main__":
    main()
