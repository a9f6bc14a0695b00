"""Layers of transformers: embeddings, states and attention, block after block."""

import math

import pytest
import torch
from torch import Tensor, nn

import zoo
from methods.toys import normal, outcome, picture_net, pictures, reader, texts, tokens
from tersor.errors import ModelError, OptionError
from tersor.methods import run
from tersor.methods.distill.layers import layers, score_error, scores, state_error
from tersor.methods.prune.magnitude import magnitude
from tersor.task import Task, classification, language_model


@pytest.fixture
def task() -> Task:
    return classification(calibration=texts(128, 1), holdout=texts(64, 3))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return reader(16, layers=4, heads=2, steps=40)


def test_the_errors_are_those_of_the_paper():
    own, theirs = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    pairs = zip(own.flatten().tolist(), theirs.flatten().tolist(), strict=True)
    assert float(state_error(own, theirs)) == pytest.approx(
        sum((a - b) ** 2 for a, b in pairs) / 24, rel=1e-5
    )
    # Eq. 7: the mean over heads of each one's mean squared error.
    small, large = normal(1, 2, 3, 3, seed=1), normal(1, 2, 3, 3, seed=2)
    each = [float((small[0, h] - large[0, h]).square().mean()) for h in range(2)]
    assert float(score_error(small, large)) == pytest.approx(sum(each) / 2, rel=1e-5)


def test_scores_are_those_of_each_head_and_groups_share_keys():
    query, key = normal(1, 3, 8, seed=1), normal(1, 3, 4, seed=2)
    found = scores(query, key, 4)
    for head in range(4):
        q, k = (
            query[0, :, 2 * head : 2 * head + 2],
            key[0, :, 2 * (head // 2) : 2 * (head // 2) + 2],
        )
        assert torch.allclose(found[0, head], q @ k.T / math.sqrt(2), atol=1e-6)


def test_what_a_mask_leaves_out_does_not_count():
    mask = torch.tensor([[1, 1, 0]])
    own, theirs = normal(1, 3, 4, seed=1), normal(1, 3, 4, seed=2)
    assert torch.allclose(state_error(own, theirs, mask), state_error(own[:, :2], theirs[:, :2]))
    small, large = normal(1, 2, 3, 3, seed=1), normal(1, 2, 3, 3, seed=2)
    seen = [(small - large)[..., i, : i + 1].square() for i in range(large.shape[-1])]
    assert torch.allclose(score_error(small, large, causal=True), torch.cat(seen, -1).mean())
    found = score_error(small, large, mask)
    assert torch.allclose(found, score_error(small[..., :2, :2], large[..., :2, :2]))


def state(net: nn.Module, last: int) -> Tensor:
    given = texts(64, 9)
    x = net.embedding(given["input_ids"])
    for layer in net.layer[: last + 1]:
        x = layer(x, given["attention_mask"])
    return x


def test_blocks_learn_from_those_they_are_mapped_to(task, teacher):
    def done(weight: float) -> tuple[nn.Module, float]:
        student = reader(16, layers=2, heads=2, seed=1)
        layers(student, task, original=teacher, epochs=10, rate=1e-2, weight=weight)
        with torch.no_grad():
            wanted = state(teacher, 1)
            return student, float(state_error(state(student, 0), wanted) / wanted.square().mean())

    student, close = done(1.0)
    assert outcome(student)["pairs"] == [["layer.0", "layer.1"], ["layer.1", "layer.3"]]
    assert outcome(student)["attentions"] == 2
    assert outcome(student)["divergence_after"] < 0.6 * outcome(student)["divergence_before"]
    assert close < 0.7 * done(0.0)[1]


def test_a_narrow_student_learns_through_projections_that_are_thrown_away(task, teacher):
    student = reader(8, layers=2, heads=4, seed=1)
    names = list(student.state_dict())
    layers(student, task, original=teacher, epochs=10, rate=1e-2)
    assert outcome(student)["attentions"] == 0
    assert outcome(student)["trained"] == sum(p.numel() for p in student.parameters())
    assert outcome(student)["divergence_after"] < 0.8 * outcome(student)["divergence_before"]
    assert list(student.state_dict()) == names


def test_a_student_made_by_dropping_blocks_learns_from_itself():
    torch.manual_seed(0)
    teacher = zoo.Stories(64, layers=3).eval()
    data = language_model(calibration=tokens(64, 9), holdout=tokens(32, 9, seed=1))
    steps = [
        {"method": "cut.depth", "options": {"blocks": 1}},
        {"method": "distill.layers", "options": {"epochs": 2, "rate": 1e-3}},
    ]
    done = run(teacher, steps, data)
    assert len(outcome(done)["pairs"]) == 2
    assert all(own == theirs for own, theirs in outcome(done)["pairs"])
    assert outcome(done)["attentions"] == 2
    assert outcome(done)["divergence_after"] < outcome(done)["divergence_before"]


def test_zeros_stay_and_the_same_seed_gives_the_same_bits(task, teacher):
    def done(seed: int) -> Tensor:
        student = magnitude(reader(8, seed=1), sparsity=0.5)
        layers(student, task, original=teacher, epochs=2, rate=1e-2, generator=seed)
        return student.layer[1].dense.weight

    before = magnitude(reader(8, seed=1), sparsity=0.5).layer[1].dense.weight
    assert torch.equal(done(1), done(1))
    assert not torch.equal(done(1), done(2))
    assert torch.equal(done(1) == 0, before == 0)


def test_hugging_faces_bert_teaches_a_smaller_one():
    transformers = pytest.importorskip("transformers")

    def bert(layers: int, width: int) -> nn.Module:
        torch.manual_seed(layers)
        config = transformers.BertConfig(
            vocab_size=16, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=8, num_labels=4,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()

    data = classification(calibration=texts(64, 1), holdout=texts(32, 3))
    steps = [
        {"method": "distill.layers", "options": {"epochs": 3, "rate": 5e-3}},
        {"method": "distill.relations", "options": {"epochs": 1, "rate": 1e-3, "heads": 2}},
    ]
    done = run(bert(1, 16), steps, data, original=bert(2, 32))
    first, second = (step.outcome for step in done.recipe.steps)
    assert first["pairs"] == [["bert.encoder.layer.0", "bert.encoder.layer.1"]]
    assert first["attentions"] == 1
    assert first["divergence_after"] < first["divergence_before"]
    last = "bert.encoder.layer.{}.attention.self"
    assert second["pairs"] == [[last.format(0), last.format(1)]]


def test_what_cannot_be_done_is_refused(task, teacher):
    data = classification(calibration=pictures(32, 1)[0], holdout=pictures(32, 3)[0])
    with pytest.raises(
        ModelError, match=r"compares \(n, tokens, width\), and blocks give \(2, 1, 8"
    ):
        layers(picture_net(4), data, original=picture_net(4))
    with pytest.raises(ModelError, match=r"layers finds no repeated blocks in the student, Linear"):
        layers(nn.Linear(2, 2), task, original=teacher)
    with pytest.raises(OptionError, match=r"pairs=.* the student has no layer 'layer.5'"):
        layers(reader(8), task, original=teacher, pairs={"layer.5": "layer.1"})
    with pytest.raises(OptionError, match=r"layers compares with another network"):
        layers(reader(8), task)
