"""`tersor quantize`: tables, JSON, what it says meanwhile, and refusals."""

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model(folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    np.save(folder / "tokens.npy", np.arange(96) % 100)
    return folder / "model"


def test_quantize_gives_a_table_and_the_same_as_json(answer, tersor, model, folder):
    options = ("--data", "tokens.npy", "--length", "24", "--option", "bits=4")
    shown = tersor("quantize", "model", "a.tersor", *options)
    assert "the 2 worst of 2 blocks" in shown.stdout
    assert "model.layers.1" in shown.stdout
    assert "2 blocks, the largest of 0.00 GB in float32; needs at most 1.00 GB" in shown.stderr
    found = answer("quantize", "model", "b.tersor", *options)
    assert found["bytes_after"] == (folder / "b.tersor").stat().st_size < found["bytes_before"]
    assert (folder / "a.tersor").read_bytes() == (folder / "b.tersor").read_bytes()
    assert found["needs"]["tokens"] == 96
    assert found["weights"] == found["elements"] - 5 * 32
    kept = answer("quantize", "model", "c.tersor", *options, "--ends", "0")
    assert kept["weights"] == found["weights"] - 2 * 100 * 32


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--option", "bits"), "--option bits has no value; write it as --option bits=4", 2),
        (("--option", "bits=four"), "bits='four'", 2),
        (("--data", "none.npy"), "none.npy does not exist", 4),
        (("--data", "tokens.npy"), "fewer than one sequence of length=512", 4),
        (("--memory-gb", "0.5", "--method", "quantize.rtn"), "there are 0.50 GB", 2),
    ],
)
def test_quantize_refuses(refused, model, arguments, said, code):
    text, found = refused("quantize", "model", "m.tersor", *arguments)
    assert said in text
    assert found == code


def test_nothing_is_left_of_a_run_that_could_not_begin(tersor, model, folder):
    shown = tersor("quantize", "model", "m.tersor", "--method", "quantize.gptq")
    assert shown.exit_code == 4
    assert "quantize.gptq needs inputs" in shown.stderr
    assert sorted(path.name for path in folder.glob("m.tersor*")) == []
