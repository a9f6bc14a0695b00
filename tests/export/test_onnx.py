"""Exported files hold small weights and compute what torch computes, or they are not written."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from tersor.codec import load, save
from tersor.errors import ExportError, MissingExtra, ModelError, OptionError, OutputError
from tersor.export import OnnxModel, onnx_file, onnx_graph, to_onnx
from tersor.export import onnx as exporter
from tersor.export.onnx_writer import Writer
from tersor.forms import FakeAffine, Form
from tersor.methods.quantize.entropy import entropy
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import decoded, held, hold

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


class Tied(nn.Module):
    def __init__(self, bits):
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.out = nn.Linear(16, 40, bias=False)
        self.out.weight = self.table.weight
        rtn(self, bits=bits)

    def forward(self, ids, scale=None):
        logits = self.out(self.table(ids))
        return {"logits": logits if scale is None else logits * scale, "ids": (ids + 1,)}


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(6, 8, batch_first=True, **options)

    def forward(self, x):
        return self.layer(x)[0]


class Conv1D(nn.Module):
    """GPT-2's: weight (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 6))

    def forward(self, x):
        return x @ self.weight


class Product(Form):
    """A form that no exporter has heard of."""

    kind = "product"

    def __init__(self, left, right):
        super().__init__((left.shape[0], right.shape[1]), left.dtype)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    def dense(self):
        return self.left @ self.right

    def parts(self):
        return (("left", 32), ("right", 32))


def initializers(path):
    return {t.name: t for t in onnx.load(path).graph.initializer}


def test_a_convolutional_network_keeps_its_codes_and_its_outputs(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, 2)
    )
    rtn(net.eval(), bits=8)
    before = copy.deepcopy(net.state_dict())
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randn(2, 3, 9, 9))
    assert done.bytes == (tmp_path / "net.onnx").stat().st_size
    assert done.inputs == {"input": ("batch", 3, 9, 9)}
    assert done.difference.relative < 1e-6
    assert [sizes["input"][0] for sizes in done.difference.batches] == [2, 3]
    assert [(layer.name, layer.stored, layer.bytes) for layer in done.layers] == [
        ("0.weight", "int8 per channel", 8 * 27 + 8 * 2),
        ("3.weight", "int8 per channel", 8 * 36 + 4 * 2),
    ]
    found = initializers(tmp_path / "net.onnx")
    assert found["0.weight.codes"].data_type == onnx.TensorProto.INT8
    assert list(found["3.weight.codes"].dims) == [8, 4, 3, 3]
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_four_bits_in_groups_take_half_a_byte(tmp_path):
    net = rtn(
        nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Conv1d(5, 6, 3)), bits=4, group_size=16
    )
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randn(2, 5, 48))
    linear, conv = done.layers
    assert (linear.stored, linear.bytes) == ("int4 in blocks of 16", 32 * 24 + 32 * 3 * 2)
    # 15 inputs per output are a single, shorter group.
    assert (conv.stored, conv.bytes) == ("int4 per channel", 45 + 6 * 2)
    found = initializers(tmp_path / "net.onnx")["0.weight.codes"]
    assert found.data_type == onnx.TensorProto.INT4
    # As (inputs, outputs), which ONNX Runtime multiplies without decoding.
    assert (list(found.dims), len(found.raw_data)) == ([48, 32], 768)
    assert done.difference.relative < 1e-6


@pytest.mark.parametrize(
    ("bits", "kinds"), [(1.5, "int4|int8"), (4.0, "int8"), (11.0, "int8|int16")]
)
def test_codes_of_a_trellis_are_stored_by_the_width_of_their_points(tmp_path, bits, kinds):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(40, 16), nn.Linear(16, 40)
            self.conv, self.norm = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
            self.gru = nn.GRU(16, 16, batch_first=True)

        def forward(self, ids):
            x = self.norm(self.conv(self.table(ids).transpose(1, 2))).relu().transpose(1, 2)
            return self.head(self.gru(x)[0])

    torch.manual_seed(0)
    net = entropy(Several().eval(), bits=bits)
    forms = dict(held(net))
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randint(0, 40, (2, 5)))
    assert done.difference.relative < 1e-5
    for layer in done.layers:
        points = forms[layer.name].points()
        width = 2 if points.abs().max() > 127 else 1 if points.abs().max() > 7 else 0.5
        scales = 1 if width == 2 else len(points)
        assert layer.bytes == points.numel() * width + 4 * scales
        assert re.fullmatch(f"({kinds}) (packed in uint8 )?per (channel|tensor)", layer.stored)
    # Biases and batch norms are plain again; the network itself keeps its forms.
    assert {layer.name for layer in done.layers} == {
        n for n, f in forms.items() if len(f.shape) > 1
    }
    assert dict(held(net)) == forms


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_embedding_is_stored_once(tmp_path, bits):
    net = Tied(bits).eval()
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randint(0, 40, (2, 5)))
    assert done.inputs == {"ids": ("batch", "length")}
    assert done.outputs == ("logits", "ids.0")
    assert len(done.layers) == 1
    codes = [t for t in initializers(tmp_path / "net.onnx").values() if t.name.endswith("codes")]
    assert [len(t.raw_data) for t in codes] == [40 * 16 * bits // 8]
    model, ids = OnnxModel(tmp_path / "net.onnx"), torch.randint(0, 40, (1, 9))
    with torch.inference_mode(), decoded(net):
        wanted = net(ids)
    found = model(ids)
    assert torch.allclose(found["logits"], wanted["logits"], atol=1e-5)
    assert torch.equal(found["ids"][0], ids + 1)


def test_an_embedding_alone_decodes_only_rows(tmp_path):
    net = rtn(nn.Embedding(30, 8), bits=4)
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randint(0, 30, (2, 5)))
    assert done.layers[0].stored == "int4 packed in uint8 per channel"
    assert done.difference.absolute == done.default_difference.absolute == 0.0
    assert "DequantizeLinear" not in {n.op_type for n in onnx.load(done.path).graph.node}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_recurrent_layers_stay_whole_and_their_length_free(tmp_path, kind, options):
    net = rtn(Recurrent(kind, **options).eval(), bits=8)
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randn(2, 6, 6))
    assert done.inputs == {"x": ("batch", "length", 6)}
    assert [b["x"] for b in done.difference.batches] == [(2, 6, 6), (3, 6, 6), (3, 4, 6)]
    assert done.difference.relative < 1e-6
    assert all(layer.stored == "int8 per channel" for layer in done.layers)
    operators = [node.op_type for node in onnx.load(done.path).graph.node]
    assert operators.count(kind) == options.get("num_layers", 1)


def test_attention_exports_with_a_mask_given_by_name(tmp_path):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = rtn(layer.eval(), bits=8)
    example = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": torch.zeros(2, 5).bool()}
    example["src_key_padding_mask"][1, 3:] = True
    done = to_onnx(net, tmp_path / "net.onnx", example=example)
    assert done.inputs["src"] == ("batch", "length", 16)
    assert {layer.stored for layer in done.layers} == {"int8 per channel"}
    model = OnnxModel(tmp_path / "net.onnx")
    with torch.inference_mode():
        assert torch.allclose(model(**example), net(**example), atol=1e-5)


def test_weights_of_gpt2_conv1d_and_of_half_networks(tmp_path):
    net = rtn(nn.Sequential(Conv1D(), nn.Linear(6, 4)), bits=4, group_size=4)
    done = to_onnx(
        net.half(), tmp_path / "net.onnx", example=torch.randn(2, 16).half(), tolerance=5e-3
    )
    assert [layer.stored for layer in done.layers] == ["int4 in blocks of 4"] * 2
    assert OnnxModel(done.path)(torch.randn(3, 16).half()).dtype == torch.float16


def test_a_network_trained_with_quantization_exports_frozen(tmp_path):
    net = nn.Linear(8, 4)
    hold(net, "weight", FakeAffine.encode(net.weight, bits=4))
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randn(2, 8))
    assert (done.layers[0].stored, done.layers[0].bytes) == ("int4 per channel", 16 + 8)
    assert done.difference.relative < 1e-6


def test_an_unknown_form_stays_in_its_own_tensors(tmp_path):
    net = nn.Linear(64, 64, bias=False)
    form = Product(torch.randn(64, 4), torch.randn(4, 64))
    hold(net, "weight", form)
    rtn_left = rtn(nn.Linear(4, 64), bits=8)
    hold(form, "left", rtn_left.weight_form)
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randn(2, 64))
    assert [(layer.name, layer.stored) for layer in done.layers] == [
        ("weight.left", "int8 per channel"),
        ("weight.right", "float32"),
    ]
    assert done.bytes < 64 * 64 * 4 / 4


def test_a_plain_network_is_listed_as_such(tmp_path):
    done = to_onnx(nn.Linear(8, 4), tmp_path / "net.onnx", example=torch.randn(2, 8))
    assert [(x.stored, x.bytes, x.note) for x in done.layers] == [
        ("float32", 128, "held by no form")
    ]


def test_a_model_reloaded_without_its_code_exports(tmp_path):
    net, x = rtn(Tied(8).eval(), bits=8), torch.randint(0, 40, (2, 5))
    save(net, tmp_path / "net.tersor", example=x)
    done = to_onnx(load(tmp_path / "net.tersor"), tmp_path / "net.onnx", example=x)
    assert done.inputs == {"ids": ("batch", "length")}
    assert [layer.stored for layer in done.layers] == ["int8 per channel"]
    assert OnnxModel(done.path)(ids=x).keys() == {"logits", "ids"}


def test_the_same_model_gives_the_same_bytes_and_prints_nothing(tmp_path, capfd):
    net = rtn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), bits=8)
    for name in ("a", "b"):
        to_onnx(net, tmp_path / f"{name}.onnx", example=torch.ones(2, 3, 8, 8), check=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert str(tmp_path) not in (tmp_path / "a.onnx").read_bytes().decode("latin1")
    assert capfd.readouterr().out == ""


def test_the_result_is_plain_json(tmp_path):
    done = to_onnx(
        rtn(nn.Linear(8, 4)), tmp_path / "net.onnx", example=torch.randn(1, 8), check=False
    )
    told = json.loads(json.dumps(done.as_json()))
    assert told["layers"][0]["bytes"] == 40
    assert told["difference"] is None
    assert told["notes"] == []
    assert told["inputs"] == {"input": ["batch", 8]}


def test_one_row_as_the_example_leaves_the_batch_free(tmp_path):
    done = to_onnx(rtn(nn.Linear(8, 4)), tmp_path / "net.onnx", example=torch.randn(1, 8))
    assert OnnxModel(done.path)(torch.randn(7, 8)).shape == (7, 4)


def test_what_a_default_session_rounds_is_said_and_can_be_left_out(tmp_path):
    net, x = rtn(nn.Linear(64, 32), bits=8), torch.randn(4, 64)
    rounded = to_onnx(net, tmp_path / "rounded.onnx", example=x)
    assert rounded.difference.relative < 1e-6 < 1e-4 < rounded.default_difference.relative < 0.05
    assert ["activations to 8 bits" in note for note in rounded.notes] == [True]
    exact = to_onnx(net, tmp_path / "exact.onnx", example=x, integer_products=False)
    assert exact.default_difference.relative < 1e-6
    assert exact.notes == ()
    assert [layer.bytes for layer in exact.layers] == [layer.bytes for layer in rounded.layers]
    found = OnnxModel(tmp_path / "rounded.onnx", decode=False)(x)
    assert torch.allclose(found, net(x), atol=0.05 * net(x).abs().max().item())


def test_a_size_that_the_model_fixes_is_said(tmp_path):
    class Fixed(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.ones(2, 4)

    done = to_onnx(rtn(Fixed(8, 4)), tmp_path / "net.onnx", example=torch.randn(2, 8))
    assert done.inputs == {"x": (2, 8)}
    assert done.notes[0] == 'the number of rows of input "x" is fixed at 2'
    assert "compared on the example alone" in done.notes[-1]


def test_two_bit_integers_from_opset_25_on(tmp_path):
    net = rtn(nn.Linear(64, 32), bits=2)
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randn(2, 64), opset=25)
    assert (done.layers[0].stored, done.layers[0].bytes) == ("int2 per channel", 512 + 64)
    assert done.difference.relative < 1e-6


def test_above_the_limit_weights_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "SINGLE_FILE_LIMIT", 1000)
    net = rtn(nn.Linear(64, 64), bits=8)
    done = to_onnx(net, tmp_path / "net.onnx", example=torch.randn(2, 64))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["net.onnx", "net.onnx.data"]
    assert done.bytes == sum(file.stat().st_size for file in files)
    x = torch.randn(3, 64)
    assert torch.allclose(OnnxModel(done.path)(x), net(x), atol=1e-5)


def test_weights_that_grew_are_refused(tmp_path, monkeypatch):
    def leaky(form, writer):
        copied = writer.store("copy", form.dense())
        writer.stored.clear()
        return copied

    def forgetful(form, writer):
        writer.store("codes", form.codes)
        return leaky(form, Writer("other", 21, {}, [], writer.nodes, writer.initializers))

    net, example = rtn(nn.Conv2d(3, 4, 3), bits=8), torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(onnx_graph, "lower", leaky)
    with pytest.raises(ExportError, match='a float copy of weight "weight" of shape'):
        to_onnx(net, tmp_path / "net.onnx", example=example)
    monkeypatch.setattr(onnx_graph, "lower", forgetful)
    with pytest.raises(
        ExportError, match=r'as INT8 of 108 bytes in "weight.codes", but .* nothing'
    ):
        to_onnx(net, tmp_path / "net.onnx", example=example)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_differ_are_refused_and_nothing_is_replaced(tmp_path, monkeypatch):
    target = tmp_path / "net.onnx"
    target.write_bytes(b"before")
    lower = onnx_graph.lower
    monkeypatch.setattr(
        onnx_graph, "lower", lambda form, writer: writer.op("Neg", lower(form, writer))
    )
    with pytest.raises(ExportError, match=r"differ from torch's by .* more than tolerance=0.0001"):
        to_onnx(rtn(nn.Conv2d(3, 4, 3)), target, example=torch.randn(2, 3, 8, 8))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_cannot_be_exported_says_why(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        ExportError, match=r"Branching cannot be exported to ONNX: .*data-dependent"
    ):
        to_onnx(Branching(), tmp_path / "net.onnx", example=torch.randn(2, 3))
    with pytest.raises(ExportError, match=r"Linear fails on the example inputs: .* give inputs"):
        to_onnx(nn.Linear(8, 4), tmp_path / "net.onnx", example=torch.randn(2, 3))
    with pytest.raises(ExportError, match="LSTM with proj_size=2 cannot be exported"):
        to_onnx(nn.LSTM(4, 8, proj_size=2), tmp_path / "net.onnx", example=torch.randn(3, 2, 4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 20}, "opset=20; 4-bit weights need 21"),
        ({"tolerance": 0}, "tolerance=0 is relat"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        to_onnx(nn.Linear(8, 4), tmp_path / "net.onnx", example=torch.randn(2, 8), **options)


def test_a_model_without_weights_writes_nothing(tmp_path):
    with pytest.raises(ModelError, match="ReLU has no weights"):
        to_onnx(nn.ReLU(), tmp_path / "net.onnx", example=torch.randn(2, 8))
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*: No such file or directory"):
        to_onnx(nn.Linear(8, 4), tmp_path / "no" / "net.onnx", example=torch.randn(2, 8))
    with pytest.raises(OutputError, match="is a folder"):
        to_onnx(nn.Linear(8, 4), tmp_path, example=torch.randn(2, 8))


def test_a_missing_extra_says_what_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "tersor\[onnx\]"'):
        to_onnx(nn.Linear(8, 4), tmp_path / "net.onnx", example=torch.randn(2, 8))


def test_a_runner_refuses_what_it_cannot_run(tmp_path):
    with pytest.raises(ModelError, match="is no file"):
        OnnxModel(tmp_path / "net.onnx")
    for content in (b"not a model", b""):
        (tmp_path / "net.onnx").write_bytes(content)
        with pytest.raises(ExportError, match="ONNX Runtime cannot load"):
            OnnxModel(tmp_path / "net.onnx")
    to_onnx(nn.Linear(8, 4), tmp_path / "net.onnx", example=torch.randn(2, 8), check=False)
    model = OnnxModel(tmp_path / "net.onnx")
    assert model.input_names == ["input"]
    with pytest.raises(
        ModelError, match=r"takes \['input'\], not 1 inputs by position and \['y'\]"
    ):
        model(torch.randn(2, 8), y=torch.randn(2, 8))
    with pytest.raises(ModelError, match=r"input 'input' of net\.onnx must be a tensor, not None"):
        model()
    with pytest.raises(ModelError, match=r"net\.onnx does not run on these inputs: .* dimensions"):
        model(torch.randn(2, 7))


def test_a_runner_says_what_is_missing_in_an_input(tmp_path):
    class Nested(nn.Linear):
        def forward(self, x):
            return super().forward(x["first"] + x["both"][1])

    x = {"first": torch.ones(2), "both": (torch.ones(2), torch.ones(2))}
    model = OnnxModel(to_onnx(Nested(2, 2), tmp_path / "net.onnx", example=(x,)).path)
    for given, said in (
        (None, "'first'"),
        ({"first": x["first"]}, "'both'"),
        (x | {"both": ()}, "0"),
    ):
        with pytest.raises(ModelError, match=f"must hold {said}, which "):
            model(given)


def test_a_file_from_elsewhere_runs_too(tmp_path):
    helper = onnx.helper
    shape = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])
    out = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "yz"]
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["z"])]
    graph = helper.make_graph(nodes, "g", [shape], out)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    y, z = OnnxModel(tmp_path / "m.onnx")(torch.tensor([1.0, -2.0]))
    assert (y.tolist(), z.tolist()) == ([-1.0, 2.0], [1.0, 2.0])
