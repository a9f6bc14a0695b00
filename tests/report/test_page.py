"""The page: small, static, safe with strangers' words, and true to the data."""

import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from report.example import example_report
from tersor.errors import FileError, OutputError
from tersor.report import html
from tersor.report.charts import heat, layer_bars
from tersor.report.markup import Markup, tag
from tersor.report.page import LARGEST, render
from tersor.report.scatter import scatter

VOID = {"meta", "br", "img", "link"}
HOSTILE = "<script>alert(1)</script>\"' onload=x &"


class Elements(HTMLParser):
    """Every element with its attributes; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)


def strings(value):
    """Every place in the report that holds a text, as (container, key)."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, str):
            yield value, key
        elif isinstance(item, dict | list):
            yield from strings(item)


@pytest.fixture
def report():
    return example_report()


def test_the_page_is_whole_small_and_needs_nothing_else(report, tmp_path):
    path = html(report, tmp_path / "report.html")
    text = path.read_text()
    assert 20_000 < len(text.encode()) < 150_000
    elements = Elements(text).found
    names = {name for name, _ in elements}
    assert names.isdisjoint({"script", "link", "iframe", "object", "form"})
    for name, attributes in elements:
        assert not any(key.startswith("on") for key in attributes), name
        for key in ("src", "href"):
            assert attributes.get(key, "data:").startswith("data:image/png;base64,") or (
                key not in attributes
            )
    assert "url(" not in text
    assert "@import" not in text
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in elements
    assert "prefers-color-scheme: dark" in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_same_report_gives_the_same_page(report):
    assert render(report) == render(copy.deepcopy(report))


def test_the_headline_says_what_was_asked_and_what_came_out(report):
    words = " ".join(Elements(render(report)).words)
    for said in ("resnet20", "size=0.15x, drop=0.5: met", "1.10 MB", "91.64", "91.45", "2.1 %"):
        assert said in words
    assert report["command"] in words
    for note in report["notes"]:
        assert note in words


def test_a_budget_that_was_missed_is_said_to_be_missed(report):
    report["met"] = False
    report["budget"] = {"size": "0.1x", "drop": "0.1", "at_least": {"accuracy": 92}}
    words = " ".join(Elements(render(report)).words)
    assert "size=0.1x, drop=0.1, accuracy>=92: not met" in words
    assert words.count("not met") == 4


def test_strangers_words_are_shown_and_never_obeyed(report):
    for container, key in list(strings(report)):
        container[key] = HOSTILE
    report["environment"] = {HOSTILE: HOSTILE}
    report["comparison"]["metrics"] = {HOSTILE: report["comparison"]["metrics"]["accuracy"]}
    page = Elements(render(report))
    assert "script" not in {name for name, _ in page.found}
    assert not any(key.startswith("on") for _, attributes in page.found for key in attributes)
    assert not any(name == "img" for name, _ in page.found)
    assert HOSTILE in page.words


@pytest.mark.parametrize(
    "source",
    [
        "https://example.org/track.png",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AAAA" onerror="x',
        "javascript:alert(1)",
        3,
        None,
    ],
)
def test_only_pictures_made_here_are_shown(report, source):
    for example in report["comparison"]["flips"]["examples"]:
        example["input"] = {"image": source}
    assert "<img" not in render(report)


def test_flipped_pictures_and_texts_are_shown(report):
    assert render(report).count("<img") == 8
    for example in report["comparison"]["flips"]["examples"]:
        example["input"] = {"text": "x" * 5000 + "<b>"}
    text = render(report)
    assert "x" * 400 + "\N{HORIZONTAL ELLIPSIS}" in text
    assert "x" * 401 not in text


def test_a_huge_report_still_gives_a_small_page(report):
    many = []
    for i in range(3000):
        row = dict(report["layers"][i % 20])
        row["name"] = f"encoder.layer.{i}.attention.self.query.weight"
        many.append(row)
    report["layers"] = many
    report["sensitivity"] = [
        {"layer": row["name"], "option": f"int{bits}", "divergence": 0.001 * bits, "bytes": 10}
        for row in many
        for bits in range(2, 9)
    ]
    report["comparison"]["per_class"] *= 100
    picture = "data:image/png;base64," + "A" * 200_000
    for example in report["comparison"]["flips"]["examples"]:
        example["input"] = {"image": picture}
    text = render(report, pictures=False)
    assert len(text.encode()) < LARGEST
    assert "2960 smaller layers" in text
    assert "2940 less sensitive layers are in report.json" in text


def test_pictures_that_do_not_fit_are_left_out_and_missed(report, tmp_path):
    for example in report["comparison"]["flips"]["examples"]:
        example["input"] = {"image": "data:image/png;base64," + "A" * 200_000}
    text = html(report, tmp_path / "report.html").read_text()
    assert len(text.encode()) < LARGEST
    assert "The pictures did not fit into the page" in text


def test_sections_without_data_are_left_out():
    bare = {
        "tersor": "0.1.0",
        "model": {"name": "net"},
        "budget": {"size": "0.25x"},
        "met": True,
        "before": {"bytes": 1000, "metrics": {}},
        "after": {"bytes": 200, "metrics": {}},
    }
    page = Elements(render(bare))
    words = " ".join(page.words)
    assert "5.0\N{MULTIPLICATION SIGN} smaller" in words
    headings = [name for name, _ in page.found if name == "h2"]
    assert len(headings) == 2
    assert "Sensitivity" not in words


def test_infinite_and_missing_figures_do_not_break_the_page(report):
    report["sensitivity"][0]["divergence"] = None
    report["sensitivity"][1]["divergence"] = 0.0
    report["points"][0]["divergence"] = 0.0
    report["points"][1]["divergence"] = None
    report["comparison"]["divergence"] = None
    report["comparison"]["metrics"]["accuracy"].update(low=None, high=None)
    report["layers"][0]["bytes_after"] = None
    Elements(render(report))


@pytest.mark.parametrize(
    "harm",
    [
        {"layers": [3]},
        {"layers": [{"name": "a", "bytes_before": "many"}]},
        {"comparison": [1]},
        {"points": [{"bytes": "x", "divergence": 1}]},
        {"recipe": [{}]},
        {"before": 7},
    ],
)
def test_what_is_no_report_is_refused(report, harm):
    with pytest.raises(FileError, match="is not a report of tersor"):
        render({**report, **harm})


def test_a_page_that_cannot_be_written_leaves_nothing_behind(report, tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        html(report, tmp_path / "missing" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        html(report, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_bars_are_in_proportion(report):
    layers = [
        {"name": "a", "shape": [2, 2], "bytes_before": 400, "bytes_after": 100},
        {"name": "b", "shape": [2], "bytes_before": 200, "bytes_after": None},
    ]
    widths = [float(w) for w in re.findall(r'width="([\d.]+)%"', layer_bars(layers))]
    # Each row: before, then after, against the largest of all.
    assert widths == [100.0, 25.0, 50.0, 0.0]


def test_the_heat_map_outlines_what_was_chosen():
    rows = [
        {"layer": "a", "option": "int8", "divergence": 1e-6, "bytes": 1},
        {"layer": "a", "option": "int2", "divergence": 1e-2, "bytes": 1},
        {"layer": "b", "option": "int8", "divergence": 1e-4, "bytes": 1},
    ]
    drawn, left_out = heat(rows, {"a": "int2"})
    assert left_out == 0
    shades = [float(s) for s in re.findall(r"var\(--heat\),([\d.]+)\)", drawn)]
    # Logarithms -6, -2 and -4 between the ends: 0, 1 and a half of the full shade.
    assert shades == [0.0, 0.5, 0.25]
    assert drawn.count('class="chosen"') == 1
    assert re.search(r'class="chosen"[^>]*>1.0e-2<', drawn)


def test_points_stand_where_their_figures_say():
    points = [
        {"bytes": 1000, "divergence": 0.1, "metrics": {}, "chosen": False, "note": ""},
        {"bytes": 2000, "divergence": 0.01, "metrics": {}, "chosen": True, "note": "kept"},
        {"bytes": 2000, "divergence": 0.1, "metrics": {}, "chosen": False, "note": ""},
    ]
    drawn = scatter(points)
    places = re.findall(r'class="point[^"]*" r="\d" cx="([\d.]+)%" cy="([\d.]+)%"', drawn)
    assert sorted((float(x), float(y)) for x, y in places) == [
        (0.0, 0.0),
        (100.0, 0.0),
        (100.0, 100.0),
    ]
    assert drawn.count('class="front"') == 1
    assert "kept" in drawn


def test_a_single_point_and_none_at_all_are_drawn():
    assert scatter([]) == ""
    one = [{"bytes": 5, "divergence": 0.0, "chosen": True}]
    assert scatter(one).count("<circle") == 2


def test_a_trial_whose_answers_were_no_numbers_has_no_place_and_no_value():
    one = {"bytes": 5, "divergence": 0.5, "chosen": True}
    lost = {"bytes": 2, "divergence": float("inf"), "metrics": {"accuracy": None}, "chosen": False}
    assert scatter([one, lost]).count("<circle") == 2
    assert scatter([lost]) == ""
    report = example_report()
    report["points"][0] |= lost
    report["comparison"]["metrics"]["accuracy"]["after"]["value"] = None
    assert "no number" in render(report)


def test_text_is_escaped_unless_it_was_made_here():
    assert tag("p", "<b>", tag("i", "&"), [Markup("<hr>"), None, 3]) == (
        "<p>&lt;b&gt;<i>&amp;</i><hr>3</p>"
    )
    assert tag("a", title='"x"', hidden=False) == '<a title="&quot;x&quot;"></a>'


def test_every_colour_of_text_can_be_read(report):
    """Contrast of at least 4.5 to 1 (WCAG AA) on both backgrounds, light and dark."""
    css = render(report).partition("<style>")[2].partition("</style>")[0]
    themes = re.findall(r":root\s*{([^}]*)}", css)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", theme))
        pairs = [
            (ink, back)
            for ink in ("ink", "soft", "accent", "good", "bad")
            for back in ("back", "card")
        ]
        pairs += [("good", "good-back"), ("bad", "bad-back"), ("ink", "plain-back")]
        for ink, back in pairs:
            assert contrast(colours[ink], colours[back]) >= 4.5, (ink, back)


def contrast(first: str, second: str) -> float:
    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_learning_curves_lie_where_their_losses_are(tmp_path):
    training = [
        {
            "step": "distill.logits",
            "losses": [1.0, 0.1],
            "judged": [0.1, 0.01],
            "stride": 50,
            "kept": 1,
        },
        {"step": "none", "losses": [1.0], "judged": []},
        {"step": "broken", "losses": [float("nan"), None], "judged": [float("inf")]},
    ]
    page = html({"training": training}, tmp_path / "page.html").read_text("utf-8")
    assert page.count("distill.logits: steps") == 1
    assert re.search("0.010* where it was kept", page)
    assert "none: steps" not in page
    # Two decades from 1 to 0.01: the line falls by half of them in the first half.
    assert re.search(r'class="front" x1="0.00%" x2="50.00%" y1="0.00%" y2="50.00%"', page)
    assert re.search(r'cx="100.00%" cy="100.00%"', page)
