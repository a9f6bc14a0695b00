"""Task: the one thing that users describe, how to feed a model and how to judge it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import OptionError, TaskError
from tersor.task import kinds
from tersor.task.data import Inputs, Rows, Split, add_to, head, rows_in, spread, tensors_of
from tersor.task.kinds import Kind, Pooling
from tersor.task.metrics import Metric, decisions, same_shape
from tersor.task.splits import CALIBRATION, completed

_MOST_HASHED = 2**26
"""Numbers of training inputs in a fingerprint, about: those of 85,000 small pictures."""


class Task:
    """Data in splits, and what a model's outputs on it mean. Made by `classification` and the like.

    metrics: by name; the first is the headline, the one that a drop is measured in
    notes: sentences that a report must show, such as which split stands in for another
    tokenizer: what texts were encoded with, so that a report can show them again; None without
    """

    def __init__(
        self,
        kind: Kind,
        metrics: Mapping[str, Metric],
        splits: Mapping[str, Split],
        *,
        classes: list[str] | None = None,
        pooling: Pooling = "mean",
        score_range: tuple[float, float] = (0.0, 1.0),
        notes: list[str] | None = None,
    ) -> None:
        """splits: any of test, train, calibration, holdout; the last two are derived if absent."""
        self.kind = kind
        self.metrics = dict(metrics)
        self.classes = classes
        self.notes = list(notes or [])
        self.tokenizer: Any = None
        self._splits = completed(dict(splits), self.notes)
        self._pooling = pooling
        self._score_range = score_range
        self._top_label = -1
        self._fingerprint: str | None = None

    @property
    def has_test(self) -> bool:
        """True when there are labelled test samples."""
        return "test" in self._splits

    @property
    def has_train(self) -> bool:
        """True when there are labelled training samples."""
        return "train" in self._splits

    def example(self, n: int = 2) -> Inputs:
        """The first `n` real samples (fewer if there are fewer), for tracing and latency."""
        ranked = [
            self._splits[name]
            for name in ("calibration", "train", "test", "holdout")
            if name in self._splits
        ]
        rows = [split for split in ranked if isinstance(split, Rows)]
        if rows:
            split = next((s for s in rows if s.count >= n), max(rows, key=lambda s: s.count))
            return split.gather(torch.arange(min(n, split.count)))[0]
        inputs = next(inputs for inputs, _ in ranked[0].batches())
        return head(inputs, n)

    def calibration(self, n: int | None = None) -> list[Inputs]:
        """Batches of the first `n` unlabelled samples: all that was given, at most 512."""
        return self._unlabelled("calibration", n)

    def holdout(self, n: int | None = None) -> list[Inputs]:
        """Unlabelled samples that calibration never saw, at most 512."""
        return self._unlabelled("holdout", n)

    def train(self, generator: torch.Generator | None = None) -> Iterator[tuple[Inputs, Tensor]]:
        """Training batches, shuffled by `generator` if given. Raises TaskError without any."""
        return self._labelled("train", generator)

    def train_batches(self) -> int:
        """How many batches `train` gives. Raises TaskError without any, or where it has no end."""
        if not self.has_train:
            raise self._missing("train")
        return len(self._splits["train"])

    def test(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Test batches, always in the same order. Raises TaskError without any."""
        return self._labelled("test")

    def predict(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """What the model says, as one row per decision.

        classification: logits (n, classes), the logarithms if the model gives probabilities.
        regression: (n, k). language: logits (tokens, vocabulary). embedding: (n, 2, d), length 1.
        Raises TaskError when the model cannot take these inputs, or gives something else.
        """
        inputs = kinds.placed(model, inputs)
        if self.kind == "embedding":
            vectors = kinds.embeddings(model, inputs, self._pooling)
            return vectors.reshape(-1, 2, vectors.shape[1])
        if self.kind == "regression":
            return kinds.values(model, inputs).float()
        if self.kind == "language":
            outputs = kinds.next_tokens(model, inputs).float()
        else:
            outputs = self._as_logits(kinds.logits(model, inputs)).float()
        if outputs.shape[1] <= self._top_label:
            raise TaskError(
                f"labels reach {self._top_label} but the model gives {outputs.shape[1]} classes; "
                "labels count from 0"
            )
        return outputs

    def targets(self, inputs: Inputs, targets: Tensor) -> Tensor:
        """The targets of the rows that `predict` gives for `inputs`."""
        if self.kind == "language":
            return targets.flatten()
        return targets.reshape(len(targets), -1) if self.kind == "regression" else targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training minimises, given rows of `predict` and `targets`."""
        targets = targets.to(outputs.device)
        if self.kind == "regression":
            return functional.mse_loss(*same_shape(outputs, targets.float()))
        if self.kind == "embedding":
            low, high = self._score_range
            cosine = functional.cosine_similarity(outputs[:, 0], outputs[:, 1], dim=-1)
            return functional.mse_loss(cosine, (targets.float().flatten() - low) / (high - low))
        return functional.cross_entropy(outputs, targets)

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """(rows,) >= 0: how far `outputs` are from those of the original model.

        classification, language: KL in nats. embedding: 1 - cosine. regression: squared error over
        the reference's variance. Infinite where an output is not a number.
        """
        reference = reference.to(outputs.device)
        if self.kind == "regression":
            apart = kinds.relative_error(reference, outputs)
        elif self.kind == "embedding":
            apart = kinds.turned(reference, outputs)
        else:
            apart = kinds.kl(reference, outputs)
        return apart.nan_to_num(torch.inf, torch.inf)

    def score(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """One number, drawn anew each time, whose gradient tells how `divergence` curves.

        Over many draws, the mean of gradient times gradient (of each row, in the outputs) is the
        second derivative of that row's divergence from `outputs`. For classes that is
        the Fisher information: the loss of a label that the model itself drew.
        """
        if self.kind in ("classification", "language"):
            return kinds.drawn_loss(outputs, generator)
        draw = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        if self.kind == "embedding":
            return kinds.drawn_turn(outputs, draw)
        return kinds.drawn_error(outputs, draw)

    def labels(self, outputs: Tensor) -> Tensor | None:
        """(rows,) the class of each row, -1 where it is not a number; None without classes."""
        return decisions(outputs) if self.kind in ("classification", "language") else None

    def evaluate(self, model: nn.Module, *, on: str = "test") -> dict[str, float]:
        """Every metric on "test" or "train", with the model in evaluation mode."""
        if on not in ("test", "train"):
            raise OptionError(f'on={on!r} has no labels; use "test" or "train"')
        found: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        with kinds.evaluation_mode(model):
            for inputs, targets in self._labelled(on):
                outputs = self.predict(model, inputs).cpu()
                rows = self.targets(inputs, targets).cpu()
                for name, metric in self.metrics.items():
                    found[name].append(metric.sample(outputs, rows))
        return {name: m.reduce(torch.cat(found[name])) for name, m in self.metrics.items()}

    def validate(self, model: nn.Module) -> float | None:
        """Mean loss on held-out samples with their labels; None where there are no such labels."""
        total, rows = 0.0, 0
        with kinds.evaluation_mode(model):
            for inputs, targets in self._splits["holdout"].batches():
                if targets is None:
                    return None
                wanted = self.targets(inputs, targets)
                total += len(wanted) * float(self.loss(self.predict(model, inputs), wanted))
                rows += len(wanted)
        return total / rows if rows else None

    def fingerprint(self) -> str:
        """sha256 of settings and samples: a key for caches.

        Training samples are spread evenly where they are many; of a loader, which may draw them,
        none are read.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            settings = [self.kind, list(self.metrics), self.classes, self._pooling]
            digest.update(json.dumps([*settings, self._score_range]).encode())
            for name in ("calibration", "holdout"):
                digest.update(name.encode())
                for inputs in self._unlabelled(name, None):
                    _hash(digest, inputs)
            for name in ("train", "holdout"):
                split = self._splits.get(name)
                rows = spread(split, _MOST_HASHED) if isinstance(split, Rows) else ()
                for inputs, targets in rows:
                    _hash(digest, inputs)
                    _hash(digest, torch.empty(0) if targets is None else targets)
            if self.has_test:
                for inputs, targets in self.test():
                    _hash(digest, inputs)
                    _hash(digest, targets)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @property
    def rows_per_sample(self) -> int:
        """Rows of inputs: two sentences are one pair."""
        return 2 if self.kind == "embedding" else 1

    def _unlabelled(self, name: str, n: int | None) -> list[Inputs]:
        left = (CALIBRATION if n is None else n) * self.rows_per_sample
        batches: list[Inputs] = []
        for inputs, _ in self._splits[name].batches():
            if left <= 0:
                break
            batches.append(head(inputs, left))
            left -= rows_in(inputs)
        return batches

    def _labelled(
        self, name: str, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Inputs, Tensor]]:
        if name not in self._splits:
            raise self._missing(name)
        return self._batches(name, generator)

    def _missing(self, name: str) -> TaskError:
        return TaskError(f"this task has no {name} data; give {name}=(inputs, targets)")

    def _batches(
        self, name: str, generator: torch.Generator | None
    ) -> Iterator[tuple[Inputs, Tensor]]:
        any_yet = False
        for inputs, targets in self._splits[name].batches(generator):
            if targets is None:
                raise TaskError(f"the {name} data has no targets; give {name}=(inputs, targets)")
            if not targets.is_floating_point():
                self._top_label = max(self._top_label, int(targets.max()))
            any_yet = True
            yield inputs, targets
        if not any_yet:
            raise TaskError(f"the {name} data is empty; a loader must be readable more than once")

    def _as_logits(self, outputs: Tensor) -> Tensor:
        if kinds.are_probabilities(outputs.detach()):
            self._note("the model gives probabilities; their logarithms are used as logits")
            return outputs.float().clamp(min=torch.finfo(torch.float32).tiny).log()
        if kinds.is_one_share(outputs.detach()):
            self._note(
                "the model gives one value from 0 to 1 for each sample, which is read as the logit "
                "of class 1; if it is a probability, let the model return what its sigmoid is given"
            )
        return outputs

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _hash(digest: Any, inputs: Inputs) -> None:
    for name, tensor in tensors_of(inputs).items():
        add_to(digest, name, tensor)
