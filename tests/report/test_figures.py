"""Numbers are written as people read them, and pictures decode to what they were."""

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from report.example import example_report
from tersor.errors import FileError
from tersor.report import as_json, figures, read, terminal
from tersor.report.facts import facts, limits
from tersor.report.image import picture, png


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (1_086_000, "1.09 MB"),
     (18_200_000, "18.2 MB"), (152_002, "152 kB"), (2.5e9, "2.50 GB")],
)  # fmt: skip
def test_sizes(number, text):
    assert figures.size(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (9_999, "9,999"), (568_740_352, "569 M"), (1.2e6, "1.20 M"), (4.1e9, "4.10 G")],
)  # fmt: skip
def test_counts(number, text):
    assert figures.count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.00610, "0.00610"), (5.44e-6, "5.44e-06"), (123.4, "123"), (math.inf, "inf")],
)  # fmt: skip
def test_three_digits(number, text):
    assert figures.digits(number) == text


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (-0.19, "points", "\N{MINUS SIGN}0.19 points"),
        (0.0, "points", "+0.00 points"),
        (-0.0, "points", "+0.00 points"),
        (-0.001, "points", "+0.00 points"),
        (0.00012, "", "+0.0001"),
        (12.3456, "kg", "+12.35 kg"),
    ],
)
def test_changes_have_a_sign_that_is_true(number, unit, text):
    assert figures.change(number, unit) == text


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28), (5, 64, 3), (1, 1)])
def test_a_png_decodes_to_its_pixels(shape):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert (np.asarray(image.open(io.BytesIO(png(pixels)))) == pixels).all()


def test_an_input_becomes_a_picture_or_nothing():
    grey = np.linspace(-2, 2, 64).reshape(1, 8, 8)
    assert picture(grey)[0, 0] == 0
    assert picture(grey)[-1, -1] == 255
    assert picture(np.zeros((3, 224, 224), np.uint8)).shape == (56, 56, 3)
    assert picture(np.zeros((32, 32, 3), np.uint8)).shape == (32, 32, 3)
    # A constant picture is black, and what has no two sides is no picture.
    assert (picture(np.full((3, 8, 8), 0.5)) == 0).all()
    for other in (np.zeros(100), np.zeros((5, 8, 8)), np.zeros((3, 2, 8)), np.full((8, 8), np.nan)):
        assert picture(other) is None


def test_the_table_has_the_figures_of_the_report():
    found = {fact.label: fact for fact in facts(example_report())}
    assert found["Size"].after == "152 kB"
    assert found["Accuracy"].before == "91.64 (89.87 to 93.31)"
    assert found["Accuracy"].good is None
    assert found["Multiply-adds"].note == "per sample"
    assert found["Latency in torch"].after == "4.29 ms"


@pytest.mark.parametrize(
    ("low", "high", "higher", "good"),
    [(0.1, 0.5, True, True), (-0.5, -0.1, True, False), (-0.1, 0.1, True, None),
     (0.1, 0.5, False, False), (-0.5, -0.1, False, True), (None, None, True, None)],
)  # fmt: skip
def test_a_change_inside_the_noise_is_neither_good_nor_bad(low, high, higher, good):
    report = example_report()
    report["comparison"]["metrics"]["accuracy"].update(low=low, high=high, higher_is_better=higher)
    assert facts(report)[1].good is good


def test_each_limit_is_held_against_what_was_reached():
    report = example_report()
    report["budget"] = {
        "size": "0.15x",
        "drop": "0.1",
        "latency_ms": "5",
        "macs": "0.5x",
        "at_least": {"accuracy": 91.5},
        "target": "onnxruntime",
    }
    assert [(limit.asked.split()[0], limit.met) for limit in limits(report)] == [
        ("size", True),
        ("drop", False),
        ("latency_ms", True),
        ("macs", False),
        ("target", None),
        ("accuracy", False),
    ]


def test_a_relative_drop_is_of_the_value_before():
    report = example_report()
    # 0.19 of 91.64 points is 0.2 %.
    for allowed, met in (("0.0021x", True), ("0.002x", False)):
        report["budget"] = {"drop": allowed}
        assert limits(report)[0].met is met


def test_the_terminal_shows_markup_as_it_is_and_fits_80_columns():
    report = example_report()
    report["notes"] = ["[bold]not bold[/bold] and [/nothing]"]
    report["layers"][0]["name"] = "[red]conv[/red]"
    out = io.StringIO()
    terminal(report, to=Console(file=out, width=80))
    text = out.getvalue()
    assert "[bold]not bold[/bold] and [/nothing]" in text
    assert "[red]conv[/red]" in text
    assert report["command"] in text
    longest = max(len(line) for line in text.splitlines() if not line.startswith("again:"))
    assert longest <= 80


def test_a_report_survives_being_written_and_read(tmp_path):
    report = example_report()
    (tmp_path / "report.json").write_text(as_json(report))
    assert read(tmp_path) == report
    assert json.loads(as_json({"a": math.nan, "b": [math.inf, 1.5]})) == {
        "a": None,
        "b": [None, 1.5],
    }


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {}}', "\x00"])
def test_anything_else_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(FileError, match=r"report\.json"):
        read(tmp_path)
