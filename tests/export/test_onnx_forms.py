"""Each form, lowered alone: ONNX Runtime gives back exactly the weight torch decodes."""

import math

import pytest
import torch

from tersor.export.onnx_forms import as_affine, lower
from tersor.export.onnx_products import multiply_codes
from tersor.export.onnx_rows import gather_rows, pack
from tersor.export.onnx_writer import Writer
from tersor.forms import (
    Affine,
    Bitmask,
    BitPlanes,
    BlockFloat,
    Codebook,
    Dense,
    NofM,
    ProductCodebook,
    Trellis,
)
from tersor.surgery import hold

ir = pytest.importorskip("onnx_ir", reason="needs the extra onnx")
passes = pytest.importorskip("onnx_ir.passes.common", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

SHAPES = [(6, 40), (5, 3, 3, 3), (4, 2, 7), (1, 9)]


def weight_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run(value, writer, decode=True, opset=21):
    value.dtype = value.dtype or ir.DataType.FLOAT
    initializers = [*writer.initializers.values(), *writer.shared.values()]
    graph = ir.Graph(
        [],
        [value],
        nodes=writer.nodes,
        initializers=initializers,
        opset_imports={"": opset},
        name="w",
    )
    return execute(graph, {}, decode)


def execute(graph, feed, decode=True):
    model = ir.Model(graph, ir_version=12 if graph.opset_imports[""] == 25 else 10)
    passes.NameFixPass()(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if decode:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    proto = ir.to_proto(model).SerializeToString()
    runner = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(runner.run(None, feed)[0])


def lowered(form, opset=21):
    writer = Writer("w", opset)
    return run(lower(form, writer), writer, opset=opset), writer


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8},
        {"bits": 8, "symmetric": False},
        {"bits": 4, "group_size": 16},
        {"bits": 3, "group_size": 4, "symmetric": False},
        {"bits": 1},
        {"bits": 1, "symmetric": False},
        {"bits": 6, "axis": 1},
        {"bits": 4, "axis": 1, "group_size": 4},
        {"bits": 5, "axis": None},
        {"bits": 2, "axis": None, "symmetric": False, "group_size": 16},
    ],
    ids=str,
)
def test_affine_codes_decode_to_the_same_bits(shape, options, decode):
    form = Affine.encode(weight_of(shape), **options)
    writer = Writer("w", 21)
    assert torch.equal(run(lower(form, writer), writer, decode=decode), form.dense())
    bits = 8 if options["bits"] > 4 else 4
    kind = f"INT{bits}"
    assert writer.stored["w.codes"] == (kind, math.ceil(math.prod(shape) * bits / 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("states", [1, 8])
@pytest.mark.parametrize(
    ("step", "kind"), [(0.5, "INT4"), (0.05, "INT8"), (0.001, "INT16"), (1e-6, "INT32")]
)
def test_points_of_a_trellis_decode_to_the_same_bits(step, kind, states, shape, axis, dtype):
    weight = weight_of(shape)
    weight.view(-1)[0] = 3.0
    form = Trellis.encode(weight.to(dtype), step=step, states=states, axis=axis)
    narrow = as_affine(form)
    assert isinstance(narrow, Affine) == (kind in ("INT4", "INT8") and dtype == torch.float32)
    assert torch.equal(narrow.dense(), form.dense())
    writer = Writer("w", 21)
    value = lower(narrow, writer)
    assert torch.equal(run(writer.cast(value, torch.float32), writer), form.dense().float())
    kind = "INT8" if kind == "INT4" and dtype == torch.bfloat16 else kind
    each = {"INT4": 0.5, "INT8": 1, "INT16": 2, "INT32": 4}[kind]
    assert writer.stored["w.codes"] == (kind, math.ceil(math.prod(shape) * each))
    said = [f"stored as {kind.lower()}: it has points beyond 127"]
    assert writer.notes == ([] if kind in ("INT4", "INT8") else said)


@pytest.mark.parametrize("bits", [1, 2])
def test_two_bit_integers_take_two_bits_from_opset_25_on(bits):
    form = Affine.encode(weight_of((6, 40)), bits=bits)
    value, writer = lowered(form, opset=25)
    assert torch.equal(value, form.dense())
    assert writer.stored["w.codes"] == ("INT2", 60)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("operator", ["Gemm", "Transpose", "MatMul"])
def test_products_read_codes_as_inputs_by_outputs(operator, group_size, symmetric):
    linear, shape = operator != "MatMul", (6, 40) if operator != "MatMul" else (40, 6)
    form = Affine.encode(
        weight_of(shape), bits=4, axis=int(not linear), group_size=group_size, symmetric=symmetric
    )
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["b", 40])
    weight = ir.val("weight", dtype=ir.DataType.FLOAT, shape=shape)
    nodes = [ir.node("Transpose", [weight], {"perm": [1, 0]})] if operator == "Transpose" else []
    right = nodes[0].outputs[0] if nodes else weight
    right.shape = right.shape or ir.Shape([40, 6])
    if operator == "Gemm":
        nodes.append(ir.node("Gemm", [x, right], {"transB": 1}))
    else:
        nodes.append(ir.node("MatMul", [x, right]))
    nodes[-1].outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, opset_imports={"": 21}, name="product")
    writer = Writer("w", 21)
    assert multiply_codes(form, weight, writer)
    graph.insert_before(graph[0], writer.nodes)
    graph.initializers.update(writer.initializers | writer.shared)
    rows = torch.eye(40)
    wanted = form.dense().T if linear else form.dense()
    assert torch.equal(execute(graph, {"x": rows.numpy()}), wanted)
    assert writer.initializers["w.codes"].shape == (40, 6)
    assert writer.stored["w.codes"] == ("INT4", 120)


@pytest.mark.parametrize(("axis", "group_size"), [(1, None), (None, None), (0, 10), (0, 512)])
def test_codes_that_no_product_kernel_takes_are_left_to_the_loader(axis, group_size):
    form = Affine.encode(weight_of((6, 40)), bits=8, axis=axis, group_size=group_size)
    weight = ir.val("weight", dtype=ir.DataType.FLOAT, shape=[6, 40])
    ir.node("Gemm", [ir.val("x"), weight], {"transB": 1})
    writer = Writer("w", 21)
    assert not multiply_codes(form, weight, writer)
    assert writer.stored == {}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sparse", ["bitmask", "nofm"])
@pytest.mark.parametrize("shape", [(6, 40), (5, 4, 3, 3)])
def test_sparse_codes_stay_sparse_where_that_is_smaller(shape, sparse, bits):
    weight = weight_of(shape)
    flat = weight.reshape(-1, 4)
    flat[:, 1:] = 0
    form = Affine.encode(weight, bits=bits)
    codes = form.codes
    hold(
        form,
        "codes",
        Bitmask.encode(codes) if sparse == "bitmask" else NofM.encode(codes, n=1, m=4),
    )
    value, writer = lowered(form)
    assert torch.equal(value, form.dense())
    kept = int((codes != 0).sum()) if sparse == "bitmask" else codes.numel() // 4
    assert "w.codes" not in writer.stored
    assert writer.stored["w.codes.values"] == (f"INT{bits}", math.ceil(kept * bits / 8))


def test_codes_with_few_zeros_are_stored_dense():
    weight = weight_of((6, 40))
    weight[:, 0] = 0
    form = Affine.encode(weight, bits=4)
    hold(form, "codes", Bitmask.encode(form.codes))
    value, writer = lowered(form)
    assert torch.equal(value, form.dense())
    assert writer.stored["w.codes"] == ("INT4", 120)
    assert writer.notes == ["zeros stored: their places would take more room"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("shape", "axis"), [((6, 40), 0), ((40, 6), 1), ((5, 3, 3, 3), 0)])
def test_four_bit_floats_are_looked_up(shape, axis, format, dtype):
    form = BlockFloat.encode(weight_of(shape).to(dtype), format=format, axis=axis)
    writer = Writer("w", 21)
    value = writer.cast(lower(form, writer), torch.float32)
    assert torch.equal(run(value, writer), form.dense().float())
    scales = form.scale.numel()
    whole = {"w.tensor_scale": ("FLOAT", 4)} if format == "nvfp4" else {}
    assert writer.stored == whole | {
        "w.codes": ("INT4", math.ceil(math.prod(shape) / 2)),
        "w.scale": ("FLOAT8E4M3FN" if format == "nvfp4" else "UINT8", scales),
    }


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize(("shape", "axis"), [((6, 40), 0), ((40, 6), 1), ((5, 3, 3, 3), 0)])
def test_planes_of_signs_are_looked_up(shape, axis, group_size, planes):
    form = BitPlanes.encode(weight_of(shape), planes=planes, group_size=group_size, axis=axis)
    value, writer = lowered(form)
    assert torch.equal(value, form.dense())
    assert writer.stored["w.codes"] == ("INT4", math.ceil(math.prod(shape) / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("shape", [(6, 40), (5, 3, 3, 3)])
def test_zero_points_may_be_fractions(shape, group_size, dtype):
    whole = Affine.encode(weight_of(shape), bits=4, group_size=group_size, symmetric=False)
    form = Affine(
        whole.codes,
        whole.scale,
        whole.zero.half() + 0.3,
        **whole.config(),
        shape=shape,
        dtype=dtype,
        zero_bits=16,
    )
    writer = Writer("w", 21)
    value = writer.cast(lower(form, writer), torch.float32)
    assert torch.equal(run(value, writer), form.dense().float())
    assert writer.stored["w.zero"] == ("FLOAT16", 2 * whole.zero.numel())
    assert writer.notes == ["decoded when the model is loaded: its zero points are fractions"]


def test_every_power_of_two_is_looked_up():
    form = BlockFloat.encode(torch.eye(255).repeat_interleave(32, 1), format="mxfp4")
    form.scale.copy_(torch.arange(255, dtype=torch.uint8).expand(255, 255))
    value, _ = lowered(form)
    assert torch.equal(value, form.dense())
    assert value[0, 0] == 4 * 2.0**-127


def test_four_bit_floats_stay_sparse():
    weight = torch.where(weight_of((6, 40)) > 0.5, weight_of((6, 40)), 0)
    form = BlockFloat.encode(weight)
    hold(form, "codes", Bitmask.encode(form.codes, bits=4))
    value, writer = lowered(form)
    assert torch.equal(value, form.dense())
    assert "w.codes" not in writer.stored
    assert writer.stored["w.codes.values"][0] == "INT4"


@pytest.mark.parametrize(("count", "kind", "size"), [(200, "UINT8", 240), (16, "UINT4", 120)])
def test_a_codebook_becomes_indices(count, kind, size):
    form = Codebook.encode(weight_of((6, 40)), torch.linspace(-2, 2, count))
    value, writer = lowered(form)
    assert torch.equal(value, form.dense())
    assert writer.stored["w.codes"] == (kind, size)
    assert writer.stored["w.values"] == ("FLOAT", 4 * count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_codebook_with_scales_multiplies_what_it_looked_up(shape, axis, dtype):
    plain = Codebook.encode(weight_of(shape), torch.linspace(-2, 2, 16).half())
    scale = (torch.arange(shape[axis])[:, None] / 7 + 0.1).bfloat16()
    form = Codebook(plain.codes, plain.values, scale, bits=4, dtype=dtype, axis=axis)
    writer = Writer("w", 21)
    value = run(writer.cast(lower(form, writer), torch.float32), writer)
    assert torch.equal(value, form.dense().float())
    assert writer.stored["w.codes"] == ("UINT4", math.ceil(math.prod(shape) / 2))
    assert writer.stored["w.scale"] == ("BFLOAT16", 2 * shape[axis])


@pytest.mark.parametrize(("count", "kind"), [(16, "UINT4"), (200, "UINT8"), (300, "INT16")])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_sub_vectors_are_looked_up_and_put_side_by_side(shape, axis, count, kind):
    inputs = math.prod(shape) // shape[axis]
    for length in {1, min(4, inputs), inputs}:
        codes = torch.arange(shape[axis] * math.ceil(inputs / length)).reshape(shape[axis], -1)
        codes = (codes * 7 % count).to(torch.uint8 if count <= 256 else torch.int16)
        values = torch.randn(count, length, generator=torch.Generator().manual_seed(0))
        form = ProductCodebook(codes, values, axis=axis, shape=shape, dtype=torch.float32)
        value, writer = lowered(form)
        assert torch.equal(value, form.dense())
        assert writer.stored["w.codes"][0] == kind
        assert writer.stored["w.values"] == ("FLOAT", 4 * count * length)


@pytest.mark.parametrize("shape", [(6, 40), (5, 3, 3, 3), (1, 9)])
def test_a_mask_stays_a_mask(shape):
    weight = torch.where(weight_of(shape) > 0.5, weight_of(shape), 0)
    value, writer = lowered(Bitmask.encode(weight))
    assert torch.equal(value, weight)
    assert writer.stored["w.mask"] == ("UINT8", math.ceil(weight.numel() / 8))
    assert writer.stored["w.values"] == ("FLOAT", 4 * int((weight != 0).sum()))


@pytest.mark.parametrize("axis", [0, 1])
def test_two_of_four_stays_two_of_four(axis):
    weight = weight_of((8, 8, 2))
    rows = weight.movedim(axis, 0).reshape(8, 4, 4)
    rows = torch.where(rows.abs() >= rows.abs().sort(-1).values[..., 2:3], rows, 0)
    weight = rows.reshape(8, 8, 2).movedim(0, axis)
    value, writer = lowered(NofM.encode(weight, n=2, m=4, axis=axis))
    assert torch.equal(value, weight)
    assert writer.stored["w.values"] == ("FLOAT", 4 * 64)
    assert writer.stored["w.places"] == ("UINT4", 32)


@pytest.mark.parametrize(
    ("dtype", "kind", "width"),
    [
        (torch.float16, "FLOAT16", 2),
        (torch.bfloat16, "BFLOAT16", 2),
        (torch.float8_e4m3fn, "FLOAT8E4M3FN", 1),
        (torch.float8_e5m2, "FLOAT8E5M2", 1),
    ],
)
def test_narrow_floats_stay_narrow(dtype, kind, width):
    form = Dense.encode(weight_of((6, 40)), dtype=dtype)
    value, writer = lowered(form)
    assert torch.equal(value, form.dense())
    assert writer.stored == {"w.stored": (kind, 240 * width)}


@pytest.mark.parametrize(("shape", "axis"), [((6, 40), 0), ((40, 6), 1), ((5, 3, 3), None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_narrow_floats_are_multiplied_in(shape, axis, dtype):
    weight = weight_of(shape).to(dtype)
    form = Dense.encode_scaled(weight, dtype=torch.float8_e4m3fn, axis=axis)
    writer = Writer("w", 21)
    value = writer.cast(lower(form, writer), torch.float32)
    assert torch.equal(run(value, writer), form.dense().float())
    scales = 1 if axis is None else shape[axis]
    wanted = {"w.stored": ("FLOAT8E4M3FN", weight.numel()), "w.scale": ("BFLOAT16", 2 * scales)}
    assert writer.stored == wanted


def test_a_mask_that_keeps_nothing_is_zeros():
    form = Bitmask.encode(torch.zeros(3, 7))
    value, _ = lowered(form)
    assert torch.equal(value, torch.zeros(3, 7))


def test_a_mask_over_codes_nests():
    weight = torch.where(weight_of((6, 40)) > 0.5, weight_of((6, 40)), 0)
    form = Bitmask.encode(weight)
    hold(form, "values", Affine.encode(form.values, bits=8, axis=None))
    value, writer = lowered(form)
    assert torch.equal(value, form.dense())
    assert writer.stored["w.values.codes"] == ("INT8", int((weight != 0).sum()))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("group_size", [None, 10])
@pytest.mark.parametrize("symmetric", [True, False])
def test_only_the_rows_asked_for_are_decoded(bits, group_size, symmetric):
    table = weight_of((30, 40))
    form = Affine.encode(table, bits=bits, group_size=group_size, symmetric=symmetric)
    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=["b", "t"])
    weight = ir.val("weight", dtype=ir.DataType.FLOAT, shape=[30, 40])
    gather = ir.node("Gather", [weight, ids])
    out = ir.node("Identity", gather.outputs)
    out.outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph([ids], out.outputs, nodes=[gather, out], opset_imports={"": 21}, name="rows")
    writer = Writer("w", 21)
    gather_rows(form, weight, writer)
    graph.initializers.update(writer.initializers | writer.shared)
    wanted = torch.tensor([[0, 29, 3], [7, 7, 1]])
    assert torch.equal(execute(graph, {"ids": wanted.numpy()}), form.dense()[wanted])
    assert not list(weight.uses())
    kind, size = ("UINT8", 600) if bits <= 4 else ("INT8", 1200)
    assert writer.stored["w.codes"] == (kind, size)


def test_packing_puts_the_first_code_in_the_low_half():
    # -8 -> 0, 7 -> 15, -1 -> 7, 0 -> 8: bytes 0xF0 and 0x87.
    assert pack(torch.tensor([[-8, 7, -1, 0]], dtype=torch.int8)).tolist() == [[0xF0, 0x87]]
