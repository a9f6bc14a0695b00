"""Rotation: the same network, with its activations turned so that no channel is loud.

Before `quantize.static` and other quantizers of activations, or before few-bit grids on weights. It
costs nothing at run time: rotations are multiplied into weights, where that is exact. Those of a
residual stream go into all layers that write and read it, and those between the values and the
output layer of an attention into both. `quantize.trellis` needs none of it, it rotates inside each
weight. Where no RMS norm or attention is found there is nothing to rotate: use `transform.smooth`.

Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4 (stages 1a and 1b without the
rotations at run time); random signs as in Tseng et al. 2024 (QuIP#), arXiv:2402.04396.
Differs from the paper: streams and attentions are found in a run of the network, not by the names
of layers.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.forms.rotated import turn
from tersor.measure.flow import watch
from tersor.methods.rescaling import Unchanged, by_inputs, by_outputs, movable, multiply_inputs
from tersor.methods.streams import Stream, stream, value_paths
from tersor.recipe import Outcome, method, recipe_of
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task


@method
def rotate(
    model: nn.Module,
    task: Task | None = None,
    *,
    residual: bool = True,
    values: bool = True,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Multiplies random rotations into the weights around streams and attentions, in place.

    residual: rotate the residual stream; scales of its norms are multiplied into the layers behind
        them first, and an output layer tied to the embedding gets a weight of its own
    values: rotate the values of each attention, within each head
    generator: draws the rotations; a recipe notes its seed
    include, exclude: patterns on names and types, see `walk`; what is not chosen with all its
        layers is not rotated

    The step's outcome holds how many norms became plain, how many attentions were rotated and of
    how many layers the weight was untied, and the relative change of the outputs. Raises
    OptionError where nothing can be rotated, or a part of the stream is of an unknown kind.
    """
    if task is None:
        raise TaskError("transform.rotate runs the network to see what is connected; pass a task")
    if any(step.method == "transform.rotate" for step in recipe_of(model).steps):
        raise OptionError("this network is rotated already; start from the original")
    unchanged, example = Unchanged(model, task), task.example(2)
    flow = watch(model, lambda: task.predict(model, example))
    names = {module: f'"{name}"' for name, module in model.named_modules()}
    seeds = iter(torch.randint(2**31, (1 + len(names),), generator=generator).tolist())
    chosen = {layer for site in walk(model, include, exclude) for layer, _ in site.uses}
    found = stream(flow, names) if residual else None
    if found is not None and not chosen.issuperset(found.layers()):
        found = None
    pairs = [pair for pair in value_paths(flow) if values and chosen.issuperset(pair[:2])]
    built_in = [m for m in flow.calls if values and _plain_attention(m, chosen)]
    tied = _tied(found) if found is not None else []
    if found is not None:
        _check_free(model, found, tied, names)
        for layer in tied:
            weight = layer.get_parameter("weight")
            layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        _rotate_stream(found, next(seeds))
    free = movable(model, set(model.modules()))
    pairs = [pair for pair in pairs if {*pair[:2]} <= free]
    for giver, output, width in pairs:
        seed = next(seeds)
        _turn_outputs(giver, seed, width)
        _turn_inputs(output, seed, width)
    for attention in built_in:
        _rotate_attention(attention, next(seeds))
    if found is None and not pairs and not built_in:
        raise OptionError(
            f"{type(model).__name__} has neither a residual stream with RMS norms nor an attention "
            "between two free linear layers, so there is nothing to rotate; use transform.smooth"
        )
    return model, {
        "norms": len(found.norms) if found is not None else 0,
        "attentions": len(pairs) + len(built_in),
        "untied": len(tied),
        "error": unchanged.check("transform.rotate"),
    }


def _tied(found: Stream) -> list[nn.Module]:
    """Layers that read the stream with a weight that also writes it."""
    writers = {id(layer._parameters.get("weight")) for layer in found.writers}
    return [r for r in found.readers() if "weight" in r._parameters and id(r.weight) in writers]


def _check_free(
    model: nn.Module, found: Stream, tied: list[nn.Module], names: dict[nn.Module, str]
) -> None:
    """Raises OptionError unless every weight is plain, and only that of an embedding is tied."""
    layers = {*found.layers(), *found.norms}
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    places.subtract(id(layer.weight) for layer in tied)
    bound = [
        layer
        for layer in layers
        if layer._parameters.get("weight") is None
        or any(places[id(p)] > 1 for p in layer._parameters.values())
    ]
    if bound:
        raise OptionError(
            f"the residual stream cannot be rotated: {sorted(names[layer] for layer in bound)} "
            "have no plain weight of their own; rotate before quantizing, or leave this step out"
        )


def _rotate_stream(found: Stream, seed: int) -> None:
    """Multiplies what writes the stream by Q and what reads it by Q^T, so that x becomes Q x."""
    for norm, readers in found.norms.items():
        for reader in readers:
            multiply_inputs(reader, norm.get_parameter("weight").detach())
            _turn_inputs(reader, seed)
        norm.get_parameter("weight").detach().fill_(1)
    for writer in found.writers:
        if isinstance(writer, nn.Embedding):
            writer.weight.detach().copy_(turn(writer.weight.detach(), seed))
        else:
            _turn_outputs(writer, seed)


def _plain_attention(module: nn.Module, chosen: set[nn.Module]) -> bool:
    """Whether it is torch's attention, chosen, with plain weights of one width."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and chosen.issuperset((module, module.out_proj))
        and module._parameters.get("in_proj_weight") is not None
        and module.out_proj._parameters.get("weight") is not None
        and module.bias_k is None
        and module.head_dim > 1
    )


def _rotate_attention(attention: nn.Module, seed: int) -> None:
    """The same for torch's own attention, which knows how wide its heads are."""
    assert isinstance(attention, nn.MultiheadAttention)
    width, n = attention.head_dim, attention.embed_dim
    for name in ("in_proj_weight", "in_proj_bias"):
        tensor = attention._parameters.get(name)
        if tensor is not None:
            part = tensor.detach()[2 * n :].view(n, -1)
            part.copy_(_turned(part.T, seed, width).T)
    _turn_inputs(attention.out_proj, seed, width)


def _turn_inputs(layer: nn.Module, seed: int, width: int | None = None) -> None:
    weight = by_inputs(layer)[0, :, :, 0]
    weight.copy_(_turned(weight, seed, width))


def _turn_outputs(layer: nn.Module, seed: int, width: int | None = None) -> None:
    weight, bias = by_outputs(layer), layer._parameters.get("bias")
    weight.copy_(_turned(weight.T, seed, width).T)
    if bias is not None:
        bias.detach().copy_(_turned(bias.detach(), seed, width))


def _turned(x: Tensor, seed: int, width: int | None) -> Tensor:
    """Turns pieces of the last dimension, each `width` wide, in double precision."""
    pieces = x.double().reshape(*x.shape[:-1], -1, width or x.shape[-1])
    return turn(pieces, seed).reshape(x.shape).to(x.dtype)
