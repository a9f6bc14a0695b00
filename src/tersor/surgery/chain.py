"""Chains: several small layers in the place of one large one, giving nearly what it gave.

A chain computes less, in ordinary layers: what prunes, quantizes, codes or exports linear layers
and convolutions takes its links as it finds them. Its kinds:

    low_rank      to r channels, then to the outputs; a convolution keeps its kernel in the first
    tucker        1 x 1 to a channels, the kernel from a to b, 1 x 1 to the outputs
    cp            1 x 1 to r channels, a kernel along each dimension, 1 x 1 to the outputs
    tensor_train  a linear layer as contractions with small cores, one after the other

Source: Kim et al. 2016, arXiv:1511.06530, eq. 4-6 (tucker); Lebedev et al. 2015, arXiv:1412.6553,
eq. 5-8 (cp); Novikov et al. 2015, arXiv:1509.06569, eq. 5 (tensor_train).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersor.errors import ModelError
from tersor.surgery.links import CONVOLUTIONS, MAKERS, Ranks, fit, sizes_of
from tersor.surgery.structure import shrink
from tersor.surgery.walk import kind_of

_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class Chain(nn.Sequential):
    """Layers that stand for one.

    made_by: "low_rank", "tucker", "cp" or "tensor_train"
    ranks: of low_rank and cp (rank,); of tucker (inputs, outputs); of a tensor train of d cores
        the d factors of its inputs, the d of its outputs, and the d - 1 ranks between cores
    """

    def __init__(
        self, *links: nn.Module, made_by: str, ranks: Ranks, turned: bool, settings: dict[str, Any]
    ) -> None:
        """turned: the layer's weight was (inputs, outputs); settings: of a convolution."""
        super().__init__(*links)
        self.made_by, self.ranks, self.turned = made_by, ranks, turned
        vars(self).update(settings)

    def __getitem__(self, index: Any) -> Any:
        """A link; several of them are no chain any more."""
        links = list(self)
        return nn.Sequential(*links[index]) if isinstance(index, slice) else links[index]

    @property
    def weight(self) -> Tensor:
        """The weight of one layer that gives the same, multiplied out at each look."""
        links: list[Any] = list(self)
        if self.made_by == "tensor_train":
            first = links[0].linear.weight
            found = torch.eye(self.in_features, dtype=first.dtype, device=first.device)
            for core in links[:-1]:
                found = core(found)
            return found if self.turned else found.T
        found = links[0].weight
        for link in links[1:]:
            # Each channel by itself, or all to all; kernels lie along different dimensions.
            each = getattr(link, "groups", 1) > 1
            kernel = link.weight
            found = kernel * found if each else torch.einsum("or...,rc...->oc...", kernel, found)
        return found.T if self.turned else found

    @property
    def bias(self) -> Tensor | None:
        """That of the layer."""
        return cast("Tensor | None", self[-1].bias)

    @property
    def in_features(self) -> int:
        """Of a linear layer."""
        return cast("int", self[0].in_features)

    @property
    def out_features(self) -> int:
        """Of a linear layer."""
        return cast("int", self[-1].out_features)

    @property
    def in_channels(self) -> int:
        """Of a convolution."""
        return cast("int", self[0].in_channels)

    @property
    def out_channels(self) -> int:
        """Of a convolution."""
        return cast("int", self[-1].out_channels)


def whole_because(layer: nn.Module, made_by: str) -> str:
    """Why no chain of that kind can stand for `layer`; empty if one can."""
    kind = kind_of(layer)
    known: Any = {"Linear": nn.Linear, **CONVOLUTIONS}.get(kind)
    if kind == "Conv1D" and isinstance(getattr(layer, "weight", None), Tensor):
        return "" if made_by in ("low_rank", "tensor_train") else _not_for(made_by, layer)
    if known is None or not isinstance(layer, known):
        return f"{kind} is no layer that others could take the place of"
    if type(layer).forward is not known.forward:
        return f"{type(layer).__name__} has a forward pass of its own"
    if kind != "Linear" and getattr(layer, "groups", 1) != 1:
        return f"its channels are in {layer.groups} groups"
    spatial = kind != "Linear" and math.prod(sizes_of(layer)[2:]) > 1
    fits = {"low_rank": True, "tensor_train": kind == "Linear"}.get(made_by, spatial)
    return "" if fits else _not_for(made_by, layer)


def _not_for(made_by: str, layer: nn.Module) -> str:
    takes = "linear layers" if made_by == "tensor_train" else "kernels over several places"
    return f"{made_by} is for {takes}, not for {kind_of(layer)} of shape {sizes_of(layer)}"


def chain_for(layer: nn.Module, made_by: str, ranks: Sequence[int]) -> Chain:
    """A chain that can stand for `layer`, with its bias; the weights of links are to be set.

    Raises ModelError, before anything is allocated, for a layer that no such chain can stand for,
    and ranks that are none of it.
    """
    reason = whole_because(layer, made_by) if made_by in MAKERS else "there is no such chain"
    ranks = tuple(ranks)
    if not reason and not fit(sizes_of(layer), made_by, ranks):
        reason = f"ranks {ranks} are none of a weight of shape {sizes_of(layer)}"
    if reason:
        raise ModelError(f"no chain {made_by!r:.40} for a {kind_of(layer)}: {reason}")
    weight = cast("Tensor", layer.weight)
    settings = {name: getattr(layer, name) for name in _SETTINGS if hasattr(layer, name)}
    chain = Chain(
        *MAKERS[made_by](layer, ranks),
        made_by=made_by,
        ranks=ranks,
        turned=kind_of(layer) == "Conv1D",
        settings=settings,
    )
    for link in chain.modules():
        own = link._parameters.get("weight")
        if own is not None:
            empty = torch.empty(own.shape, dtype=weight.dtype, device=weight.device)
            link.register_parameter("weight", nn.Parameter(empty, weight.requires_grad))
    bias = cast("Tensor | None", layer.bias)
    if bias is not None and not isinstance(bias, nn.Parameter):
        bias = nn.Parameter(bias.detach().clone())
    chain[-1].register_parameter("bias", bias)
    return chain.train(layer.training)


def replace(model: nn.Module, layer: nn.Module, chain: Chain) -> None:
    """Puts `chain` in the place of `layer`, under each of its paths."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is layer:
                setattr(parent, name, chain)
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # Its fused operator would multiply dense weights instead of calling links.
                    parent.activation_relu_or_gelu = 0


def put_chains(
    model: nn.Module, chains: Mapping[str, tuple[str, Sequence[int]]], *, cut: bool = False
) -> None:
    """Puts empty chains into a fresh network.

    chains: by path, how each was made and its ranks
    cut: whether layers may have been narrower before they became chains

    Raises ModelError, for a network that was not cut before anything is changed, for paths and
    ranks that do not fit.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    found: list[tuple[nn.Module, Chain]] = []
    for path, (made_by, ranks) in chains.items():
        layer = layers.get(path)
        if layer is None or layer is model or any(layer is other for other, _ in found):
            raise ModelError(f'there is no layer "{path}" for a chain to take the place of')
        if isinstance(layer, Chain) and (layer.made_by, layer.ranks) == (made_by, tuple(ranks)):
            continue
        try:
            if cut and made_by == "tensor_train":
                _narrow(layer, ranks)
            found.append((layer, chain_for(layer, made_by, ranks)))
        except ModelError as error:
            raise ModelError(f'"{path}": {error}') from None
    for layer, chain in found:
        replace(model, layer, chain)


def _narrow(layer: nn.Module, ranks: Sequence[int]) -> None:
    """Gives a layer the sizes of a tensor train: its factors are those of the layer as it was cut.

    Other chains are cut down link by link, as any layers are.
    """
    count = (len(ranks) + 1) // 3
    outputs, inputs = math.prod(ranks[count : 2 * count]), math.prod(ranks[:count])
    turned = kind_of(layer) == "Conv1D"
    shapes = {"weight": (inputs, outputs) if turned else (outputs, inputs), "bias": (outputs,)}
    shrink(layer, shapes)
