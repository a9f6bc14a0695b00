import json

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from tersor.errors import OptionError, TaskError
from tersor.task import (
    Table,
    audio_classification,
    classification,
    image_classification,
    image_folder,
    npz_splits,
    read_npz,
    read_table,
    tabular,
    text_classification,
)


def all_inputs(task):
    return torch.cat([inputs for inputs, _ in task.test()])


def all_targets(task):
    return torch.cat([targets for _, targets in task.test()])


# Arrays in files


def test_npz_files_become_splits_by_their_keys(tmp_path):
    x, y = np.random.rand(6, 2).astype(np.float32), np.arange(6) % 2
    np.savez(tmp_path / "all.npz", x_test=x, y_test=y, x_train=x + 1, y_train=y, x_holdout=x)
    task = classification(**npz_splits(tmp_path / "all.npz"))
    assert np.array_equal(all_inputs(task), x)
    assert sorted(npz_splits(tmp_path / "all.npz")) == ["holdout", "test", "train"]
    np.savez(tmp_path / "one.npz", x=x, y=y)
    assert list(npz_splits(tmp_path / "one.npz")) == ["test"]


def test_npz_files_that_cannot_be_used_are_refused(tmp_path):
    np.savez(tmp_path / "keys.npz", images=np.ones(2), labels=np.ones(2))
    with pytest.raises(TaskError, match=r"its keys are \['images', 'labels'\]"):
        npz_splits(tmp_path / "keys.npz")
    np.savez(tmp_path / "half.npz", x_test=np.ones(2))
    with pytest.raises(TaskError, match="x_test but no y_test"):
        npz_splits(tmp_path / "half.npz")
    np.savez(tmp_path / "object.npz", x=np.array([{}], object))
    with pytest.raises(TaskError, match="object arrays are refused"):
        read_npz(tmp_path / "object.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(TaskError, match=r"text.npz cannot be read as .npz"):
        read_npz(tmp_path / "text.npz")
    np.save(tmp_path / "bare.npy", np.ones(2))
    with pytest.raises(TaskError, match="one array without a name"):
        read_npz(tmp_path / "bare.npy")
    with pytest.raises(TaskError, match=r"gone\.npz does not exist"):
        read_npz(tmp_path / "gone.npz")


# Tables


def test_csv_and_tsv_keep_quotes_as_their_formats_do(tmp_path):
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"one, two",1\nthree,0\n', encoding="utf-8")
    table = read_table(tmp_path / "a.csv")
    assert table.columns == {"text": ("one, two", "three"), "label": ("1", "0")}
    (tmp_path / "a.tsv").write_text('say "no\t1\nend" now\t0\n')
    table = read_table(tmp_path / "a.tsv", columns=["text", "label"])
    assert table.column("text") == ['say "no', 'end" now']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n3\n", r"row 3 has 1 values for 2 columns: \['x', 'y'\]"),
        ("a.csv", "x,x\n1,2\n", "names a column twice"),
        ("a.csv", "x,y\n", "has no rows of data"),
        ("a.csv", "", "has no rows of data"),
        ("a.txt", "x", "tables end in .csv, .tsv or .parquet"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TaskError, match=message):
        read_table(tmp_path / name)


def test_a_column_that_is_missing_lists_those_that_are_there(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(TaskError, match=r"a.csv has no column 'label'; it has \['x', 'y'\]"):
        tabular(tmp_path / "a.csv", target="label")


def test_parquet_files_and_saved_datasets_read_alike(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": ["good", "bad", "so so"], "label": [1, 0, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").column("label") == [1, 0, 2]

    folder = tmp_path / "saved" / "test"
    folder.mkdir(parents=True)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    names = {"_type": "ClassLabel", "names": ["negative", "positive", "neutral"]}
    information = {"features": {"label": names, "text": {"_type": "Value"}}}
    (folder / "dataset_info.json").write_text(json.dumps(information))
    (folder.parent / "dataset_dict.json").write_text('{"splits": ["test"]}')

    task = text_classification(folder, tokenizer=lambda text: [len(text)])
    assert task.classes == ["negative", "positive", "neutral"]
    assert all_targets(task).tolist() == [1, 0, 2]
    with pytest.raises(TaskError, match=r"holds the splits \['test'\]; give one, such as .*test"):
        read_table(folder.parent)


def test_a_table_divides_into_disjoint_rows():
    table = Table({"x": list(range(50))})
    rest, part = table.divided(0.2)
    assert (len(rest), len(part)) == (40, 10)
    assert sorted(rest.column("x") + part.column("x")) == list(range(50))
    assert part.column("x") == table.divided(0.2)[1].column("x")


# Tabular


TRAIN = {
    "width": ["1", "3", "", "5"],
    "cut": ["good", "fair", "good", "NA"],
    "price": ["10", "20", "30", "40"],
}
TEST = {"width": [9, None], "cut": ["fair", "odd"], "price": [1.5, 2.5]}


def test_columns_are_scaled_by_statistics_of_train_alone():
    task = tabular(TEST, TRAIN, target="price", kind="regression")
    # width on train is 1, 3, 5: mean 3, variance 8 / 3; then cut=fair, cut=good, and "odd" is new.
    spread = (8 / 3) ** 0.5
    expected = torch.tensor([[6 / spread, 1, 0], [0, 0, 0]])
    assert torch.allclose(all_inputs(task), expected)
    assert all_targets(task).tolist() == [1.5, 2.5]
    train = torch.cat([inputs for inputs, _ in task.train()])
    assert torch.allclose(train[:, 0], torch.tensor([-2, 0, 0, 2]) / spread)
    assert train[:, 1:].tolist() == [[0, 1], [1, 0], [0, 1], [0, 0]]


def test_classes_are_names_in_order_or_whole_numbers_in_their_places():
    rows = {"x": [1, 2, 3], "kind": ["b", "a", "b"], "digit": [2, 0, 2]}
    named = tabular(rows, target="kind", features=["x"])
    assert (named.classes, all_targets(named).tolist()) == (["a", "b"], [1, 0, 1])
    digits = tabular(rows, target="digit", features=["x"])
    assert (digits.classes, all_targets(digits).tolist()) == (["0", "1", "2"], [2, 0, 2])


@pytest.mark.parametrize(
    ("test", "options", "message"),
    [
        ({**TEST, "width": ["wide", 2]}, {}, "column 'width', row 0: 'wide' is text"),
        ({**TEST, "price": [1, ""]}, {}, "'price' of row 1 is '', not a number"),
        (TEST, {"features": ["height"]}, "no column 'height'"),
    ],
)
def test_values_that_do_not_fit_their_column_are_refused(test, options, message):
    with pytest.raises(TaskError, match=message):
        tabular(test, TRAIN, target="price", kind="regression", **options)


def test_a_class_that_the_file_does_not_name_is_refused():
    table = Table({"x": [1, 2], "y": ["a", "z"]}, {"y": ["a", "b"]})
    with pytest.raises(TaskError, match="row 1: 'z' is not one of the classes"):
        tabular(table, target="y")


def test_columns_without_meaning_are_refused():
    names = {"id": [f"name {n}" for n in range(300)], "y": [0, 1] * 150}
    with pytest.raises(TaskError, match="'id' is text with 300 different values, more than 256"):
        tabular(names, target="y")
    with pytest.raises(TaskError, match="'x' has no value at all"):
        tabular({"x": ["", "NaN"], "y": [0, 1]}, target="y")
    with pytest.raises(TaskError, match="no column but 'y'"):
        tabular({"y": [0, 1]}, target="y")
    with pytest.raises(TaskError, match=r"differ in length: \{'x': 1, 'y': 2\}"):
        tabular({"x": [1], "y": [0, 1]}, target="y")
    with pytest.raises(TaskError, match="5 is not a file, a Table"):
        tabular(5, target="y")
    with pytest.raises(TaskError, match="holds -1, which marks rows without a label"):
        tabular({"x": [1, 2], "y": [-1, -1]}, target="y")


# Texts


def test_texts_become_padded_batches_with_masks():
    task = text_classification((["ab", "c"], ["no", "yes"]), tokenizer=lambda t: list(t.encode()))
    inputs, targets = next(task.test())
    assert inputs["input_ids"].tolist() == [[97, 98], [99, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert (targets.tolist(), task.classes) == ([0, 1], ["no", "yes"])


def test_texts_that_cannot_be_used_are_refused():
    for data, message in [
        ((["a"], [0, 1]), "1 texts but 2 labels"),
        ((["a", " "], [0, 1]), "row 1 is ' ', not a text"),
        (([], []), "there are no texts"),
    ]:
        with pytest.raises(TaskError, match=message):
            text_classification(data, tokenizer=lambda t: [1])


# Recordings


def test_waveforms_are_cut_and_padded_to_one_length():
    waves = [np.array([16384, -32768, 0, 8192], np.int16), np.array([32767], np.int16)]
    task = audio_classification((waves, [0, 1]), length=3)
    expected = [[[0.5, -1, 0]], [[32767 / 32768, 0, 0]]]
    assert all_inputs(task).tolist() == expected
    flat = audio_classification((waves, [0, 1]), length=3, channel=False)
    assert flat.example().shape == (2, 3)


def test_waveforms_that_cannot_be_used_are_refused():
    good = np.zeros(4, np.float32)
    for waves, labels, message in [
        ([good, good[:0]], [0, 1], r"waveform 1 has shape \(0,\)"),
        ([good[None]], [0], r"waveform 0 has shape \(1, 4\)"),
        ([good, good + np.nan], [0, 1], "waveform 1: sample 0 has a NaN"),
        ([good], [0, 1], "1 inputs but 2 labels"),
        ([], [], "there are no waveforms"),
        ([good], None, "lacks its labels"),
    ]:
        with pytest.raises(TaskError, match=message):
            audio_classification((waves, labels), length=3)


# Pictures


def test_pictures_of_every_layout_reach_the_model_alike():
    pixels = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    labels = [0, 1, 2, 1, 0]
    first = image_classification((pixels, labels), layout="NCHW")
    assert torch.equal(all_inputs(first), pixels.float() / 255)
    last = image_classification((pixels.permute(0, 2, 3, 1).numpy(), labels), layout="NHWC")
    assert torch.equal(all_inputs(last), pixels.float() / 255)
    grey = image_classification((pixels[:, 0], labels), layout="NHW")
    assert torch.equal(all_inputs(grey), pixels[:, :1].float() / 255)
    assert all_inputs(last).is_contiguous()


def test_pictures_are_normalised_per_channel():
    pixels = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    task = image_classification(
        (pixels, [0, 1]), layout="NCHW", mean=[0.5, 0.4, 0], std=[0.5, 0.2, 2]
    )
    assert torch.allclose(task.example()[0, :, 0, 0], torch.tensor([1.0, 3.0, 0.5]))


def test_pictures_that_cannot_be_used_are_refused():
    pixels = torch.zeros(2, 4, 6, 3)
    refused = [
        ({"layout": "NWHC"}, OptionError, "layout='NWHC' must be"),
        ({"layout": "NHW"}, TaskError, r"shape \(2, 4, 6, 3\), which is not layout='NHW'"),
        ({"layout": "NHWC", "std": [0]}, OptionError, "above 0 for every channel"),
    ]
    for options, error, message in refused:
        with pytest.raises(error, match=message):
            image_classification((pixels, [0, 1]), **options)
    with pytest.raises(TaskError, match=r"outside 0\.\.255"):
        image_classification((pixels.int() + 300, [0, 1]), layout="NHWC")
    with pytest.raises(OptionError, match="2 values for 3 channels"):
        image_classification((pixels, [0, 1]), layout="NHWC", mean=[0, 0]).example()
    with pytest.raises(TaskError, match="which is not layout='NCHW'"):
        image_classification((torch.zeros(2, 32, 32, 3), [0, 1]), layout="NCHW")


def test_folders_of_pictures_name_their_classes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split, name, colour in [
        ("test", "red", (255, 0, 0)),
        ("test", "blue", (0, 0, 255)),
        ("train", "red", (255, 0, 0)),
        ("train", "green", (0, 255, 0)),
    ]:
        folder = tmp_path / split / name
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (12, 8), colour).save(folder / "0.png")
    task = image_folder(tmp_path, size=4)
    assert task.classes == ["blue", "green", "red"]
    assert all_targets(task).tolist() == [0, 2]
    assert all_inputs(task).shape == (2, 3, 4, 4)
    assert all_inputs(task)[1, :, 0, 0].tolist() == [1, 0, 0]
    assert task.has_train

    (tmp_path / "test" / "red" / "1.png").write_bytes(b"no picture")
    with pytest.raises(TaskError, match=r"1.png cannot be read as a picture"):
        all_inputs(image_folder(tmp_path, size=4))
    with pytest.raises(TaskError, match="has no pictures"):
        image_folder(tmp_path / "test" / "red", size=4)


# Real data


def test_resnet20_reaches_its_accuracy_from_the_npz(shared_data):
    arrays = read_npz(shared_data / "cifar10_lossless_subset.npz")
    task = image_classification(
        (arrays["x_test"], arrays["y_test"]), (arrays["x_train"], arrays["y_train"]), layout="NCHW"
    )
    assert task.evaluate(zoo.resnet20())["accuracy"] == pytest.approx(91.64, abs=0.005)
    assert sum(map(len, task.calibration())) == 512


@pytest.mark.parametrize(
    ("file", "target", "inputs", "rows"),
    [
        # Six numbers, and cut, color and clarity with 5 + 7 + 8 categories.
        ("diamonds.csv", "price", 26, 53_940),
        # Eight numbers, one with 207 values missing, and 5 categories.
        ("california_housing.csv", "median_house_value", 13, 20_640),
    ],
)
def test_real_tables_carry_a_linear_model(shared_data, file, target, inputs, rows):
    table = read_table(shared_data / "tabular" / file)
    assert len(table) == rows
    train, test = table.divided(0.2)
    task = tabular(test, train, target=target, kind="regression")
    x = torch.cat([inputs for inputs, _ in task.train()])
    y = torch.cat([targets for _, targets in task.train()])
    assert x.shape[1] == inputs
    assert x[:, 0].mean().abs() < 1e-4
    assert x[:, 0].std() == pytest.approx(1, abs=1e-4)
    ones = torch.ones(len(x), 1)
    weights = torch.linalg.lstsq(
        torch.cat((x, ones), 1).double(), y[:, None].double(), driver="gelsd"
    )
    net = nn.Linear(inputs, 1)
    with torch.no_grad():
        net.weight.copy_(weights.solution[:-1].T)
        net.bias.copy_(weights.solution[-1])
    # Least squares explains 92 % of the diamonds' prices and 64 % of the houses'.
    assert task.evaluate(net)["r2"] == pytest.approx({26: 0.92, 13: 0.64}[inputs], abs=0.02)


def test_real_recordings_are_read(shared_data):
    arrays = read_npz(shared_data / "audio" / "fsdd_8khz_int16.npz")
    waves = np.split(arrays["pcm"], arrays["offset"][1:-1])
    test = arrays["index"] < 5
    chosen = [wave for wave, wanted in zip(waves, test, strict=True) if wanted]
    task = audio_classification((chosen, arrays["y"][test]), length=8000)
    assert torch.bincount(all_targets(task)).tolist() == [30] * 10
    assert task.example(4).shape == (4, 1, 8000)
    assert 0.1 < task.example(30).abs().max() <= 1


def test_real_texts_are_read(shared_data):
    columns = ["text", "label"]
    sizes = {}
    for split in ("train", "dev", "test"):
        table = read_table(shared_data / "text" / f"sst2_{split}.tsv", columns=columns)
        sizes[split] = len(table)
    assert sizes == {"train": 6920, "dev": 872, "test": 1821}
    task = text_classification(table, tokenizer=lambda t: list(t.encode()), max_length=50)
    assert torch.bincount(all_targets(task)).tolist() == [912, 909]
    assert task.example(8)["input_ids"].shape == (8, 50)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([1, 100, 1, 100], [0, 1, 0, 1]), ([1, 2, 50], [0, 1, 2]), ([-2, 0, 1], [0, 1, 2])],
)
def test_whole_numbers_with_gaps_are_names_and_no_places(labels, expected):
    task = tabular({"x": [float(n) for n in range(len(labels))], "y": labels}, target="y")
    assert next(task.test())[1].tolist() == expected


def test_whole_numbers_beside_names_are_places():
    table = Table({"x": [1.0, 2.0], "y": [0, 1]}, classes={"y": ["1", "0"]})
    assert next(tabular(table, target="y").test())[1].tolist() == [0, 1]


def test_an_infinity_is_a_missing_value():
    columns = {"x": ["1", "2", "3", "Infinity"], "y": [0, 1, 0, 1]}
    (inputs, _) = next(tabular(columns, target="y").test())
    assert inputs[:, 0].tolist() == pytest.approx([-1.224745, 0.0, 1.224745, 0.0], abs=1e-5)
