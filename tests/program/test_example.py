"""Inputs can be made up from a stored program alone, and the network runs on them."""

import json

import pytest
import torch
from torch import nn

import zoo
from tersor.codec import load, save
from tersor.errors import ExportError
from tersor.program import Interpreted, Program, example_of
from tersor.program.of_model import own_program
from tersor.program.trace import trace


def made(program, seed=0):
    return example_of(program, torch.Generator().manual_seed(seed))


NETS = {
    "resnet": (lambda: zoo.CifarResNet(8), (torch.rand(3, 3, 32, 32),)),
    "stories": (zoo.Stories, (torch.randint(0, 512, (2, 9)),)),
    "silero": (zoo.SileroVad, (torch.rand(2, 576), torch.rand(2, 128), torch.rand(2, 128))),
}


@pytest.mark.parametrize("name", NETS)
def test_made_up_inputs_have_the_types_and_sizes_of_the_traced_ones(name, tmp_path):
    factory, traced = NETS[name]
    path = save(factory().eval(), tmp_path / "net.tersor", example=traced)
    model = load(path)
    found = made(model.program)
    kinds = [(x.shape, x.dtype) for x in found.values()]
    assert kinds == [(x.shape, x.dtype) for x in traced]
    with torch.no_grad():
        output = model(**found)
    first = output[0] if isinstance(output, tuple) else output
    assert len(first) == len(traced[0])
    assert torch.isfinite(first).all()
    assert save(model, tmp_path / "again.tersor").read_bytes() == path.read_bytes()


def test_floats_are_standard_normal_and_the_same_for_the_same_seed():
    program = trace(nn.Linear(1000, 1), (torch.zeros(30, 1000),))
    x = made(program)["input"]
    assert x.mean().abs() < 0.02
    assert (x.std() - 1).abs() < 0.02
    assert torch.equal(x, made(program)["input"])
    assert not torch.equal(x, made(program, seed=1)["input"])


class Masked(nn.Embedding):
    def forward(self, ids, mask, extra=None, *, scale=1.0):
        seen = torch.where(mask[..., None], super().forward(ids), 0.0)
        return seen * scale * extra["gain"][0].cfloat().real


def test_integers_are_ones_booleans_true_and_trees_kept():
    ids = torch.full((2, 5), 3)
    gain = [torch.rand(5, 1, dtype=torch.float64)]
    program = trace(Masked(7, 4), (ids, ids > 0), {"extra": {"gain": gain}, "scale": 2.0})
    found = made(program)
    assert found["ids"].tolist() == [[1] * 5] * 2
    assert found["mask"].tolist() == [[True] * 5] * 2
    assert found["scale"] == 2.0
    assert found["extra"]["gain"][0].dtype is torch.float64
    assert found["extra"]["gain"][0].shape == (5, 1)
    assert Interpreted(program, Masked(7, 4))(**found).shape == (2, 5, 4)


def test_a_single_row_becomes_two_where_rows_are_free():
    program = trace(nn.Linear(6, 2), (torch.rand(1, 6),))
    assert made(program)["input"].shape == (2, 6)
    fixed = trace(nn.Linear(6, 2), (torch.rand(1, 6),), dynamic=False)
    assert made(fixed)["input"].shape == (1, 6)


def test_floats_follow_the_type_of_the_model():
    model = nn.Linear(6, 2)
    again = Interpreted(trace(model, (torch.rand(3, 6),)), model).to(torch.bfloat16)
    found = made(own_program(again))
    assert found["input"].dtype is torch.bfloat16
    assert again(**found).dtype is torch.bfloat16


def edited(**changed):
    fields = json.loads(trace(nn.Linear(6, 2), (torch.rand(3, 6),)).to_json())
    return Program.from_json(json.dumps(fields | changed))


def test_no_inputs_are_made_up_for_unknown_or_enormous_sizes():
    assert made(edited(inputs=[["input", [":float32", [0], 6]]]))["input"].shape == (3, 6)
    assert made(edited(inputs=[["input", [":float32", None, 6]]])) is None
    assert made(edited(inputs=[["input", [":float32", [0], 2**40]]])) is None
    assert made(edited(sizes=[[0, None, 2**40]])) is None
    # Nothing is in it, but torch cannot count so far.
    assert made(edited(inputs=[["input", [":float32", 0, 2**62, 2**62]]])) is None


def test_inputs_of_a_type_without_a_name_are_refused():
    class Counted(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    with pytest.raises(ExportError, match=r'its input "x" is of the type torch\.uint16; cast it'):
        trace(Counted(6, 2), (torch.zeros(2, 6, dtype=torch.uint16),))
