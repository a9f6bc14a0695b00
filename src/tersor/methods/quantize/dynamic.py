"""Dynamic quantization: int8 weights, and inputs of linear layers on grids found as they pass.

For transformers and recurrent heads on runtimes that multiply integers, when there is no data to
calibrate with: nothing is fixed beforehand, so nothing can be fixed wrongly. Each layer pays for
looking at its input first; where that counts, and for convolutions, use `quantize.static`.

Source: ONNX operator specification, DynamicQuantizeLinear, opset 11; per row: Yao et al. 2022
(ZeroQuant), arXiv:2206.01861, section 3.2 (token-wise activations).
Differs from the paper: weights have one scale per output channel.
"""

from __future__ import annotations

from torch import nn

from tersor.errors import OptionError
from tersor.forms.grid import DynamicGrid
from tersor.methods.placing import is_linear
from tersor.methods.quantize.rtn import int8
from tersor.recipe import Outcome, method
from tersor.surgery.grids import grid_of, put
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task, device_of


@method
def dynamic(
    model: nn.Module,
    task: Task | None = None,
    *,
    per_row: bool = False,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Stores every weight as int8 codes and rounds the inputs of linear layers, in place.

    per_row: one scale for each row (token) instead of one per tensor. More exact, and what becomes
        of one sample no longer depends on the others in its batch; fewer runtimes have it
    include, exclude: patterns on names and types, see `walk`

    Weights that a form holds already stay as they are. Attention layers of torch compute with their
    weights themselves: these get int8 weights, and their activations stay float. The step's
    outcome holds the number of rounded inputs. Raises OptionError where no linear layer is chosen,
    or one has a grid already.
    """
    sites = walk(model, include, exclude)
    layers = {layer: site.name for site in sites for layer, _ in site.uses if is_linear(layer)}
    # Attention reads the weight of its output layer without calling it.
    unseen = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    layers = {layer: name for layer, name in layers.items() if layer not in unseen}
    if not layers:
        raise OptionError(
            f"include={include!r} and exclude={exclude!r} leave no linear layer of "
            f"{type(model).__name__}, and only these are quantized dynamically; use "
            "quantize.static, which knows convolutions, or quantize.rtn for weights alone"
        )
    for layer, name in layers.items():
        if grid_of(layer, "input") is not None:
            raise OptionError(
                f"the input of {name.rpartition('.')[0]!r} is quantized already; leave it out with "
                f'exclude="{name}", or start from the original network'
            )
    for layer in layers:
        put(layer, "input", DynamicGrid(per_row=per_row).to(device_of(layer)))
    for site in sites:
        int8(site)
    return model, {"inputs": len(layers)}
