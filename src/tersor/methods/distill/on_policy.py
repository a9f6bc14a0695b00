"""On-policy distillation: a language model learns from its teacher on texts that it wrote itself.

A student that only reads good texts never sees where its own mistakes lead. So some batches are
continued by the student, token by token, and the teacher says what it would have expected there.
For language models that are to write; where one is only to judge texts, `distill.logits` is faster,
since writing takes a run for each token.

Source: Agarwal et al. 2024 (GKD), arXiv:2306.13649, eq. 1 for the divergence and algorithm 1.
Differs from the paper: openings are those of the task's own texts, since it tells no prompts from
answers; of texts that are not written by the student every token counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.errors import OptionError, TaskError
from tersor.measure import evaluating
from tersor.methods.asked import original_of
from tersor.methods.learning import learn, trainable
from tersor.recipe import Outcome, method
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import Lesson, Teacher, TrainingLog
from tersor.train.lessons import behind


@method
def on_policy(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    log: TrainingLog | None = None,
    epochs: Annotated[int, Field(ge=1)] = 3,
    rate: Annotated[float, Field(gt=0, le=1)] = 5e-4,
    share: Annotated[float, Field(ge=0, le=1)] = 0.5,
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5,
    length: Annotated[int, Field(ge=1)] | None = None,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Trains everything that is stored as plain or sparse floats, in place.

    original: the teacher; `run` passes the network it was given, or its own `original`
    epochs: passes over the training inputs of the task, or its calibration inputs if it has none
    rate: the highest
    share: of the batches that the student continues, the paper's lambda; 0 to 1
    beta: 0 for the divergence from the teacher, which covers all that it would say, 1 for the
        reverse, which keeps to what it holds likely; between them both from their mixture
    length: tokens that the student writes, at most all but the first; None for half of each text
    training: settings of the loop that differ from the usual, see `tersor.train.Training`
    generator: draws the order of the inputs, which are continued, and each token
    include, exclude: patterns, see `walk`; with them vectors that match nothing are trained too

    The best state on held-out texts is kept, be it the start; the outcome is that of
    `distill.logits`. Raises TaskError unless the task is one of language, and else as
    `distill.logits` does.
    """
    original = original_of("distill.on_policy", original)
    if task is None:
        raise TaskError("distill.on_policy needs texts to begin with; pass a task")
    if task.kind != "language":
        raise TaskError(
            f"distill.on_policy has a language model write, and this task is one of {task.kind}; "
            "use language_model(...), or distill.logits"
        )
    lessons = Spoken(original, task, student=model, share=share, length=length)

    def loss(outputs: Tensor, lesson: Lesson) -> Tensor:
        wanted = lessons.wanted(outputs, lesson)
        return divergence(task, wanted, said(outputs, lesson), beta).mean()

    return model, learn(
        "distill.on_policy",
        model,
        lessons,
        original,
        parameters=trainable("distill.on_policy", model, include, exclude),
        epochs=epochs,
        rate=rate,
        loss=loss,
        training=training,
        generator=generator,
        log=log,
    )


@dataclass
class Spoken(Teacher):
    """Texts of the task, some of them continued by a student, and a teacher's answers.

    Of what the student wrote, the teacher answers only for its own tokens.
    """

    student: nn.Module = field(kw_only=True)
    share: float = field(kw_only=True)
    length: int | None = field(kw_only=True)

    def epoch(self, generator: torch.Generator, skip: int = 0) -> Iterator[Lesson]:
        """Every batch once, in another order each time, and the answers to it.

        Raises OptionError for one of several workers: what a student writes takes random numbers,
        and other ones on each of them.
        """
        if self.part[1] > 1:
            raise OptionError(
                "distill.on_policy draws texts on each process, which then no longer see the same "
                "batches; leave together= out of the log"
            )
        drawn = (self._drawn(lesson, generator) for lesson in self._batches(generator))
        return (self._judged(lesson, written) for lesson, written in behind(drawn, skip))

    def _drawn(self, lesson: Lesson, generator: torch.Generator) -> tuple[Lesson, int]:
        """The batch, or what the student made of it, and how many tokens of that count."""
        ids = lesson.inputs
        assert isinstance(ids, Tensor)
        if float(torch.rand((), generator=generator)) >= self.share:
            return lesson, ids.shape[1]
        most = max(1, ids.shape[1] // 2) if self.length is None else self.length
        written = min(most, ids.shape[1])
        # The last token that it would write is not drawn: nothing is asked of what follows it.
        opening = ids[:, : ids.shape[1] + 1 - written]
        text = continued(self.student, self.task, opening, written - 1, generator)
        return Lesson(text), written

    def _judged(self, lesson: Lesson, counted: int) -> Lesson:
        lesson = self._answered(lesson)
        assert lesson.answer is not None
        return lesson._replace(answer=last(lesson.answer, len(lesson.inputs), counted))


def continued(
    model: nn.Module, task: Task, ids: Tensor, length: int, generator: torch.Generator
) -> Tensor:
    """(n, tokens) and `length` tokens more, each drawn from what the model expects."""
    with evaluating(model):
        for _ in range(length):
            expected = last(task.predict(model, ids), len(ids), 1).softmax(-1).cpu()
            drawn = torch.multinomial(expected, 1, generator=generator)
            ids = torch.cat([ids, drawn.to(ids.device)], 1)
    return ids


def last(rows: Tensor, texts: int, counted: int) -> Tensor:
    """The rows of the last `counted` tokens of each text. rows: (texts * tokens, vocabulary)"""
    return rows.reshape(texts, -1, rows.shape[-1])[:, -counted:].flatten(0, 1)


def said(outputs: Tensor, lesson: Lesson) -> Tensor:
    """The rows that the lesson's answer answers to."""
    assert lesson.answer is not None
    texts = len(lesson.inputs)
    return last(outputs, texts, len(lesson.answer) // texts)


def divergence(task: Task, wanted: Tensor, outputs: Tensor, beta: float) -> Tensor:
    """(rows,) in nats: the generalised Jensen-Shannon divergence of logits.

    beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, P the teacher and Q the
    student; KL(P || Q) at 0 and KL(Q || P) at 1, which it goes to over beta or 1 - beta.
    """
    p, q = wanted.to(outputs.device).log_softmax(-1), outputs.log_softmax(-1)
    if beta == 0:
        return task.divergence(p, q)
    if beta == 1:
        return task.divergence(q, p)
    mixture = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return beta * task.divergence(p, mixture) + (1 - beta) * task.divergence(q, mixture)
