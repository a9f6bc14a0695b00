"""Folding: a batch norm in evaluation mode is a scale and a shift, which the layer before can take.

Exact up to rounding. A pair is folded only where a trace of the network proves that nothing but the
batch norm reads the layer's output. Fold before compressing: what a form holds stays as it is.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2, eq. 14.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.surgery.tracing import traced
from tersor.task import Inputs, device_of

_LAYERS = {
    "aten.linear.default": nn.Linear,
    "aten.conv1d.default": nn.Conv1d,
    "aten.conv1d.padding": nn.Conv1d,
    "aten.conv2d.default": nn.Conv2d,
    "aten.conv2d.padding": nn.Conv2d,
    "aten.conv3d.default": nn.Conv3d,
    "aten.conv3d.padding": nn.Conv3d,
    "aten.conv_transpose1d.default": nn.ConvTranspose1d,
    "aten.conv_transpose2d.input": nn.ConvTranspose2d,
    "aten.conv_transpose3d.input": nn.ConvTranspose3d,
}


@dataclass(frozen=True)
class Folded:
    """What `fold` did.

    pairs: (layer, batch norm), the paths of what was folded
    skipped: for every other batch norm the reason
    """

    pairs: tuple[tuple[str, str], ...]
    skipped: dict[str, str]


class FoldedNorm(nn.Identity):
    """What stands where a batch norm was folded.

    folded: () values, an empty buffer: by its name a file says that nothing is missing here
    """

    kind = "folded norm"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("folded", torch.empty(0))


class _UnprovenError(Exception):
    """Why a batch norm stays."""


def fold(model: nn.Module, inputs: Inputs, only: Collection[nn.Module] | None = None) -> Folded:
    """Folds batch norms into the linear and convolution layers before them, in place.

    inputs: one batch to trace the network with
    only: layers that may take one in, None for all

    A folded batch norm becomes an identity, and the network one for evaluation: training goes
    another way without its batch norms. Raises ModelError for a network that cannot be traced.
    """
    norms = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    unproven = "nothing proves which layer feeds a batch norm; use it without folding"
    program = traced(model, inputs, unproven) if norms else None
    pairs: list[tuple[str, str]] = []
    skipped: dict[str, str] = {}
    for path, norm in norms.items():
        assert program is not None
        try:
            layer_path = _layer_before(model, path, program)
            if only is not None and model.get_submodule(layer_path) not in only:
                raise _UnprovenError(f"{layer_path} is to stay as it is")
        except _UnprovenError as reason:
            skipped[path] = str(reason)
            continue
        _absorb(model.get_submodule(layer_path), norm)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, FoldedNorm().to(device_of(norm)))
        pairs.append((layer_path, path))
    return Folded(tuple(pairs), skipped)


def absorb_statistics(model: nn.Module, only: Collection[nn.Module] | None = None) -> int:
    """Moves the running statistics of every batch norm into its own scale and shift, in place.

    What it computes in evaluation mode stays the same, but mean and variance are 0 and 1 - eps
    afterwards, which take no bytes in a file. Training it on batch statistics would need the old
    ones back. Norms without statistics, without scale and shift, with shared or with held ones are
    left alone.

    only: norms to change, None for all

    Returns how many were changed.
    """
    places = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    changed = 0
    for norm in model.modules():
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if only is not None and norm not in only:
            continue
        scale, shift = norm._parameters.get("weight"), norm._parameters.get("bias")
        if scale is None or shift is None or places[id(scale)] > 1 or places[id(shift)] > 1:
            continue
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        factor = scale.detach().double() * (variance.double() + norm.eps).rsqrt()
        with torch.no_grad():
            shift.copy_(shift.double() - mean.double() * factor)
            scale.copy_(factor)
            mean.zero_()
            variance.fill_(1 - norm.eps)
        changed += 1
    return changed


def _layer_before(model: nn.Module, path: str, program: ExportedProgram) -> str:
    """Path of the layer whose output nothing but the batch norm at `path` reads."""
    norm = _only_call(program, f"{path}.running_mean", "aten.batch_norm.default")
    if norm.args[5]:
        raise _UnprovenError("it uses the statistics of the batch, not running ones")
    source = norm.args[0]
    kind = _LAYERS.get(str(source.target)) if isinstance(source, Node) else None
    if not isinstance(source, Node) or kind is None:
        raise _UnprovenError(f"its input comes from {source}, not from one layer")
    if len(source.users) > 1:
        readers = sorted(user.name for user in source.users)
        raise _UnprovenError(f"the output of {source} is read by {readers}")
    weight = _stored_at(program, source.args[1])
    layer_path, _, attribute = weight.rpartition(".")
    layer = model.get_submodule(layer_path)
    if attribute != "weight" or type(layer) is not kind:
        raise _UnprovenError(f"the weight of {source} is not the plain weight of a {kind.__name__}")
    _only_call(program, weight, str(source.target))
    # Of an input without a batch dimension, or a linear layer's sequence, channels are not second.
    if source.meta["val"].dim() != layer.get_parameter("weight").dim():
        raise _UnprovenError(
            f"the channels of {layer_path} are not the second dimension of its output"
        )
    _unshared(model, [layer, model.get_submodule(path)])
    return layer_path


def _only_call(program: ExportedProgram, stored: str, target: str) -> Node:
    """The one node that reads the parameter or buffer of that name."""
    names = {
        **program.graph_signature.inputs_to_parameters,
        **program.graph_signature.inputs_to_buffers,
    }
    users: list[Node] = [
        user
        for node in program.graph.nodes
        if node.op == "placeholder" and names.get(node.name) == stored
        for user in node.users
    ]
    if len(users) != 1 or str(users[0].target) != target:
        raise _UnprovenError(f"{stored} is used {len(users)} times, not once by {target}")
    return users[0]


def _stored_at(program: ExportedProgram, node: object) -> str:
    names: Mapping[str, str] = program.graph_signature.inputs_to_parameters
    if not isinstance(node, Node) or node.name not in names:
        raise _UnprovenError(f"the weight {node} is computed on each call; fold before compressing")
    return names[node.name]


def _unshared(model: nn.Module, layers: list[nn.Module]) -> None:
    places = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    for layer in layers:
        if any(places[id(tensor)] > 1 for tensor in layer.parameters()):
            raise _UnprovenError(
                f"a parameter of {type(layer).__name__} is used by another layer too"
            )


def _absorb(layer: nn.Module, norm: _BatchNorm) -> None:
    """W *= gamma / sqrt(var + eps), b = (b - mean) * gamma / sqrt(var + eps) + beta."""
    weight, bias = layer.get_parameter("weight"), layer.bias
    scale = (norm.get_buffer("running_var").double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -norm.get_buffer("running_mean").double()
    if isinstance(bias, Tensor):
        shift = shift + bias.detach().double()
    shift = shift * scale + (norm.bias.detach().double() if norm.affine else 0)
    layer.weight = nn.Parameter(
        (weight.detach().double() * _along_outputs(layer, scale)).to(weight.dtype),
        requires_grad=weight.requires_grad,
    )
    layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)


def _along_outputs(layer: nn.Module, scale: Tensor) -> Tensor:
    """`scale` (outputs,) shaped so that it multiplies the layer's weight."""
    weight = layer.get_parameter("weight")
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    # (inputs, outputs / groups, ...): the inputs of group g meet the outputs of group g.
    per_group = scale.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
    return per_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
