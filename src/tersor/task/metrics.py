"""Metrics as statistics per sample and a reduction over them.

Kept apart so that an evaluation can stream over batches, and a bootstrap can resample the rows and
reduce again without running the model. An output that is not a number counts as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tersor.errors import OptionError, TaskError

BINS = 15


@dataclass(frozen=True)
class Metric:
    """How well outputs match targets.

    sample: outputs (n, ...), targets (n, ...) -> statistics (n, k), float64
    reduce: statistics (N, k) of all samples -> the metric
    unit: "points" on a scale of 100, "" for none or the target's own
    """

    sample: Callable[[Tensor, Tensor], Tensor]
    reduce: Callable[[Tensor], float]
    higher_is_better: bool = True
    unit: str = ""


def decisions(outputs: Tensor) -> Tensor:
    """The class of each row of logits, -1 where a logit is not a number."""
    return outputs.argmax(-1).masked_fill(outputs.isnan().any(-1), -1)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = last - (counts.double() - 1) / 2
    return ranks[inverse]


def same_shape(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (n, k). Raises TaskError where broadcasting would pair the wrong values."""
    outputs, targets = outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1)
    if outputs.shape != targets.shape:
        raise TaskError(
            f"the model gives {outputs.shape[1]} values for each of {len(outputs)} samples, but "
            f"the targets have shape {tuple(targets.shape)}; give one target per value"
        )
    return outputs, targets


def _hits(outputs: Tensor, targets: Tensor) -> Tensor:
    return (decisions(outputs) == targets).double()[:, None]


def _top5_hits(outputs: Tensor, targets: Tensor) -> Tensor:
    best = outputs.topk(min(5, outputs.shape[-1]), -1).indices
    found = (best == targets[:, None]).any(-1) & ~outputs.isnan().any(-1)
    return found.double()[:, None]


def _decided(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.stack((decisions(outputs), targets), 1).double()


def _confidence(outputs: Tensor, targets: Tensor) -> Tensor:
    surest = outputs.float().softmax(-1).amax(-1).nan_to_num(1.0)
    return torch.stack((surest.double(), (decisions(outputs) == targets).double()), 1)


def _token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    loss = functional.cross_entropy(outputs.float(), targets, reduction="none")
    return loss.double().nan_to_num(torch.inf)[:, None]


def _absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs, targets = same_shape(outputs.double(), targets.double())
    return (outputs - targets).abs().mean(1, keepdim=True)


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs, targets = same_shape(outputs.double(), targets.double())
    return (outputs - targets).square().mean(1, keepdim=True)


def _paired(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.cat(same_shape(outputs.double(), targets.double()), 1)


def _similarity(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs (n, 2, d): the cosine between the two embeddings of a pair, and its score."""
    cosine = functional.cosine_similarity(outputs[:, 0].double(), outputs[:, 1].double(), dim=-1)
    return torch.stack((cosine, targets.double().flatten()), 1)


def _mean(values: Tensor) -> float:
    return values.mean().item()


def _points(values: Tensor) -> float:
    return 100 * values.mean().item()


def _counts(decided: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hits, decisions and truths of each class that was decided or true at least once."""
    # Decision -1 (not a number) belongs to no class; it moves to the last bin, which is cut off.
    bins = int(decided.max().item()) + 2
    predicted, true = decided.long().remainder(bins).unbind(1)
    hits = torch.bincount(true[predicted == true], minlength=bins)[:-1].double()
    decisions_of = torch.bincount(predicted, minlength=bins)[:-1].double()
    truths = torch.bincount(true, minlength=bins)[:-1].double()
    seen = (decisions_of + truths) > 0
    return hits[seen], decisions_of[seen], truths[seen]


def _precision(decided: Tensor) -> float:
    hits, decisions_of, _ = _counts(decided)
    return _points(hits / decisions_of.clamp(min=1))


def _recall(decided: Tensor) -> float:
    hits, _, truths = _counts(decided)
    return _points(hits / truths.clamp(min=1))


def _f1(decided: Tensor) -> float:
    hits, decisions_of, truths = _counts(decided)
    return _points(2 * hits / (decisions_of + truths))


def _calibration_error(confidence: Tensor) -> float:
    sure, right = confidence.unbind(1)
    bins = (sure * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, sure - right)
    return 100 * gaps.abs().sum().item() / len(sure)


def _perplexity(losses: Tensor) -> float:
    return losses.mean().exp().item()


def _root(squares: Tensor) -> float:
    return squares.mean().sqrt().item()


def _r2(paired: Tensor) -> float:
    """1 - error / variance, averaged over the outputs; 1 or 0 where a target never varies."""
    outputs, targets = paired.chunk(2, 1)
    error = (outputs - targets).square().sum(0)
    spread = (targets - targets.mean(0)).square().sum(0)
    constant = torch.where(error == 0, 1.0, 0.0).double()
    return torch.where(spread > 0, 1 - error / spread, constant).mean().item()


def _pearson(paired: Tensor) -> float:
    """100 times the correlation, averaged over the outputs; 0 where one side never varies."""
    centred = paired - paired.mean(0)
    first, second = centred.chunk(2, 1)
    scale = first.norm(dim=0) * second.norm(dim=0)
    both = (first * second).sum(0)
    return _points(torch.where(scale > 0, both / scale, 0.0))


def _spearman(paired: Tensor) -> float:
    columns = [average_ranks(column) for column in paired.unbind(1)]
    return _pearson(torch.stack(columns, 1))


CLASSIFICATION = {
    "accuracy": Metric(_hits, _points, unit="points"),
    "top5": Metric(_top5_hits, _points, unit="points"),
    "f1": Metric(_decided, _f1, unit="points"),
    "precision": Metric(_decided, _precision, unit="points"),
    "recall": Metric(_decided, _recall, unit="points"),
    "calibration_error": Metric(_confidence, _calibration_error, False, "points"),
}
REGRESSION = {
    "r2": Metric(_paired, _r2),
    "mae": Metric(_absolute, _mean, False),
    "mse": Metric(_squared, _mean, False),
    "rmse": Metric(_squared, _root, False),
    "spearman": Metric(_paired, _spearman, unit="points"),
    "pearson": Metric(_paired, _pearson, unit="points"),
}
EMBEDDING = {
    "spearman": Metric(_similarity, _spearman, unit="points"),
    "pearson": Metric(_similarity, _pearson, unit="points"),
}
LANGUAGE = {
    "perplexity": Metric(_token_loss, _perplexity, False),
    "accuracy": Metric(_hits, _points, unit="points"),
}


def chosen(
    metrics: Sequence[str] | Mapping[str, Metric] | None, known: Mapping[str, Metric]
) -> dict[str, Metric]:
    """The metrics asked for, by name or as they are; all of `known` when None."""
    if metrics is None:
        return dict(known)
    if not metrics or isinstance(metrics, str):
        raise OptionError(f"metrics={metrics!r}: give a list with at least one of {list(known)}")
    if isinstance(metrics, Mapping):
        return dict(metrics)
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise OptionError(f"metrics: {unknown} are not among {list(known)}")
    return {name: known[name] for name in metrics}
