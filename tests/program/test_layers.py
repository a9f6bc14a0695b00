"""Layers, structures and situations that a stored graph must survive, and those it must refuse."""

import copy
import io
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ModelError
from tersor.program.interpreter import Interpreted
from tersor.program.program import Program
from tersor.program.skeleton import Container, skeleton
from tersor.program.trace import trace


def rebuilt(model, args=(), kwargs=None):
    program = trace(model, args, kwargs)
    stored = Program.from_json(program.to_json(), program.constants)
    assert stored == program
    tensors = model.state_dict(keep_vars=True)
    return Interpreted(stored, skeleton(tensors, stored.kinds, stored.buffers))


def assert_close(wanted, found):
    assert (wanted - found).abs().max() <= 1e-6 * wanted.abs().max()


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(8, 16, 2, **options)

    def forward(self, x, state=None):
        return self.layer(x, state)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}])
def test_recurrent_layers_keep_lengths_free(kind, options):
    model = Recurrent(kind, **options).eval()
    again = rebuilt(model, (torch.rand(5, 2, 8),))
    for shape in ((1, 1, 8), (9, 3, 8), (3, 9, 8)):
        x = torch.rand(shape)
        assert_close(model(x)[0], again(x)[0])
    assert again.layer.kind == kind


def test_recurrent_state_is_an_input():
    model = Recurrent("LSTM").eval()
    states = [(torch.rand(2, rows, 16), torch.rand(2, rows, 16)) for rows in (2, 5)]
    again = rebuilt(model, (torch.rand(4, 2, 8), states[0]))
    x = torch.rand(7, 5, 8)
    (wanted, (h, c)), (found, (other_h, other_c)) = model(x, states[1]), again(x, states[1])
    for want, got in ((wanted, found), (h, other_h), (c, other_c)):
        assert_close(want, got)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x, ignored=None):
        return self.layer(x, x, x, key_padding_mask=ignored)


@pytest.mark.parametrize("masked", [True, False])
def test_multihead_attention(masked):
    def inputs(rows, length):
        ignored = (torch.arange(length) >= max(1, length - 2)).expand(rows, length)
        return (
            (torch.rand(rows, length, 16), ignored) if masked else (torch.rand(rows, length, 16),)
        )

    model = Attention().eval()
    again = rebuilt(model, inputs(2, 6))
    for rows, length in ((1, 1), (3, 9)):
        x = inputs(rows, length)
        for want, got in zip(model(*x), again(*x), strict=True):
            assert_close(want, got)


def test_transformer_encoder_with_dropout():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.5, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    again = rebuilt(model, (torch.rand(2, 5, 16),)).train()
    x = torch.rand(3, 8, 16)
    assert_close(model(x), again(x))
    assert not any("dropout" in node.operator for node in again.program.nodes)


def test_gpt2_with_convolution_layers_and_tied_embedding():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.GPT2Config(
        vocab_size=90,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    again = rebuilt(model, (), {"input_ids": torch.randint(0, 90, (2, 7))})
    ids = torch.randint(0, 90, (3, 20))
    assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert again.transformer.h[0].mlp.c_fc.kind == "Conv1D"
    # The output layer is the embedding: stored under one name, present under both.
    assert again.program.weights.count("transformer.wte.weight") == 1
    assert "lm_head.weight" not in again.program.weights
    assert again.lm_head.weight is again.transformer.wte.weight
    assert any("past_key_values" in line for line in again.program.static)


class Mixture(nn.Module):
    """Constants, in-place operators, sizes in arithmetic, a device, a no-grad block, branches."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("hidden", torch.full((4,), 2.0), persistent=False)

    def forward(self, x, *, scale=2, pair=None):
        with torch.no_grad():
            steps = torch.arange(x.shape[0], device=x.device, dtype=x.dtype)[:, None]
        y = functional.relu_(self.linear(x)).add_(steps) * scale
        y = y / torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.shift - self.hidden + pair["left"]
        out = torch.empty(x.shape[0] * 2, 4)
        out[: x.shape[0]] = y
        out[x.shape[0] :] = -y
        return {"out": out, "parts": [y, None, 3, x.shape[0] * 2]}


def test_mixed_arguments_constants_and_in_place_operators():
    model = Mixture().eval()
    again = rebuilt(model, (torch.rand(3, 4),), {"scale": 3, "pair": {"left": torch.rand(4)}})
    x, pair = torch.rand(5, 4), {"left": torch.rand(4)}
    wanted, found = model(x, scale=3, pair=pair), again(x, scale=3, pair=pair)
    assert_close(wanted["out"], found["out"])
    assert found["parts"][1:] == [None, 3, 10]
    assert_close(model(x, scale=3, pair=pair)["out"], again(x, scale=3, pair=pair)["out"])
    assert sorted(again.program.weights) == ["linear.bias", "linear.weight", "shift"]
    assert len(again.program.constants) == 2


class Reply(NamedTuple):
    score: Tensor
    label: Tensor


@dataclass
class Answer:
    logits: Tensor
    extra: Tensor | None = None


@pytest.mark.parametrize("kind", [Reply, Answer])
def test_named_tuples_and_dataclasses_stay_readable_by_name(kind):
    class Model(nn.Linear):
        def forward(self, x):
            return kind(super().forward(x), x.argmax(1))

    model, x = Model(3, 2).eval(), torch.rand(4, 3)
    out = rebuilt(model, (torch.rand(2, 3),))(x)
    first = next(iter(out))
    assert_close(getattr(model(x), first), getattr(out, first))
    assert out[0] is out[first] is getattr(out, first)
    with pytest.raises(AttributeError, match="no output 'nothing'"):
        _ = out.nothing


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.shape[1] <= 8 else -self.linear(x[:, :8])


def test_a_branch_on_a_length_limits_it_and_says_so():
    model = Branch().eval()
    again = rebuilt(model, (torch.rand(2, 5, 4),))
    x = torch.rand(3, 8, 4)
    assert_close(model(x), again(x))
    assert 'dimension 1 of input "x" is at most 8' in again.program.static
    with pytest.raises(
        ModelError, match=r'dimension 1 of input "x" is 9; the model works for 0\.\.8'
    ):
        again(torch.rand(3, 9, 4))


def test_a_fixed_trace_says_and_keeps_its_sizes():
    model = nn.Linear(3, 2).eval()
    program = trace(model, (torch.rand(4, 3),), dynamic=False)
    assert program.static[0] == 'dimension 0 of input "input" is fixed at 4'
    with pytest.raises(ModelError, match="is 5; this model was stored for 4 only"):
        Interpreted(program, model)(torch.rand(5, 3))


@pytest.fixture
def network():
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    model = nn.Sequential(*layers)
    model(torch.rand(8, 3, 8, 8))
    return model.eval(), rebuilt(model.eval(), (torch.rand(2, 3, 8, 8),))


def test_copies_pickles_and_precisions(network):
    model, again = network
    x = torch.rand(3, 3, 8, 8)
    stream = io.BytesIO(pickle.dumps(again))
    for other in (copy.deepcopy(again), pickle.load(stream)):
        assert torch.equal(other(x), again(x))
        other[0].weight.data.zero_()
        assert not torch.equal(other(x), again(x))
    half = copy.deepcopy(again).to(torch.bfloat16)(x.bfloat16())
    assert (half.float() - model(x)).abs().max() < 0.05
    assert again.state_dict().keys() == model.state_dict().keys()


def test_gradients_equal_the_models(network):
    model, again = network
    x = torch.rand(3, 3, 8, 8)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(again(x).square().sum(), list(again.parameters()))
    for want, got in zip(wanted, found, strict=True):
        assert_close(want, got)


def test_exports_again_with_the_original_input_name(network):
    model, again = network
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        again, (torch.rand(2, 3, 8, 8),), dynamic_shapes={"input": {0: batch}}
    )
    x = torch.rand(6, 3, 8, 8)
    assert_close(model(x), exported.module()(x))


def test_onnx_export_gives_the_same_outputs(network, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, again = network
    x = torch.rand(2, 3, 8, 8)
    exported = torch.onnx.export(again.eval(), (x,), dynamo=True, verbose=False)
    exported.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    assert (found - model(x)).abs().max() <= 1e-5 * model(x).abs().max()


def test_a_weight_that_became_a_property_is_read_on_every_call(network):
    class Decoded(Container):
        weight = property(lambda self: torch.full((5, 144), self.level))

    _, again = network
    layer = again[4]
    del layer._parameters["weight"]
    layer.__class__ = Decoded
    layer.level = 0.0
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(again(x), layer.bias.expand(2, 5))
    layer.level = 1.0
    assert not torch.equal(again(x), layer.bias.expand(2, 5))


def test_a_tree_without_a_needed_weight_is_refused(network):
    _, again = network
    with pytest.raises(ModelError, match=r'uses the weight "0\.weight"'):
        Interpreted(again.program, skeleton({"0.bias": [4]}))
