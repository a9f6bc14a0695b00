"""Groups of linear layers that read the same tensor, and what can take their factors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tersor.measure.flow import Flow, Value
from tersor.methods.placing import is_linear
from tersor.methods.rescaling import is_norm


@dataclass(frozen=True)
class Group:
    """Linear layers that are fed the same tensor. absorber: what can take their factors, or None"""

    layers: list[nn.Module]
    absorber: nn.Module | None


def groups_of(flow: Flow, layers: set[nn.Module], free: set[nn.Module]) -> list[Group]:
    """All groups among `layers`, in the order in which they run.

    free: layers and norms whose weights may be changed
    """
    fed: dict[Value, list[nn.Module]] = {}
    for layer in flow.calls:
        value = flow.calls[layer][0][0]
        if layer in layers and is_linear(layer) and flow.once(layer) and value is not None:
            fed.setdefault(value, []).append(layer)
    found = []
    for value, readers in fed.items():
        alone = all(set(inside) & set(readers) for _, inside, _ in value.uses)
        absorber = _absorber(flow, value) if alone else None
        fits = absorber in free and (absorber in layers or is_norm(absorber))
        found.append(Group(readers, absorber if fits else None))
    return found


def _absorber(flow: Flow, value: Value) -> nn.Module:
    """The norm or linear layer that gives a value, up to a ReLU or a product with another one."""
    while True:
        giver = next((g for g in value.givers if is_norm(g) or is_linear(g)), None)
        if giver is not None:
            return giver if flow.once(giver) else nn.Module()
        if value.operator not in ("relu", "mul"):
            return nn.Module()
        # Of a product, the factor that a layer gives: silu(gate) * up.
        from_layers = [v for v in value.inputs if any(is_linear(g) for g in v.givers)]
        before = value.inputs[:1] if value.operator == "relu" else from_layers
        if len(before) != 1 or len(before[0].uses) != 1:
            return nn.Module()
        value = before[0]
