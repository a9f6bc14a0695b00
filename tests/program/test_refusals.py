"""Inputs and models that a stored graph refuses, each with the reason in one sentence."""

import pytest
import torch
from torch import nn

from tersor.errors import ExportError, ModelError
from tersor.program.interpreter import Interpreted
from tersor.program.trace import trace


class Scaled(nn.Linear):
    def forward(self, x, *, scale=2, pair=None):
        return super().forward(x) * scale + pair["left"]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, 'input "x" is missing'),
        ((1,), {}, 'input "x" must be a tensor, not int'),
        ((torch.rand(2),), {}, r'input "x" has 1 dimensions \(2,\); the model was stored for 2'),
        ((torch.rand(2, 5),), {}, 'dimension 1 of input "x" is 5'),
        ((torch.rand(2, 4), 1, 2, 3), {}, "4 inputs were given"),
        ((torch.rand(2, 4),), {"x": 1}, 'input "x" was given by position and by name'),
        (
            (torch.rand(2, 4),),
            {"mask": 1},
            r'"mask" is not an input; .*\[\'x\', \'scale\', \'pair\'\]',
        ),
        ((torch.rand(2, 4),), {"scale": 2}, 'input "scale" was 3 .* cannot be 2'),
        ((torch.rand(2, 4),), {"pair": {}}, r"must be a dict with the keys \['left'\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(args, kwargs, message):
    model = Scaled(4, 4)
    program = trace(model, (torch.rand(3, 4),), {"scale": 3, "pair": {"left": torch.rand(4)}})
    again = Interpreted(program, model)
    with pytest.raises(ModelError, match=message):
        again(*args, **kwargs)


class ByValue(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_torch_prints_nothing_of_a_model_that_it_cannot_trace(capfd):
    with pytest.raises(ExportError, match="data-dependent"):
        trace(ByValue(4, 4), (torch.rand(2, 4),))
    assert capfd.readouterr() == ("", "")


class Random(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand_like(x)


class Counter(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Opaque(nn.Linear):
    def forward(self, x):
        return object()


class Broken(nn.Linear):
    def forward(self, x):
        raise ValueError("the sun is down\nmore lines")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ByValue, "ByValue cannot be stored as a graph: .*data-dependent"),
        (Random, "draws random numbers"),
        (Counter, 'it updates its buffer "calls" in evaluation mode|writes to a weight, buffer'),
        (Opaque, "output is a object, not a tensor"),
        (Broken, "Broken fails on the example inputs: the sun is down; give inputs"),
    ],
)
def test_models_that_cannot_be_stored_say_why(kind, message):
    model = kind(4, 4).train()
    with pytest.raises(ExportError, match=message) as caught:
        trace(model, (torch.rand(2, 4),))
    assert "\n" not in str(caught.value)
    assert kind is Broken or "load(path, into=your_model)" in str(caught.value)
    assert model.training


def test_example_inputs_that_do_not_fit_forward_are_refused():
    with pytest.raises(ExportError, match=r"do not fit Linear\.forward: missing a required arg"):
        trace(nn.Linear(2, 2))
