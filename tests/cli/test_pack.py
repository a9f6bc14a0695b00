"""`tersor pack` and `tersor unpack`: tables, JSON and refusals."""

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def checkpoint(folder):
    made = torch.Generator().manual_seed(0)
    tensors = {"w": torch.randn(40, 30, generator=made), "b": torch.randn(40, generator=made)}
    path = folder / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return path


def test_pack_and_unpack_give_the_same_file(answer, tersor, checkpoint, folder):
    found = answer("pack", "model.safetensors", "--drop-none")
    packed = folder / "model.tersor"
    assert found["bytes_before"] == checkpoint.stat().st_size
    assert found["bytes_after"] == packed.stat().st_size < found["bytes_before"]
    assert found["identical"] is True
    assert found["bits_per_weight"] == 8 * found["bytes_after"] / (40 * 30 + 40)
    assert {tensor["stored"] for tensor in found["tensors"]} == {"as it is"}
    back = answer("unpack", "model.tersor", "back.safetensors")
    assert back["paths"] == ["back.safetensors"]
    assert (folder / "back.safetensors").read_bytes() == checkpoint.read_bytes()
    shown = tersor("pack", "model.safetensors", "other.tersor")
    assert "2 tensors kept bit for bit; unpacked, the checkpoint comes back byte" in shown.stdout


def test_bits_quantize_and_the_table_says_what_was_lost(answer, tersor, checkpoint, folder):
    found = answer("pack", "model.safetensors", "m.tersor", "--bits", "3")
    errors = {tensor["name"]: tensor["error"] for tensor in found["tensors"]}
    assert 0.05 < errors["w"] < 0.3
    assert found["error"] == errors["w"]
    assert errors["b"] == 0
    shown = tersor("pack", "model.safetensors", "m.tersor", "--bits", "3", "--profile", "max")
    assert "the 1 largest relative errors" in shown.stdout
    assert "1 tensors quantized with a relative error of" in shown.stdout
    assert tersor("unpack", "m.tersor", "back.safetensors").exit_code == 0
    assert torch.equal(load_file("back.safetensors")["b"], load_file(checkpoint)["b"])


def test_changes_from_a_base_need_it_again(answer, refused, checkpoint, folder):
    answer("pack", "model.safetensors", "1.tersor")
    found = answer("pack", "model.safetensors", "2.tersor", "--base", "1.tersor")
    assert found["bytes_after"] < 500
    text, code = refused("unpack", "2.tersor", "back.safetensors")
    assert code == 6
    assert "give that with base=" in text
    answer("unpack", "2.tersor", "back.safetensors", "--base", "1.tersor")
    assert (folder / "back.safetensors").read_bytes() == checkpoint.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("none.safetensors",), "none.safetensors cannot be read as a safetensors file: it d", 3),
        (("net.py",), "net.py cannot be read as a safetensors file", 3),
        (("model.safetensors", "--bits", "0"), "bits=0 for each weight", 2),
        (("model.safetensors", "--bits", "2", "--drop-none"), "give one of the two", 2),
        (("model.safetensors", "m.tersor", "--profile", "tiny"), "profile='tiny'", 2),
        (("model.safetensors", "model.safetensors"), "is what the file is made from", 2),
        (("model.safetensors", "none/m.tersor"), "cannot be written", 8),
        (("model.safetensors", "m.tersor", "--base", "net.py"), "is not a .tersor file", 6),
    ],
)
def test_pack_refuses(refused, checkpoint, arguments, said, code):
    text, found = refused("pack", *arguments)
    assert said in text
    assert found == code


def test_a_file_that_nobody_named_is_not_replaced(answer, refused, checkpoint, folder):
    (folder / "model.tersor").write_text("precious")
    text, code = refused("pack", "model.safetensors")
    assert code == 2
    assert "is there already; name the file" in text
    answer("pack", "model.safetensors", "model.tersor")


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("none.tersor", "x.safetensors"), "none.tersor does not exist", 6),
        (("model.safetensors", "x.safetensors"), "is not a .tersor file", 6),
    ],
)
def test_unpack_refuses(refused, checkpoint, arguments, said, code):
    text, found = refused("unpack", *arguments)
    assert said in text
    assert found == code
