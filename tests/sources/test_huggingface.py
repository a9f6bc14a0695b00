"""Hugging Face folders: the published class and weights, nothing pickled, nothing random."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tersor.errors import ModelError
from tersor.sources import open_model

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[1, 5, 9, 2]])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a classification head, saved as one publishes it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "tiny"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_folder_opens_as_the_class_it_was_saved_as(folder):
    opened = open_model(str(folder))
    expected = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    assert type(opened.model).__name__ == "BertForSequenceClassification"
    assert not opened.model.training
    assert torch.equal(logits(opened.model), logits(expected))
    assert (opened.name, opened.folder) == ("tiny", folder)


def test_half_precision_weights_are_opened_as_float32(folder):
    transformers.AutoModel.from_pretrained(folder).half().save_pretrained(folder)
    opened = open_model(str(folder))
    assert {p.dtype for p in opened.model.parameters()} == {torch.float32}


def in_cache(folder: Path, root: Path) -> Path:
    """The folder as the hub's cache keeps it."""
    cache = root / "models--someone--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc123")
    shutil.copytree(folder, cache / "snapshots" / "abc123")
    shutil.copytree(folder, cache / "snapshots" / "older")
    (cache / "snapshots" / "older" / "model.safetensors").unlink()
    return cache


def test_a_cache_folder_opens_at_its_main_revision(folder, tmp_path):
    opened = open_model(str(in_cache(folder, tmp_path)))
    assert torch.equal(logits(opened.model), logits(open_model(str(folder)).model))


def test_the_hub_is_asked_for_safetensors_only(folder, monkeypatch):
    asked = {}

    def fetched(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    opened = open_model("hub:someone/tiny@v2")
    assert (asked["name"], asked["revision"]) == ("someone/tiny", "v2")
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["patterns"])
    assert opened.name == "tiny"
    assert torch.equal(logits(opened.model), logits(open_model(str(folder)).model))


def test_without_a_network_the_hub_says_so(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Cannot reach the hub\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"hub:a/b cannot be fetched: OSError: Cannot reach the h"):
        open_model("hub:a/b")


def test_a_sentence_transformers_folder_opens_its_network(folder, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.move(folder, outer / "0_Transformer")
    (outer / "modules.json").write_text(json.dumps([{"idx": 0, "path": "0_Transformer"}]))
    opened = open_model(str(outer))
    assert opened.name == "outer"
    assert opened.folder == outer / "0_Transformer"


def test_a_folder_that_leads_elsewhere_is_refused(folder, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "modules.json").write_text(json.dumps([{"path": "../tiny"}]))
    with pytest.raises(ModelError, match="leads out of its folder"):
        open_model(str(outer))


def test_pickled_weights_are_refused_with_a_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        open_model(str(folder))


def test_missing_weights_are_refused_and_never_made_up(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*'classifier\.weight'"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "{", r"config\.json is not JSON"),
        ("config.json", None, r"has no config\.json"),
        ("model.safetensors", None, r"has no weights \(\*\.safetensors\)"),
        ("model.safetensors", "junk", "cannot be opened by transformers"),
        (
            "config.json",
            '{"architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}, "model_type": "own"}',
            "needs code of its own for Own, which is not run",
        ),
        ("config.json", '{"model_type": "unheard"}', "cannot be opened by transformers"),
    ],
)
def test_a_folder_that_is_incomplete(folder, file, text, said):
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(ModelError, match=said):
        open_model(str(folder))
