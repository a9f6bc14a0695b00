"""Each kind of data gives the task it describes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import OptionError, TaskError
from tersor.sources import open_task
from tersor.sources.data import KINDS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def npz(**arrays):
    np.savez("data.npz", **arrays)


def batch(task):
    return next(iter(task.test()))


def test_npz_with_rows_of_numbers(folder):
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    npz(x=rows, y=np.arange(10) % 3)
    task = open_task("npz:data.npz")
    inputs, labels = batch(task)
    assert torch.equal(inputs, torch.from_numpy(rows))
    assert labels.tolist() == [i % 3 for i in range(10)]
    assert (task.kind, task.has_train) == ("classification", False)


@pytest.mark.parametrize(
    ("shape", "query", "expected"),
    [
        ((6, 3, 8, 8), "", (6, 3, 8, 8)),
        ((6, 8, 8, 3), "", (6, 3, 8, 8)),
        ((6, 8, 8), "", (6, 1, 8, 8)),
        ((6, 3, 8, 3), "?layout=NHWC", (6, 3, 3, 8)),
    ],
)
def test_npz_with_pictures(folder, shape, query, expected):
    npz(x_test=np.full(shape, 255, np.uint8), y_test=np.zeros(6, int))
    inputs, _ = batch(open_task(f"npz:data.npz{query}"))
    assert tuple(inputs.shape) == expected
    assert (inputs == 1).all()


def test_npz_with_pictures_that_are_normalized(folder):
    npz(x_test=np.full((6, 3, 8, 8), 255, np.uint8), y_test=np.zeros(6, int))
    inputs, _ = batch(open_task("npz:data.npz?mean=0.5,0.25,0&std=0.5,0.25,2"))
    # (1 - mean) / std of each channel.
    assert inputs[0, :, 0, 0].tolist() == [1.0, 3.0, 0.5]


def test_npz_for_regression(folder):
    npz(x=np.zeros((5, 2), np.float32), y=np.linspace(0, 1, 5))
    assert open_task("npz:data.npz?kind=regression").kind == "regression"


def test_a_table_with_numbers_and_categories(folder):
    Path("test.csv").write_text("size,colour,price\n1,red,10\n3,blue,20\n")
    Path("train.csv").write_text("size,colour,price\n1,red,10\n2,red,15\n3,blue,20\n")
    task = open_task("csv:test.csv?target=price&kind=regression&train=train.csv")
    inputs, targets = batch(task)
    # The mean of 1, 2, 3 is 2, their spread sqrt(2/3); then blue and red.
    spread = (2 / 3) ** 0.5
    assert torch.allclose(inputs, torch.tensor([[-1 / spread, 0, 1], [1 / spread, 1, 0]]))
    assert targets.flatten().tolist() == [10, 20]
    chosen = open_task("csv:test.csv?target=price&kind=regression&features=size")
    assert batch(chosen)[0].shape == (2, 1)


@pytest.fixture
def tokenizer(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    return folder / "model"


def test_texts_take_the_tokenizer_of_the_model(folder, tokenizer):
    Path("t.tsv").write_text("good film\tpos\nbad film\tneg\n")
    spec = "csv:t.tsv?columns=text,label&text=text&label=label"
    task = open_task(spec, tokenizer=tokenizer)
    inputs, labels = batch(task)
    assert inputs["input_ids"].shape == (2, 4)
    assert labels.tolist() == [1, 0]
    assert task.classes == ["neg", "pos"]
    named = open_task(f"{spec}&tokenizer={tokenizer}")
    assert torch.equal(batch(named)[0]["input_ids"], inputs["input_ids"])


def test_texts_without_a_tokenizer_are_refused(folder):
    Path("t.csv").write_text("text,label\ngood,1\n")
    with pytest.raises(OptionError, match="texts need a tokenizer"):
        open_task("csv:t.csv?text=text")


def test_sentence_pairs(folder, tokenizer):
    Path("p.csv").write_text("a,b,score\ngood film,bad film,1\ngood,good,5\n")
    task = open_task("csv:p.csv?first=a&second=b&score=score&range=1,5", tokenizer=tokenizer)
    inputs, scores = batch(task)
    assert task.kind == "embedding"
    assert inputs["input_ids"].shape[0] == 4
    assert scores.tolist() == [1, 5]


def test_text_for_a_language_model(folder, tokenizer):
    Path("story.txt").write_text("good film bad film " * 40)
    task = open_task("text:story.txt?length=16", tokenizer=tokenizer)
    inputs, targets = batch(task)
    assert task.kind == "language"
    assert inputs.shape[1] == targets.shape[1] == 16


def test_a_table_needs_to_be_told_its_columns(folder):
    Path("t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(OptionError, match=r"\?target=price for a table"):
        open_task("csv:t.csv")


def test_pictures_in_folders(folder):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("test", 2), ("train", 3)):
        for label, grey in (("cat", 0), ("dog", 255)):
            place = folder / "pets" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (20, 12), (grey,) * 3).save(place / f"{i}.png")
    task = open_task("imagefolder:pets?size=8&mean=0.5,0.5,0.5&std=0.5,0.5,0.5")
    inputs, labels = batch(task)
    assert inputs.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 0, 1, 1]
    assert inputs[:, 0, 0, 0].tolist() == [-1, -1, 1, 1]
    assert task.classes == ["cat", "dog"]


def test_a_saved_dataset_uses_its_test_and_its_train(folder):
    pa = pytest.importorskip("pyarrow")
    for split, rows in (("test", 3), ("train", 5)):
        place = folder / "saved" / split
        place.mkdir(parents=True)
        table = pa.table({"x": [float(i) for i in range(rows)], "y": [i % 2 for i in range(rows)]})
        with (
            pa.OSFile(str(place / "data.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
        (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    task = open_task("hf:saved?target=y")
    assert len(batch(task)[1]) == 3
    assert task.has_train


def test_code_that_makes_a_task(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    Path("own_data.py").write_text(
        "import torch\nfrom tersor.task import classification\n"
        "def task():\n    return classification(test=(torch.zeros(4, 2), torch.zeros(4).long()))\n"
        "def broken():\n    raise OSError('no disk')\n"
    )
    task = open_task("own_data.py:task")
    assert task.evaluate(nn.Linear(2, 3)).keys() >= {"accuracy"}
    with pytest.raises(TaskError, match=r"raised OSError: no disk"):
        open_task("own_data.py:broken")
    with pytest.raises(TaskError, match=r"has no 'tusk'; it has broken, task"):
        open_task("own_data.py:tusk")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("npz:a.npz?mean=x", r"mean=x is not a list of numbers"),
        ("npz:a.npz?kind=regresion", r"kind=regresion: it is classification or regression"),
        ("npz:a.npz?kind=regression&mean=1", r"mean= is for pictures that are classified"),
        ("npz:rows.npz?layout=NCHW", r"layout= is for pictures .* arrays of shape \(2, 3\)"),
        ("imagefolder:a?size=big", r"size=big is not a whole number"),
        ("text:a.txt?lenght=3", r"has no option 'lenght'; its options are"),
    ],
)
def test_an_option_that_does_not_fit(folder, spec, said):
    npz_path = folder / "a.npz"
    np.savez(npz_path, x=np.zeros((2, 3, 4, 4), np.uint8), y=np.zeros(2, int))
    np.savez("rows.npz", x=np.zeros((2, 3), np.float32), y=np.zeros(2, int))
    with pytest.raises(OptionError, match=said):
        open_task(spec)


def test_a_path_may_have_any_character_in_its_options(folder):
    Path("a&b.csv").write_text("x,y\n1,0\n2,1\n")
    Path("test.csv").write_text("x,y\n1,0\n2,1\n")
    assert open_task("csv:test.csv?target=y&train=a%26b.csv").has_train


def test_a_file_that_is_no_npz_is_refused_without_talk_of_pickles(folder):
    Path("bad.npz").write_text("x,y\n1,2\n")
    np.save("one.npy", np.zeros(3))
    with pytest.raises(
        TaskError, match=r"^bad.npz cannot be read as .npz: it is something else, or"
    ):
        open_task("npz:bad.npz")
    with pytest.raises(TaskError, match=r"one.npy holds one array without a name"):
        open_task("npz:one.npy")


def test_a_word_that_names_no_data(folder):
    with pytest.raises(TaskError, match=r"cifar is no data; write file.py:task_factory, or npz"):
        open_task("cifar")


def test_every_kind_is_in_the_guide():
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "cli.md").read_text()
    for kind, (_, options) in KINDS.items():
        assert f"`{kind}:" in guide
        for option in options:
            assert f"`{option}`" in guide, (kind, option)
