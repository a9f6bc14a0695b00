"""On-policy distillation: the student writes, and the teacher says what it would have expected."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo
from methods.toys import mlp, normal, outcome, tokens
from tersor.errors import ModelError, OptionError, TaskError
from tersor.methods import run
from tersor.methods.distill.on_policy import Spoken, continued, divergence, on_policy
from tersor.methods.prune.magnitude import magnitude
from tersor.task import Task, classification, language_model
from tersor.train import TrainingLog


class Chain(nn.Module):
    """Says the next token from the last one alone."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(8, width), nn.Linear(width, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.embedding(ids).tanh())


def chain(width: int = 16, seed: int = 0, scale: float = 1.0) -> Chain:
    torch.manual_seed(seed)
    net = Chain(width).eval()
    net.output.weight.data *= scale
    return net


def counting() -> Chain:
    """After each token it is all but certain of the next number."""
    net = chain(8)
    net.embedding.weight.data = 9 * torch.eye(8)
    net.output.weight.data = 40 * torch.eye(8).roll(1, 0)
    net.output.bias.data.zero_()
    return net


@pytest.fixture
def task() -> Task:
    ids = tokens(128, 9, vocabulary=8)
    return language_model(calibration=ids[:96], holdout=ids[96:], batch_size=16)


def naive(wanted: Tensor, found: Tensor, beta: float) -> float:
    """Eq. 1 of the paper for one row."""
    p, q = (row.double().exp() / row.double().exp().sum() for row in (wanted, found))

    def kl(a: Tensor, b: Tensor) -> float:
        return sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(a, b, strict=True))

    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_is_that_of_the_paper(task, beta):
    wanted, found = normal(6, 5, seed=1) * 2, normal(6, 5, seed=2)
    expected = [naive(*rows, beta) for rows in zip(wanted, found, strict=True)]
    assert divergence(task, wanted, found, beta).tolist() == pytest.approx(expected, abs=1e-5)


def test_its_ends_are_the_two_divergences(task):
    # Over beta it goes to the forward one, over 1 - beta to the reverse one.
    wanted, found = normal(6, 5, seed=1).double(), normal(6, 5, seed=2).double()
    for end, beta in ((0.0, 1e-3), (1.0, 1 - 1e-3)):
        near = divergence(task, wanted, found, beta) / 1e-3
        assert torch.allclose(near, divergence(task, wanted, found, end), rtol=0.02)


def test_one_row_worked_by_hand(task):
    # Teacher (1, 0), student (1/2, 1/2), their mixture (3/4, 1/4): 1/2 log(4/3) for the teacher,
    # and 1/4 log(2/3) + 1/4 log 2 for the student.
    wanted, found = torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 2)
    expected = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert float(divergence(task, wanted, found, 0.5)) == pytest.approx(expected, abs=1e-6)


def test_texts_are_continued_as_the_student_expects(task):
    generator = torch.Generator().manual_seed(0)
    found = continued(counting(), task, torch.tensor([[1, 2], [6, 7]]), 3, generator)
    assert found.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 1, 2]]
    # Each token is drawn with its chance: 4,000 draws, four standard deviations of at most 0.008.
    net = chain(seed=1)
    drawn = continued(net, task, torch.full((4000, 1), 3), 1, generator)[:, 1]
    expected = net(torch.tensor([[3]]))[0, 0].softmax(0)
    assert (drawn.bincount(minlength=8) / 4000 - expected).abs().max() < 0.032


def test_the_teacher_answers_for_what_was_written(task):
    teacher, student = chain(seed=1), counting()
    lessons = Spoken(teacher, task, student=student, share=1.0, length=3)
    for lesson in lessons.epoch(torch.Generator().manual_seed(0)):
        ids = lesson.inputs
        # Of eight tokens two are the student's own, and three rows are asked about.
        assert torch.equal(ids[:, 6:], (ids[:, 5:7] + 1) % 8)
        assert torch.equal(lesson.answer.reshape(len(ids), 3, 8), teacher(ids)[:, 5:])
    plain = Spoken(teacher, task, student=student, share=0.0, length=3)
    known = {tuple(row) for batch in task.calibration() for row in batch.tolist()}
    for lesson in plain.epoch(torch.Generator().manual_seed(0)):
        assert {tuple(row) for row in lesson.inputs.tolist()} <= known
        assert len(lesson.answer) == lesson.inputs.numel()
    assert len(lessons) == len(plain) == 6


def test_the_share_is_that_of_the_batches(task):
    lessons = Spoken(chain(seed=1), task, student=counting(), share=0.3, length=1)
    generator = torch.Generator().manual_seed(0)
    found = [len(x.answer) < x.inputs.numel() for _ in range(50) for x in lessons.epoch(generator)]
    assert sum(found) / len(found) == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize(("share", "beta"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_the_student_comes_closer_to_its_teacher(task, share, beta):
    student = chain(6, seed=2)
    on_policy(
        student,
        task,
        original=chain(seed=1, scale=3.0),
        epochs=10,
        rate=2e-2,
        share=share,
        beta=beta,
    )
    assert outcome(student)["divergence_after"] < 0.4 * outcome(student)["divergence_before"]


def test_a_llama_with_a_block_less_writes_more_as_before():
    torch.manual_seed(0)
    teacher = zoo.Stories(32, 32, layers=2).eval()
    for layer in teacher.layers:
        layer.wo.weight.data *= 8
        layer.w2.weight.data *= 8
    data = language_model(calibration=tokens(16, 9), holdout=tokens(16, 9, seed=1))
    steps = [
        {"method": "cut.depth", "options": {"blocks": 1}},
        {"method": "distill.on_policy", "options": {"epochs": 3, "rate": 1e-3, "beta": 1.0}},
    ]
    done = run(teacher, steps, data)
    assert outcome(done)["divergence_after"] < outcome(done)["divergence_before"]


def test_zeros_stay_and_the_same_seed_gives_the_same_bits(task):
    def done(seed: int) -> Tensor:
        student = magnitude(chain(6, seed=2), sparsity=0.5)
        on_policy(student, task, original=chain(seed=1), epochs=2, rate=1e-2, generator=seed)
        return student.output.weight

    before = magnitude(chain(6, seed=2), sparsity=0.5).output.weight
    assert torch.equal(done(1), done(1))
    assert not torch.equal(done(1), done(2))
    assert torch.equal(done(1) == 0, before == 0)


def test_what_cannot_be_done_is_refused(task):
    classes = classification(calibration=normal(64, 8), holdout=normal(32, 8))
    with pytest.raises(TaskError, match=r"this task is one of classification; use language_model"):
        on_policy(mlp(4), classes, original=mlp(4))
    with pytest.raises(TaskError, match=r"on_policy needs texts to begin with; pass a task"):
        on_policy(chain(), original=chain())
    with pytest.raises(OptionError, match=r"on_policy compares with another network"):
        on_policy(chain(), task)
    longer = chain()
    longer.output = nn.Linear(16, 9)
    with pytest.raises(ModelError, match=r"the teacher gives \(9,\) numbers .* network \(8,\)"):
        on_policy(chain(), task, original=longer)


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", [1, 6, 7, 9])
def test_where_it_stops_makes_no_difference(step, task, tmp_path, monkeypatch):
    # Six steps in an epoch; what was drawn before the stop is drawn again, for the draws behind it.
    recipe = [{"method": "distill.on_policy", "options": {"epochs": 2}}]

    def trained(folder: Path | None = None) -> nn.Module:
        log = TrainingLog(folder, minutes=0)
        return run(chain(seed=1), recipe, task, original=counting(), log=log)

    expected, wanted, asked = trained(), Spoken.wanted, []

    def stopping(*arguments):
        asked.append(None)
        if len(asked) == step:
            raise Stop
        return wanted(*arguments)

    monkeypatch.setattr(Spoken, "wanted", stopping)
    with pytest.raises(Stop):
        trained(tmp_path)
    found = trained(tmp_path)
    assert len(asked) == 13
    assert outcome(found) == outcome(expected)
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_several_workers_are_refused(task):
    lessons = Spoken(counting(), task, student=chain(), share=1.0, length=None)
    lessons.part = (0, 2)
    with pytest.raises(OptionError, match=r"leave together= out of the log"):
        lessons.epoch(torch.Generator())
