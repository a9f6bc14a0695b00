"""Attention in networks: where it is, and the queries, keys and values that it computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ModelError, OptionError
from tersor.methods.inside import Inside

_TRIPLES = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
"""Names of the three layers in BERT, Llama, DistilBERT, diffusers, Llama's own code, and T5."""
_FUSED = ("c_attn", "qkv", "Wqkv")
"""Names of one layer for all three, one behind the other, in GPT-2 and vision transformers."""
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_SIZES = ("head_dim", "attention_head_size", "head_width")


@dataclass(frozen=True)
class Attention:
    """One attention.

    path: of the module that holds its layers
    parts: paths of the layers for queries, keys and values; of one layer for all; or of torch's own
        attention, which has none
    heads: how many, None where the module does not say
    """

    path: str
    parts: tuple[str, ...]
    heads: int | None

    def called(self, inside: Inside) -> int:
        """How often it ran."""
        return len(inside.outputs[self.parts[0]])

    def projected(self, model: nn.Module, inside: Inside, call: int) -> tuple[Tensor, ...]:
        """Queries, keys and values of one run, (n, tokens, width) each."""
        module = model.get_submodule(self.parts[0])
        if isinstance(module, nn.MultiheadAttention):
            given = inside.inputs[self.parts[0]][call]
            given = given if module.batch_first else given.transpose(0, 1)
            return functional.linear(given, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        found = tuple(inside.outputs[part][call] for part in self.parts)
        return found if len(found) == 3 else found[0].chunk(3, -1)


def attentions(model: nn.Module) -> list[Attention]:
    """Every attention whose layers are known by name, and torch's own, in the order of modules."""
    found = []
    for path, module in model.named_modules():
        children = dict(module.named_children())
        three = next((t for t in _TRIPLES if all(name in children for name in t)), ())
        names = three or [name for name in _FUSED if name in children][:1]
        parts = tuple(f"{path}.{name}".removeprefix(".") for name in names)
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            parts = (path,)
        if parts:
            found.append(Attention(path, parts, _heads(module, parts, model)))
    return found


def attention_at(name: str, model: nn.Module, path: str | None, role: str) -> Attention:
    """The last attention, or the first one in the layer at `path`.

    name: of the method; role: "student" or "teacher"

    Raises ModelError for a network without any, OptionError for a layer without any.
    """
    known = attentions(model)
    if not known:
        names = ", ".join(" ".join(three) for three in _TRIPLES)
        raise ModelError(
            f"{name} finds no attention in the {role}, {type(model).__name__}: neither torch's own "
            f"nor linear layers named {names}, or {', '.join(_FUSED)}; use distill.features"
        )
    if path is None:
        return known[-1]
    inner = [a for a in known if a.path == path or a.path.startswith(f"{path}.")]
    if not inner:
        raise OptionError(
            f"pairs: the layer {path!r} of the {role} holds no attention; use one of "
            f"{[a.path for a in known][:4]}"
        )
    return inner[0]


def by_heads(vectors: Tensor, heads: int) -> Tensor:
    """(n, tokens, heads * width) -> (n, heads, tokens, width)."""
    return vectors.reshape(*vectors.shape[:-1], heads, -1).transpose(1, 2)


def _heads(module: nn.Module, parts: Sequence[str], model: nn.Module) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        counts = [getattr(owner, name, None) for name in _COUNTS]
        if count := next((c for c in counts if isinstance(c, int) and c > 0), None):
            return count
    sizes = [getattr(module, name, None) for name in _SIZES]
    size = next((s for s in sizes if isinstance(s, int) and s > 0), None)
    width = getattr(model.get_submodule(parts[0]), "out_features", None)
    return None if size is None or width is None or len(parts) != 3 else int(width) // size
