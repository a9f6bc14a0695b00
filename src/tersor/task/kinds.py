"""How each kind of task reads a model's answer, and how far apart two answers are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import CompressError, TaskError
from tersor.task.data import Inputs, apply, described, rows_in

Kind: TypeAlias = Literal["classification", "regression", "embedding", "language"]
Pooling: TypeAlias = Literal["mean", "cls"] | None

# Rows of like length that run together; more waste padding, fewer waste the processor.
GROUP = 32
# So many logits do not all lie between 0 and 1 by chance.
MANY = 16


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is in evaluation mode and records no gradients.

    Each module's own mode comes back after. `measure.evaluating` also decodes forms just once.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: what a model caches under it can never be trained through again.
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Where its first tensor lies; the CPU where it has none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def placed(model: nn.Module, inputs: Inputs) -> Inputs:
    """`inputs` on the model's device."""
    device = device_of(model)
    # Of inputs that no task gave, some may be no tensors.
    return apply(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's answer. Raises TaskError when the model cannot take these inputs."""
    try:
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except (CompressError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskError(
            f"the model does not accept this data: inputs of {described(inputs)}; torch says: "
            f"{first}. {_way_out(model, first)}"
        ) from error


def _way_out(model: nn.Module, said: str) -> str:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"float32"}
    if "dtype" in said and kinds & {"float64", "float16", "bfloat16"}:
        return "Numbers from a task are float32: call model.float() first"
    return "Give it data as it was trained on"


def tensor_in(answer: Any, *names: str) -> Tensor:
    """The tensor that matters in a model's answer: by name, else the first of a tuple."""
    for name in names:
        value = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(answer, tuple | list) and answer:
        answer = answer[0]
    if isinstance(answer, Mapping) and len(answer) == 1:
        answer = next(iter(answer.values()))
    if not isinstance(answer, Tensor):
        keys = f" with {sorted(answer)}" if isinstance(answer, Mapping) else ""
        raise TaskError(
            f"the model gives a {type(answer).__name__}{keys}, and none of it is named "
            f"{' or '.join(names)}; wrap it so that it returns that tensor"
        )
    return answer


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """(n, classes); one value per sample counts as the logit of class 1."""
    outputs = tensor_in(call(model, inputs), "logits")
    rows = rows_in(inputs)
    if outputs.shape in ((rows,), (rows, 1)):
        outputs = outputs.reshape(rows, 1)
        return torch.cat((torch.zeros_like(outputs), outputs), 1)
    if outputs.dim() != 2 or len(outputs) != rows:
        raise TaskError(
            f"the model gives outputs of shape {tuple(outputs.shape)} for {rows} samples; "
            f"classification needs ({rows}, classes)"
        )
    return outputs


def are_probabilities(outputs: Tensor) -> bool:
    """True where each row is non-negative and sums to 1 within its type's precision.

    Logits never do.
    """
    rounding = max(1e-3, torch.finfo(outputs.dtype).eps if outputs.is_floating_point() else 0)
    apart = (outputs.float().sum(1) - 1).abs()
    return bool((outputs >= 0).all()) and bool((apart < rounding).all())


def is_one_share(outputs: Tensor) -> bool:
    """True where the logit of class 1 stands alone and lies in 0..1 for every row of many."""
    alone = outputs.shape[1] == 2 and not bool(outputs[:, 0].any())
    return alone and len(outputs) >= MANY and bool(((outputs >= 0) & (outputs <= 1)).all())


def values(model: nn.Module, inputs: Inputs) -> Tensor:
    """(n, k): all that the model says about each sample."""
    outputs = tensor_in(call(model, inputs), "logits", "predictions")
    rows = rows_in(inputs)
    if not outputs.dim() or len(outputs) != rows:
        raise TaskError(
            f"the model gives outputs of shape {tuple(outputs.shape)} for {rows} samples; "
            "regression needs one row for each"
        )
    return outputs.reshape(rows, -1)


def next_tokens(model: nn.Module, inputs: Inputs) -> Tensor:
    """(tokens, vocabulary): what the model expects after each token."""
    outputs = tensor_in(call(model, inputs), "logits")
    if outputs.dim() != 3:
        raise TaskError(
            f"the model gives outputs of shape {tuple(outputs.shape)}; a language model gives "
            "(batch, length, vocabulary)"
        )
    return outputs.flatten(0, 1)


def embeddings(model: nn.Module, inputs: Inputs, pooling: Pooling) -> Tensor:
    """(rows, d), of length 1. Rows of like length run together, so that padding costs little."""
    mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
    if not isinstance(inputs, dict) or mask is None or len(mask) <= GROUP:
        return _pooled(call(model, inputs), mask, pooling)
    order = mask.sum(1).argsort(stable=True)
    parts = []
    for rows in torch.split(order, GROUP):
        used = mask[rows].any(0)
        group = {
            name: t[rows][:, used] if t.shape == mask.shape else t[rows]
            for name, t in inputs.items()
        }
        parts.append(_pooled(call(model, group), group["attention_mask"], pooling))
    return torch.cat(parts)[order.argsort()]


def _pooled(answer: Any, mask: Tensor | None, pooling: Pooling) -> Tensor:
    outputs = tensor_in(answer, "sentence_embedding", "last_hidden_state", "logits").float()
    if outputs.dim() == 3 and pooling == "cls":
        outputs = outputs[:, 0]
    elif outputs.dim() == 3 and pooling == "mean":
        weight = torch.ones_like(outputs[..., :1]) if mask is None else mask[..., None].float()
        outputs = (outputs * weight).sum(1) / weight.sum(1).clamp(min=1)
    if outputs.dim() != 2:
        raise TaskError(
            f"the model gives outputs of shape {tuple(outputs.shape)}, and pooling={pooling!r} "
            'does not make one vector per sentence of them; use pooling="mean" or "cls"'
        )
    return functional.normalize(outputs, dim=1)


def kl(reference: Tensor, outputs: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each row of logits from the reference's, in nats."""
    true = reference.float().log_softmax(-1)
    other = outputs.float().log_softmax(-1)
    # A class that both rule out (-inf) adds nothing, though the difference is not a number.
    terms = true.exp() * (true - other)
    return torch.where(true == -torch.inf, 0.0, terms).sum(-1).clamp(min=0)


def turned(reference: Tensor, outputs: Tensor) -> Tensor:
    """1 - cosine of each row; the mean over both sentences of a pair."""
    apart = 1 - functional.cosine_similarity(reference.float(), outputs.float(), dim=-1)
    return (apart.mean(1) if apart.dim() == 2 else apart).clamp(min=0)


def drawn_loss(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy of labels drawn from the model's own probabilities, summed over rows."""
    chances = outputs.detach().float().softmax(1).cpu()
    drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(outputs.device)
    return functional.cross_entropy(outputs.float(), drawn, reduction="sum")


def drawn_turn(outputs: Tensor, draw: Tensor) -> Tensor:
    """For `turned`: its curvature is that of the unit sphere, halved for each of two sentences."""
    still = outputs.detach().float()
    length = still.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    across = draw - (draw * still).sum(-1, keepdim=True) / length.square() * still
    share = 0.5 if outputs.dim() == 3 else 1.0
    found: Tensor = (outputs.float() * across / length).sum() * share**0.5
    return found


def drawn_error(outputs: Tensor, draw: Tensor) -> Tensor:
    """For `relative_error`: twice the inverse variance of each output, over their number."""
    flat, noise = outputs.float().flatten(1), draw.flatten(1)
    scale = _spread_of(flat.detach().double())
    return (flat * noise * (2 / (scale * flat.shape[1])).sqrt().float()).sum()


def relative_error(reference: Tensor, outputs: Tensor) -> Tensor:
    """Squared error over the reference's variance in the batch, the mean over the outputs.

    Where all rows of the reference agree, its mean square stands in for the variance.
    """
    reference, outputs = reference.double().flatten(1), outputs.double().flatten(1)
    return ((outputs - reference).square() / _spread_of(reference)).mean(1).float()


def _spread_of(reference: Tensor) -> Tensor:
    variance = reference.var(0, correction=0)
    square = reference.square().mean(0)
    scale = torch.where(variance > 1e-12 * square, variance, square)
    return torch.where(scale > 0, scale, 1.0)
