"""Relations: tokens come to be as alike as in the teacher, whatever the widths and heads."""

import math

import pytest
import torch
from torch import Tensor, nn

import zoo
from methods.toys import mlp, normal, outcome, reader, texts, tokens
from tersor.errors import ModelError, OptionError
from tersor.methods import run
from tersor.methods.distill.relations import divergence, relations
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.relating import attention_at, attentions
from tersor.task import Task, classification, language_model


@pytest.fixture
def task() -> Task:
    return classification(calibration=texts(128, 1), holdout=texts(64, 3))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return reader(32, layers=3, heads=4, steps=40)


def naive(own: list[Tensor], theirs: list[Tensor], heads: int) -> float:
    """Eqs. 5 to 9 of the paper for one text, number by number."""

    def relation(vectors: Tensor, head: int) -> list[list[float]]:
        size = vectors.shape[1] // heads
        part = vectors[:, head * size : (head + 1) * size].double()
        found = []
        for one in part:
            alike = [math.exp(float(one @ other) / math.sqrt(size)) for other in part]
            found.append([value / sum(alike) for value in alike])
        return found

    total = 0.0
    for small, large in zip(own, theirs, strict=True):
        for head in range(heads):
            for q, p in zip(relation(small, head), relation(large, head), strict=True):
                total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return total / (heads * len(own[0]))


@pytest.mark.parametrize(("few", "many", "heads"), [(8, 8, 1), (8, 12, 4), (6, 18, 3)])
def test_the_divergence_is_that_of_the_paper(few, many, heads):
    own = [normal(2, 5, few, seed=s) for s in range(3)]
    theirs = [normal(2, 5, many, seed=s) for s in range(3, 6)]
    expected = sum(naive([t[n] for t in own], [t[n] for t in theirs], heads) for n in range(2)) / 2
    assert float(divergence(own, theirs, heads)) == pytest.approx(expected, rel=1e-4)


def test_two_tokens_worked_by_hand():
    # Of one number each: products (1, 0) and (0, 0) in the teacher, all 0 in the student. Only the
    # first row differs: softmax (e, 1) / (e + 1) from a half each.
    own, theirs = torch.zeros(1, 2, 1), torch.tensor([[[1.0], [0.0]]])
    p = math.e / (math.e + 1)
    one = (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))) / 2
    assert float(divergence([own] * 3, [theirs] * 3, 1)) == pytest.approx(3 * one, rel=1e-5)


def test_padded_tokens_count_neither_as_one_nor_as_the_other():
    own, theirs = ([normal(1, 5, 8, seed=s)] * 3 for s in (1, 2))
    short = divergence([t[:, :3] for t in own], [t[:, :3] for t in theirs], 2)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    learned = own[0].clone().requires_grad_()
    found = divergence([learned] * 3, theirs, 2, mask)
    found.backward()
    assert torch.allclose(found, short)
    assert learned.grad[:, 3:].abs().max() == 0
    assert learned.grad.isfinite().all()


def test_attention_is_found_by_the_names_of_its_layers():
    torch.manual_seed(0)

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.qkv = 2, nn.Linear(8, 24)

    found = attentions(nn.Sequential(Fused(), nn.MultiheadAttention(8, 4)))
    assert [(a.path, a.parts, a.heads) for a in found] == [("0", ("0.qkv",), 2), ("1", ("1",), 4)]
    stories = attentions(zoo.Stories(layers=2))
    assert [(a.parts[0], a.heads) for a in stories] == [("layers.0.wq", 8), ("layers.1.wq", 8)]


def test_a_narrow_student_with_other_heads_learns_the_relations(task, teacher):
    def done(weight: float) -> nn.Module:
        student = reader(16, layers=2, heads=2, seed=1)
        return relations(student, task, original=teacher, epochs=12, rate=2e-2, weight=weight)

    student, alone = done(1.0), done(0.0)
    assert outcome(student)["pairs"] == [["layer.1.attention", "layer.2.attention"]]
    assert outcome(student)["heads"] == 1
    assert outcome(student)["divergence_after"] < 0.6 * outcome(student)["divergence_before"]
    with torch.no_grad():
        apart = [_apart(net, teacher) for net in (student, alone)]
    assert apart[0] < 0.7 * apart[1]


def _apart(student: nn.Module, teacher: nn.Module) -> float:
    given, kept = texts(64, 9), []
    for net in (student, teacher):
        parts = []
        last = net.layer[-1].attention
        hooks = [
            layer.register_forward_hook(lambda _, __, out, parts=parts: parts.append(out))
            for layer in (last.query, last.key, last.value)
        ]
        net(**given)
        for hook in hooks:
            hook.remove()
        kept.append(parts)
    return float(divergence(*kept, 1, given["attention_mask"]))


def test_torchs_own_attention_and_grouped_queries_learn_too(task):
    torch.manual_seed(0)
    teacher, student = zoo.Stories(64, layers=2).eval(), zoo.Stories(64, layers=1).eval()
    data = language_model(calibration=tokens(64, 9), holdout=tokens(32, 9, seed=1))
    relations(student, data, original=teacher, epochs=2, rate=5e-3)
    assert outcome(student)["heads"] == 2
    assert outcome(student)["divergence_after"] < outcome(student)["divergence_before"]

    class Own(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, width)
            self.encoder = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
            self.head = nn.Linear(width, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.encoder(self.embedding(ids)).mean(1))

    teacher, student = Own(32).eval(), Own(16).eval()
    words = classification(calibration=tokens(64, 5), holdout=tokens(32, 5, seed=1))
    relations(student, words, original=teacher, epochs=3, rate=1e-2, heads=4)
    assert outcome(student)["pairs"] == [["encoder.self_attn", "encoder.self_attn"]]
    assert outcome(student)["divergence_after"] < outcome(student)["divergence_before"]


def test_zeros_stay_and_the_same_seed_gives_the_same_bits(task, teacher):
    steps = [
        {"method": "prune.magnitude", "options": {"sparsity": 0.5}},
        {"method": "distill.relations", "options": {"epochs": 2, "rate": 1e-2}},
    ]
    one, same = (run(reader(16, seed=1), steps, task, original=teacher) for _ in range(2))
    before = magnitude(reader(16, seed=1), sparsity=0.5).layer[1].attention.key.weight
    assert torch.equal(one.layer[1].attention.key.weight == 0, before == 0)
    assert torch.equal(one.layer[1].attention.key.weight, same.layer[1].attention.key.weight)
    assert not torch.equal(one.layer[1].attention.key.weight, before)


def test_what_cannot_be_done_is_refused(task, teacher):
    flat = classification(calibration=normal(64, 8), holdout=normal(32, 8))
    with pytest.raises(ModelError, match=r"finds no attention in the student, Sequential: neither"):
        relations(mlp(4), flat, original=teacher)
    with pytest.raises(OptionError, match=r"heads=5 does not divide .* \[16, 32\] .* \[1, 2, 4, 8"):
        relations(reader(16), task, original=teacher, heads=5)
    with pytest.raises(OptionError, match=r"pairs: the layer 'head' of the student holds no att"):
        relations(reader(16), task, original=teacher, pairs={"head": "layer.0"})
    with pytest.raises(OptionError, match=r"pairs=.* the teacher has no layer 'layer.9'"):
        relations(reader(16), task, original=teacher, pairs={"layer.0": "layer.9"})
    assert attention_at("m", teacher, "layer.1", "teacher").path == "layer.1.attention"
