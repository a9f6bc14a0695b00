"""Answers on disk: each row is asked about once, and nothing is mistaken for something else."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tersor
from tersor.methods.distill.logits import logits
from tersor.task import Task, classification, language_model, sentence_pairs
from tersor.task.data import apply
from tersor.train import Teacher, TrainingLog
from tersor.train.memory import Memory, fingerprint


def inputs(n: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def net(width: int = 8, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).eval()


@pytest.fixture
def task() -> Task:
    labels = torch.arange(40) % 3
    return classification(train=(inputs(40), labels), holdout=inputs(32, 1), batch_size=16)


class Counted(nn.Module):
    """Counts the rows that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.rows = net(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.net(x)


def epoch(teacher: Teacher, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    found = teacher.epoch(torch.Generator().manual_seed(seed))
    return [(lesson.inputs, lesson.answer) for lesson in found]


def test_each_row_is_asked_about_once_in_whatever_order(task, tmp_path):
    network = Counted().eval()
    teacher = Teacher(network, task, folder=tmp_path)
    first = epoch(teacher, 0)
    again = epoch(teacher, 1) + epoch(Teacher(network, task, folder=tmp_path), 2)
    assert network.rows == 40
    assert not torch.equal(first[0][0], again[0][0])
    for given, answer in first + again:
        assert torch.allclose(answer, network.net(given), atol=1e-6)


def test_answers_that_come_from_disk_are_those_that_were_given(task, tmp_path):
    first = {
        tuple(row.tolist()): answer
        for rows, answers in epoch(Teacher(net(), task, folder=tmp_path))
        for row, answer in zip(rows, answers, strict=True)
    }
    for x, y in epoch(Teacher(net(), task, folder=tmp_path), 5):
        for row, answer in zip(x, y, strict=True):
            assert torch.equal(answer, first[tuple(row.tolist())])


def test_files_hold_tensors_alone(task, tmp_path):
    epoch(Teacher(net(), task, folder=tmp_path))
    files = sorted(tmp_path.iterdir())
    assert [path.suffix for path in files] == [".safetensors"] * 3
    assert {name for path in files for name in load_file(path)} == {"rows", "answers"}


def test_other_weights_and_other_tasks_have_answers_of_their_own(task):
    changed = net()
    changed[2].bias.data[0] += 1e-3
    other = classification(calibration=inputs(8), holdout=inputs(8, 1))
    marks = {fingerprint(*pair) for pair in ((net(), task), (changed, task), (net(), other))}
    assert len(marks) == 3
    assert fingerprint(net(), task) == fingerprint(net(), task)


def test_shapes_and_types_are_part_of_a_row(task, tmp_path):
    memory = Memory(tmp_path, net(), task)
    zeros = torch.zeros(1, 4)
    for number, given in enumerate((zeros, zeros.reshape(1, 2, 2), zeros.double(), {"x": zeros})):
        answer = memory.answered(given, lambda _, number=number: torch.full((1, 3), float(number)))
        assert answer.tolist() == [[number] * 3]


def test_some_rows_known_and_some_new_come_back_in_order(task, tmp_path):
    network = Counted().eval()
    memory, given = Memory(tmp_path, network, task), inputs(10)
    memory.answered(given[2:5], network)
    found = memory.answered(given, network)
    assert network.rows == 3 + 7
    assert torch.allclose(found, network.net(given), atol=1e-6)


def test_tokens_and_pairs_keep_all_their_rows(tmp_path):
    ids = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(0))
    words = language_model(calibration=ids[:4], holdout=ids[4:])
    memory = Memory(tmp_path / "words", net(), words)
    embedding = nn.Embedding(9, 9)
    wanted = words.predict(embedding, ids[:4])
    for _ in range(2):
        given = ids[[1, 0, 3]]
        found = memory.answered(given, lambda batch: words.predict(embedding, batch))
        assert torch.equal(found, wanted.reshape(4, 5, 9)[[1, 0, 3]].flatten(0, 1))
    texts = [("ab", "cd", 1.0), ("e", "f", 2.0), ("gh", "i", 0.5)]
    pairs = sentence_pairs(test=texts, tokenizer=lambda text: [ord(c) - 96 for c in text])
    memory = Memory(tmp_path / "pairs", net(), pairs)
    batch = {"x": torch.arange(6).reshape(6, 1)}
    first = memory.answered(batch, lambda b: b["x"].reshape(-1, 2, 1).float())
    swapped = {"x": batch["x"][[2, 3, 0, 1]]}
    assert torch.equal(memory.answered(swapped, lambda _: torch.zeros(0)), first[[1, 0]])


def test_a_text_is_known_however_far_it_is_padded(tmp_path):
    rows = torch.arange(12).reshape(3, 4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    texts = {"input_ids": rows * mask, "attention_mask": mask}
    task = classification(calibration=texts, holdout=texts)
    memory, given = Memory(tmp_path, net(), task), apply(lambda part: part[[0, 2], :2], texts)
    memory.answered(given, lambda batch: torch.tensor([[5.0], [7.0]]))
    found = memory.answered(texts, lambda batch: batch["input_ids"].sum(1, keepdim=True).float())
    assert found.tolist() == [[5.0], [4.0 + 5 + 6], [7.0]]
    # The same words in other places are another text.
    moved = {
        "input_ids": torch.tensor([[0, 0, 0, 1]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1]]),
    }
    assert memory.answered(moved, lambda _: torch.tensor([[9.0]])).tolist() == [[9.0]]


def test_no_more_is_kept_than_allowed_and_other_networks_go_first(task, tmp_path):
    given = inputs(64)
    old = Memory(tmp_path, net(), task)
    old.answered(given[:16], net())
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    memory = Memory(tmp_path, net(seed=1), task, most_bytes=int(2.5 * size))
    for rows in given.split(16):
        memory.answered(rows, net(seed=1))
    assert len(list(tmp_path.iterdir())) == 2
    assert not Memory(tmp_path, net(), task)._known
    assert len(Memory(tmp_path, net(seed=1), task)._known) == 32


def test_inputs_that_never_come_back_are_no_longer_kept(task, tmp_path):
    memory = Memory(tmp_path, net(), task)
    for seed in range(4):
        memory.begin()
        memory.answered(inputs(8, seed), net())
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_files_count_as_not_there(task, tmp_path):
    given = inputs(8)
    Memory(tmp_path, net(), task).answered(given, net())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    network = Counted().eval()
    memory = Memory(tmp_path, net(), task)
    memory.answered(given, network)
    assert network.rows == 8
    assert len(Memory(tmp_path, net(), task)._known) == 8


def test_a_training_keeps_answers_beside_its_checkpoints(task, tmp_path):
    network, student = Counted().eval(), net(4, seed=1)
    log = TrainingLog(tmp_path, show=False)
    logits(student, task, original=network, epochs=4, rate=1e-2, log=log)
    held_out = 32
    assert network.rows == held_out + 40
    assert list((tmp_path / "answers").glob("*.safetensors"))
    plain = net(4, seed=1)
    logits(plain, task, original=net(), epochs=4, rate=1e-2)
    assert torch.allclose(student[0].weight, plain[0].weight, atol=1e-4)


def test_a_file_and_an_exported_model_teach(task, tmp_path):
    pytest.importorskip("onnxruntime")
    from tersor.export import OnnxModel, to_onnx

    def taught(teacher: nn.Module) -> Tensor:
        student = net(4, seed=1)
        log = TrainingLog(tmp_path / type(teacher).__name__, show=False)
        logits(student, task, original=teacher, epochs=3, rate=1e-2, log=log)
        return student[0].weight

    original, expected = net(), taught(net())
    path = tersor.save(original, tmp_path / "teacher.tersor", example=inputs(2))
    to_onnx(original, tmp_path / "teacher.onnx", example=inputs(2))
    exported = OnnxModel(tmp_path / "teacher.onnx")
    assert torch.allclose(taught(tersor.load(path)), expected, atol=1e-4)
    assert torch.allclose(taught(exported), expected, atol=1e-4)
    other = copy.copy(exported)
    other.path = path
    before = fingerprint(exported, task)
    assert fingerprint(other, task) != before
    # Weights of large ones lie beside the file.
    (tmp_path / "teacher.onnx.data").write_bytes(b"other weights")
    assert fingerprint(exported, task) != before
