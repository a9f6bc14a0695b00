"""A stored program from a stranger is refused with a sentence, or can do nothing but arithmetic."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.errors import CompressError, FileError, ModelError
from tersor.program.interpreter import Interpreted
from tersor.program.operators import ATEN, overload
from tersor.program.program import Program
from tersor.program.skeleton import skeleton
from tersor.program.trace import trace


def fields(*nodes, operators=(), output="^1", **changed):
    """A small program: one input "x" of any 2-d shape, then `nodes`."""
    return {
        "program": 1,
        "inputs": [["x", ["~", [0], [1]]]],
        "sizes": [[0, None, 2], [0, None, 2]],
        "kinds": ["Linear"],
        "modules": [["fc", 0]],
        "weights": [],
        "constants": [],
        "operators": list(operators),
        "nodes": list(nodes),
        "output": output,
        "static": [],
        "dtype": "float32",
    } | changed


def read(program):
    return Program.from_json(program if isinstance(program, bytes | str) else json.dumps(program))


def run(program, *args):
    return Interpreted(read(program), skeleton({}))(*args)


def test_the_small_program_itself_runs():
    x = torch.tensor([[-1.0, 2.0]])
    out = run(fields([0, "^1"], operators=["relu.default"]), x)
    assert out.tolist() == [[0.0, 2.0]]


FORBIDDEN = [
    *("from_file.default", "resize_.default", "set_.source_Tensor", "as_strided.default"),
    *("empty.memory_format", "rand.default", "bernoulli.default", "dropout.default"),
    *("save.default", "eval", "exec", "builtins.open", "os.system", "__import__", "__class__"),
    *("relu.__class__", "torch.load", "aten.relu.default", "relu", "relu.", "conv2d.default.x"),
    *("sym.__import__", "tersor::lstm", "aten::relu", "", "sym.", "_foreach_add_.Scalar"),
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_operators_off_the_list_are_refused(name):
    with pytest.raises(FileError, match="not on the list of those allowed"):
        read(fields([0, "^1"], operators=[name]))


BROKEN = {
    "forward reference": (fields([0, "^0"], operators=["relu.default"]), "not an earlier value"),
    "before the first": (fields([0, "^2"], operators=["relu.default"]), "not an earlier value"),
    "negative reference": (fields([0, "^-1"], operators=["relu.default"]), "is no reference"),
    "unicode digit": (fields([0, "^\u0661"], operators=["relu.default"]), "is no reference"),
    "bare text": (fields([0, "x"], operators=["relu.default"]), "'x' is unknown"),
    "bare number": (fields([0, {"a": 1}], operators=["relu.default"]), 'no free argument "a"'),
    "unknown dtype": (fields([0, "^1", ":object"], operators=["to.dtype"]), "':object' is unknown"),
    "wrong type": (fields([0, "^1", "'2"], operators=["softmax.int"]), '"dim" must be int'),
    "boolean index": (fields([0, "^1", True], operators=["softmax.int"]), '"dim" must be int'),
    "missing": (fields([0, "^1"], operators=["softmax.int"]), 'lacks its argument "dim"'),
    "too many": (fields([0, "^1", 1], operators=["relu.default"]), "at most 1 arguments"),
    "twice": (fields([0, "^1", {"self": "^1"}], operators=["relu.default"]), "no free argument"),
    "a number as tensor": (
        fields([0, "^1", 0], [1, "^1"], operators=["size", "relu.default"]),
        'argument "self" must be Tensor alone',
    ),
    "tensor arithmetic": (fields([0, "^1", 2], operators=["sym.mul"]), "takes numbers only"),
    "list arithmetic": (fields([0, [1], 99], operators=["sym.mul"]), "takes numbers only"),
    "item of a tensor": (fields([0, "^1", 0], operators=["item"]), "needs several results"),
    "random attention": (
        fields(
            [0, "^1", "^1", "^1", None, 0.5], operators=["scaled_dot_product_attention.default"]
        ),
        "no random numbers here",
    ),
    "training statistics": (
        fields(
            [0, "^1", None, None, "^1", "^1", True, 0.1, 1e-5, False],
            operators=["batch_norm.default"],
        ),
        '"training" must be false',
    ),
    "writes to a weight": (
        fields([0], [1, "^1", 1], operators=["weight", "add_.Scalar"], weights=[[0, "weight"]]),
        "writes to a weight",
    ),
    "writes through a view": (
        fields(
            *([0], [1, "^1", [-1]], [2, "^1", 1]),
            operators=["weight", "view.default", "add_.Scalar"],
            weights=[[0, "weight"]],
        ),
        "writes to a weight",
    ),
    "dunder weight": (fields(weights=[[0, "__class__"]]), "not the name of a module or tensor"),
    "dunder module": (fields(modules=[["__dict__", 0]]), "not the name of a module or tensor"),
    "empty part": (fields(modules=[["a..b", 0]]), "not the name of a module or tensor"),
    "unfetched weight": (fields(weights=[[0, "weight"]]), "is fetched once"),
    "weight fetched twice": (
        fields([0], [0], operators=["weight"], weights=[[0, "weight"]]),
        "is fetched once",
    ),
    "module number": (fields(weights=[[7, "weight"]]), "7 is no module's number"),
    "negative module": (fields(weights=[[-1, "weight"]]), "-1 is no module's number"),
    "operator number": (fields([3, "^1"], operators=["relu.default"]), "3 is no operator's number"),
    "negative operator": (fields([-1, "^1"], operators=["relu.default"]), "-1 is no operator's"),
    "boolean operator": (fields([False, "^1"], operators=["relu.default"]), "no operator's number"),
    "weight listed twice": (fields(weights=[[0, "a"], [0, "a"]]), "a weight is listed twice"),
    "module listed twice": (fields(modules=[["a", 0], ["a", 0]]), "a module is listed twice"),
    "input listed twice": (
        fields(inputs=[["x", ["~"]], ["x", ["~"]]]),
        'input "x" is listed twice',
    ),
    "output": (fields(output="^2"), "not an earlier value"),
    "output structure": (fields(output={"set": []}), "'set' is no kind of structure"),
    "private field": (fields(output={"record": [["__class__", "^1"]]}), "a field starts with _"),
    "size": (fields(inputs=[["x", ["~", -1]]]), "a size is not a natural number"),
    "unbounded symbol": (fields(inputs=[["x", ["~", [2]]]]), "a free size has no bounds"),
    "zero factor": (fields(inputs=[["x", ["~", [0, 0, 0]]]]), "a bad factor"),
    "no type": (fields(inputs=[["x", []]]), "an input is not a type and at most 64 dimensions"),
    "many dimensions": (fields(inputs=[["x", ["~"] + [1] * 65]]), "at most 64 dimensions"),
    "size for a type": (fields(inputs=[["x", [[0], [1]]]]), "an input has no type"),
    "text for a type": (fields(inputs=[["x", ["'float32", [0]]]]), "an input has no type"),
    "device for a type": (fields(inputs=[["x", ["@", [0]]]]), "an input has no type"),
    "type of an input": (fields(inputs=[["x", [":object", [0]]]]), "':object' is unknown"),
    "size without its value": (fields(sizes=[[0, None], [0, None]]), "is not [low, high, traced]"),
    "boolean bound": (fields(sizes=[[False, None, 2], [0, None, 2]]), "bounds are not integers"),
    "boolean value": (fields(sizes=[[0, None, True], [0, None, 2]]), "is not an integer"),
    "broken value": (fields(sizes=[[0, None, 2.0], [0, None, 2]]), "is not an integer"),
    "no value": (fields(sizes=[[0, None, None], [0, None, 2]]), "is not an integer"),
    "value below": (fields(sizes=[[3, None, 2], [0, None, 2]]), "the size 2 that was traced"),
    "value above": (fields(sizes=[[0, 1, 2], [0, None, 2]]), "the size 2 that was traced"),
    "negative value": (fields(sizes=[[-9, None, -1], [0, None, 2]]), "the size -1 that was"),
    "large value": (fields(sizes=[[0, None, 2**40 + 1], [0, None, 2]]), "that was traced is out"),
    "negative size": (fields(inputs=[["x", ["~", [0, 1, -3]]]]), "traced with a size of -1"),
    "large size": (fields(inputs=[["x", ["~", [0, 2**31, 2**40]]]]), "traced with a size of"),
    "dtype": (fields(dtype="int64"), "the dtype is not a floating one"),
    "large integer": (fields([0, 2**63], operators=["relu.default"]), "does not fit 64 bits"),
    "huge integer": (
        json.dumps(fields(sizes=[[0, 5, 2]])).replace("5", "5" * 9000),
        "does not fit 64 bits",
    ),
    "deep list": (
        fields([0, json.loads("[" * 20 + "]" * 20)], operators=["relu.default"]),
        "nested too deeply",
    ),
    "deep output": (
        fields(output=json.loads('{"list":[' * 20 + "]}" * 20)),
        "outputs are nested too deeply",
    ),
    "deep input": (
        fields(inputs=[["x", json.loads('{"list":[' * 20 + "]}" * 20)]]),
        "inputs are nested too deeply",
    ),
    "deeper than Python": ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
    "long list": (fields([0, [0] * 5000], operators=["relu.default"]), "a list is too long"),
    "long text": (fields(operators=["a" * 600]), "longer than 512 characters"),
    "not a number": ('{"program": NaN}', "NaN is not JSON"),
    "same key twice": ('{"program": 1, "program": 1}', "the same key twice"),
    "no JSON": ("import os", "cannot be read as JSON"),
    "no text": (b"\xff\xfe\xfd", "cannot be read as JSON"),
    "no object": ("[]", "not a JSON object"),
    "later version": (fields() | {"program": 2}, "version 2 is not 1"),
    "missing field": ({"program": 1}, "its fields are not exactly"),
    "extra field": (fields() | {"code": "1"}, "its fields are not exactly"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_programs_are_refused(case):
    program, message = BROKEN[case]
    with pytest.raises(FileError, match=re.escape(message)) as caught:
        read(program)
    assert str(caught.value).startswith("the program stored in the file breaks a rule: ")


HUGE = {
    "zeros": fields([0, [65536, 65536]], operators=["zeros.default"]),
    "arange": fields([0, 2**40], operators=["arange.default"]),
    "repeat": fields([0, "^1", [2**20, 2**20]], operators=["repeat.default"]),
    "expand": fields([0, "^1", [2**31, -1, 2]], operators=["expand.default"]),
    "pad": fields([0, "^1", [2**40, 0]], operators=["constant_pad_nd.default"]),
    "one_hot": fields([0, 2], [1, "^1", 2**40], operators=["arange.default", "one_hot.default"]),
    "eye": fields([0, 2**20], operators=["eye.default"]),
    "by keyword": fields([0, {"size": [2**40]}], operators=["zeros.default"]),
    "fft": fields([0, "^1", 2**40], operators=["fft_fft.default"]),
    "linspace": fields([0, 0, 1, 2**40], operators=["linspace.default"]),
}


@pytest.mark.parametrize("case", HUGE)
def test_huge_results_are_refused_before_they_are_made(case):
    with pytest.raises(ModelError, match="elements, above the limit"):
        run(HUGE[case], torch.rand(2, 2))


def lstm(weights, layers=1, states=2):
    count = len(weights)
    state, given = f"^{count + 1}", [f"^{count - place}" for place in range(count)]
    settings = [False, layers, 0.0, False, False, False]
    program = fields(
        *([0, [1, 1, 4]], [0, [1, 1, 2]], *([0, shape] for shape in weights)),
        [1, f"^{count + 2}", [state] * states, given, *settings],
        [2, "^1", 0],
        operators=["zeros.default", "lstm.input", "item"],
    )
    return run(program, torch.rand(1, 1))


def test_recurrent_weights_that_do_not_fit_are_refused():
    # torch reads past the end of such weights, or crashes.
    assert lstm([[8, 4], [8, 2]]).shape == (1, 1, 2)
    for weights, layers, states in (
        ([[8, 4], [8, 3]], 1, 2),
        ([[8, 4], [7, 2]], 1, 2),
        ([[8, 4]], 1, 2),
        ([[8, 4], [8, 2]], 3, 2),
        ([[8, 4], [8, 2]], 1, 1),
        ([[8, 0], [8, 2]], 1, 2),
    ):
        with pytest.raises(ModelError, match="shapes do not fit each other"):
            lstm(weights, layers, states)


def test_weight_norm_of_unfitting_lengths_is_refused():
    nodes = [0, [3, 4]], [0, [2, 1]], [1, "^2", "^1"]
    program = fields(*nodes, operators=["zeros.default", "_weight_norm.default"])
    with pytest.raises(ModelError, match="shapes do not fit each other"):
        run(program, torch.rand(1, 1))


def test_numbers_cannot_grow_without_end():
    squares = [[1, "^1", "^1"] for _ in range(40)]
    program = fields([0, "^1", 0], *squares, operators=["size", "sym.mul"])
    with pytest.raises(ModelError, match="does not fit 64 bits"):
        run(program, torch.rand(3, 2))


def test_names_that_clash_with_module_attributes_are_refused():
    for name in ("forward", "_modules.weight", "kind", "fc.to"):
        with pytest.raises(FileError, match="clashes with another part"):
            skeleton({name: [2]})


def test_input_names_that_python_cannot_say_still_work():
    program = fields([0, "^1"], operators=["relu.default"], inputs=[["class", ["~", [0], [1]]]])
    assert run(program, -torch.ones(1, 1)).item() == 0


def test_every_listed_operator_exists():
    for name in ATEN:
        assert overload(name)._schema.name == f"aten::{name.partition('.')[0]}"


@pytest.fixture(scope="module")
def honest():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LSTM(3, 2, batch_first=True))
    return trace(model.eval(), (torch.rand(2, 5, 4),)).to_json()


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_one_changed_byte_is_read_or_refused_but_never_crashes(honest, position, byte):
    changed = bytearray(honest)
    changed[position % len(changed)] = byte
    try:
        program = Program.from_json(bytes(changed))
    except FileError:
        return
    assert Program.from_json(program.to_json()) == program


VALUES = [None, True, -1, 0, 3, 2**62, 1.5, "", "^1", "^9", "'a", "@", [], [[]], {}, {"a": 1}, "~"]


@given(data=st.data())
def test_one_changed_field_is_read_or_refused_but_never_crashes(honest, data):
    program = json.loads(honest)
    target, key = program, data.draw(st.sampled_from(sorted(program)))
    while isinstance(target[key], list | dict) and target[key] and data.draw(st.booleans()):
        target = target[key]
        keys = list(target) if isinstance(target, dict) else range(len(target))
        key = data.draw(st.sampled_from(keys))
    target[key] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    try:
        found = Program.from_json(json.dumps(program))
    except FileError:
        return
    tree = skeleton({f"0.{name}": shape for name, shape in (("weight", [3, 4]), ("bias", [3]))})
    try:
        Interpreted(found, tree)
    except CompressError:
        return
    assert Program.from_json(found.to_json()) == found
