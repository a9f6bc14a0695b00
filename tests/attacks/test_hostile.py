"""Files made to harm, with right checksums: each rule of docs/format.md is broken once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from torch import nn

from attacks.forge import Pieces, digest
from tersor.codec import load, read_header, read_tensor, save, save_tensors, stream, verify
from tersor.codec.coders import encode_group
from tersor.errors import FileError
from tersor.forms import Affine, Bitmask, Codebook, Trellis
from tersor.surgery import hold, walk


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two 3-bit weights with biases: runs of codes, of bfloat16 scales and of floats."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()
    model[1].weight.data.uniform_()
    for site in walk(model):
        site.hold(Affine.encode(site.weight, bits=3))
    return save(model, tmp_path_factory.mktemp("file") / "net.tersor", example=torch.rand(2, 6))


@pytest.fixture
def pieces(path):
    return Pieces.of(path)


@pytest.fixture
def refused(tmp_path):
    def check(pieces, rule, *readers):
        forged = pieces.write(tmp_path / "forged.tersor")
        for reader in readers or (load, verify, read_header):
            with pytest.raises(FileError, match=rule):
                reader(forged)

    return check


def module(pieces, path):
    """The tensors of a module."""
    return next(row[2] for row in pieces.header["modules"] if row[0] == path)


def kind(pieces, name):
    """The row of the kind of a type that lies in a run."""
    return next(row for row in pieces.header["kinds"] if row[0] == name and row[1:] != ["00"])


def run(pieces, name):
    """The index of the run of a type."""
    return kind(pieces, name)[1]


# The tables of kinds and runs


def test_nothing_may_follow_the_last_chunk(pieces, refused):
    pieces.chunks.append(b"#!/bin/sh\n")
    refused(pieces, "a checksum belongs to no chunk")
    pieces.digests = list(map(digest, pieces.chunks[:-1]))
    refused(pieces, "its chunks end at byte")


def test_chunks_must_end_with_the_file(pieces, refused):
    pieces.header["runs"][-1][1][0] += 1
    refused(pieces, "its chunks end at byte")


def test_a_chunk_must_have_a_checksum(pieces, refused):
    pieces.digests = list(map(digest, pieces.chunks[:-1]))
    refused(pieces, "a chunk has no checksum")


def test_a_run_must_belong_to_a_tensor(pieces, refused):
    pieces.header["runs"].append(["raw", [0]])
    refused(pieces, "a run belongs to no tensor")


def test_a_kind_must_belong_to_a_tensor(pieces, refused):
    pieces.header["kinds"].append(["uint8", "00"])
    refused(pieces, "a kind belongs to no tensor")


def test_a_tensor_must_have_a_kind_and_lie_in_a_run(pieces, refused):
    module(pieces, "0")["bias"][0] = 99
    refused(pieces, '"0.bias" is of an unknown kind')
    pieces = pieces.copy()
    module(pieces, "0")["bias"][0] = run(pieces, "float32")
    kind(pieces, "float32")[1] = 99
    refused(pieces, "lies in run 99 of")


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        (0, "object", "of the type 'object'"),
        (0, "float16", "run . holds what are no codes"),
        (1, -1, "lies in no run"),
        (1, True, "lies in no run"),
        (1, "zz", "has no value"),
        (1, "0000", "has no value"),
        (2, 0, "has the center 0"),
        (2, True, "has the center True"),
        (2, 2**31, "has the center 2147483648"),
    ],
)
def test_each_field_of_a_kind_is_checked(pieces, refused, column, value, rule):
    row = kind(pieces, "int8")
    row[column : column + 1] = [value]
    refused(pieces, rule)


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        (0, "object", "run . is coded by 'object'"),
        (0, "floats", "run . is coded by 'floats', which does not hold torch.int8"),
        (0, 5, "is coded by 5"),
        (1, [], "has no lengths"),
        (1, [-1], "has no lengths"),
        (1, [1e3], "has no lengths"),
        (1, [1, 2], "has chunks of 0"),
        (1, [10**6], "its chunks end at byte"),
        (2, 5, "has chunks of 5"),
        (2, 0, "states what is understood"),
        (3, 2, "is no list of 2 to 4|has 2 changes"),
    ],
)
def test_each_field_of_a_run_is_checked(pieces, refused, column, value, rule):
    row = pieces.header["runs"][run(pieces, "int8")]
    row += [0] * (column - len(row))
    row[column : column + 1] = [value]
    refused(pieces, rule)


def test_several_chunks_hold_one_tensor_and_all_of_it(tmp_path, refused):
    net = nn.Linear(1100, 1000, bias=False)
    whole = Pieces.of(save(net, tmp_path / "net.tersor"))
    assert whole.header["runs"][0][2] == 500
    for unit in (499, 1000, 2**40):
        pieces = whole.copy()
        pieces.header["runs"][0][2] = unit
        refused(pieces, f"has 2 chunks of {unit} of 1000 rows")
    module(whole, "")["weight"] = [0, 500, 1100]
    module(whole, "")["width"] = [0, 500, 1100]
    refused(whole, "has several chunks and several tensors")


def test_a_chunk_has_no_more_elements_than_a_decoder_may_take_on(tmp_path, refused):
    pieces = Pieces.of(save(nn.Linear(4, 2, bias=False), tmp_path / "net.tersor"))
    module(pieces, "")["weight"] = [0, 4097, 4096]
    refused(pieces, "has 16781312 elements in a chunk")
    pieces.header["runs"][0][0] = "exponents"
    module(pieces, "")["weight"] = [0, 257, 256]
    refused(pieces, "has 65792 elements in a chunk")


def test_changes_need_a_base(pieces, refused):
    row = pieces.header["runs"][run(pieces, "int8")]
    row[2:] = [0, 1]
    refused(pieces, "does not say what its changes are from")
    pieces.preamble = {"required": 1}
    refused(pieces, "does not say what its changes are from")
    del row[2:]
    pieces.preamble = {}
    pieces.header["base"] = "00" * 16
    refused(pieces, "does not say what its changes are from")


@pytest.mark.parametrize("held", [{}, {"bias": torch.rand(2)}, {"weight": torch.rand(2, 4)}])
def test_changes_must_be_from_what_the_base_has(tmp_path, refused, held):
    weight = torch.arange(8.0).reshape(4, 2)
    base = save_tensors({"weight": weight}, tmp_path / "base.tersor")
    pieces = Pieces.of(save_tensors({"weight": weight}, tmp_path / "next.tersor", base=base))
    other = save_tensors(held, tmp_path / "other.tersor")
    pieces.header["base"] = read_header(other).identity
    readers = (load, verify, lambda *a, **k: list(stream(*a, **k)), read_one)
    refused(
        pieces,
        '"weight" is a change from what its base does not have',
        *(lambda path, read=read: read(path, base=other) for read in readers),
    )


def read_one(path, **options):
    return read_tensor(path, "weight", **options)


def test_codes_above_their_bits_are_refused(tmp_path, refused):
    net = nn.Linear(4, 2)
    form = Affine.encode(net.weight, bits=8)
    hold(net, "weight", form)
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    module(pieces, "")["weight"][2]["bits"] = 3
    refused(pieces, "codes that do not fit 3 bits", load, verify)


def test_codes_too_large_for_their_type_are_refused(pieces, refused):
    codes = np.full((9, 5), 200)
    at = run(pieces, "int8")
    pieces.chunks[at] = encode_group([codes], profile="small", kernels=[1])
    refused(pieces.settle(), "chunk . holds a code too large for its type", load, verify)


def test_only_codes_have_a_center(pieces, refused):
    kind(pieces, "float32").append(5)
    refused(pieces, "run . has a center")


def test_a_stream_that_goes_on_is_refused(pieces, refused):
    for chunk in range(len(pieces.chunks)):
        longer = pieces.copy()
        longer.chunks[chunk] += b"more bytes"
        refused(longer.settle(), "chunk . (goes on|is longer|holds|has|cannot)", load, verify)


def test_a_zstd_frame_must_hold_what_its_tensors_need(pieces, refused):
    index = run(pieces, "float32")
    pieces.header["runs"][index][0] = "zstd"
    for content in (zstandard.compress(bytes(17)), zstandard.compress(bytes(17))[:-1] + b"x"):
        pieces.chunks[index] = content
        refused(pieces.settle(), "chunk . holds 17 bytes where its tensors need", load, verify)
    pieces.chunks[index] = b"not zstd"
    refused(pieces.settle(), "cannot be decompressed|holds", load, verify)
    size = 4 * (5 + 5 + 3)
    pieces.chunks[index] = zstandard.compress(bytes(size)) + zstandard.compress(b"more")
    refused(pieces.settle(), "cannot be decompressed", load, verify)


# Tensors


def test_a_name_occurs_once(pieces, refused):
    pieces.header["modules"].append(pieces.header["modules"][0])
    refused(pieces, "a name of a tensor occurs twice")


@pytest.mark.parametrize("name", ["", ".", "a..b", ".bias", "bias.", "a\nb", "\x1b[2J", "x" * 2000])
def test_a_name_must_be_one_that_a_module_can_have(pieces, refused, name):
    tensors = module(pieces, "0")
    tensors[name] = tensors.pop("bias")
    refused(pieces, "is no name of a tensor")
    tensors["bias"] = tensors.pop(name)
    pieces.header["tied"] = {name: "0.bias"}
    refused(pieces, "is no name of a tensor")
    del pieces.header["tied"]
    pieces.header["modules"][0][0] = name
    if name:
        refused(pieces, "is no name of a module")


@pytest.mark.parametrize(
    ("place", "leaf"), [("", "forward"), ("0", "forward"), ("", "program"), ("_parameters", "x")]
)
def test_a_name_cannot_replace_part_of_a_module(pieces, refused, place, leaf):
    bias = module(pieces, "0").pop("bias")
    pieces.header["modules"].append([place, "Linear", {leaf: bias}])
    refused(pieces, "clashes|do not fit together", load, verify)


@pytest.mark.parametrize("first", ["0.basis", 5, None, ["0.bias"]])
def test_a_tied_name_must_name_a_tensor(pieces, refused, first):
    pieces.header["tied"] = {"9.bias": first}
    refused(pieces, "is tied to no name|is tied to one that is not there")


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ([-5], "the shape of"),
        ([5.0], "the shape of"),
        ([True], "the shape of"),
        (["5"], "the shape of"),
        ([1] * 17, "the shape of"),
        ([2**50], "has 1125899906842624 elements"),
        ([0, 2**50], "has 1125899906842624 elements"),
        ([2**39], "elements in a chunk"),
        ([0], "is empty and lies in a run"),
    ],
)
def test_each_size_of_a_shape_is_checked(pieces, refused, sizes, rule):
    module(pieces, "0")["bias"][1:] = sizes
    refused(pieces, rule)


def test_a_shape_must_agree_with_the_bytes(pieces, refused):
    module(pieces, "0")["bias"][1] = 6
    refused(pieces, "chunk . (holds|has|ends|goes|starts)", load, verify)


@pytest.mark.parametrize("value", [[], {}, None, 5, [None], [0.0], [True, 5], ["affine"]])
def test_a_tensor_must_be_described(pieces, refused, value):
    module(pieces, "0")["bias"] = value
    refused(pieces, 'is not described|the kind of "0.bias"|is no list of 4 or 5')


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        (0, "pickle", "stored as 'pickle', an unknown form"),
        (0, "codebook", "cannot be rebuilt"),
        (1, [5, 7], "cannot be rebuilt"),
        (1, [30], "cannot be rebuilt"),
        (2, {"bits": 3, "group_size": None}, "cannot be rebuilt"),
        (2, {"bits": 9, "group_size": None, "axis": 0}, "cannot be rebuilt"),
        (2, {"bits": 2, "group_size": None, "axis": 0}, "codes that do not fit 2 bits"),
        (2, {"bits": "3", "group_size": None, "axis": 0}, "cannot be rebuilt"),
        (2, {"bits": 3, "group_size": 0, "axis": 0}, "cannot be rebuilt"),
        (2, {"bits": 3, "group_size": 2, "axis": 0}, "cannot be rebuilt"),
        (2, {"bits": 3, "group_size": None, "axis": 7}, "cannot be rebuilt"),
        (2, {"bits": 3, "group_size": None, "axis": 0, "x": 1}, "are not those of"),
        (2, [], r"has \[\] for options or parts"),
        (3, [], r"has \[\] for options or parts"),
        (3, {}, "a run belongs|chunk|kind"),
        (4, "object", "is of the type 'object'"),
        (4, "float32", "is of the type 'float32'"),
        (4, 5, "is of the type 5"),
    ],
)
def test_each_field_of_a_form_is_checked(pieces, refused, field, value, rule):
    form = module(pieces, "0")["weight"]
    form[field : field + 1] = [value]
    refused(pieces, rule, load, verify)


@pytest.mark.parametrize("states", [3, 0, -1, 2**40, True, "8", None, [8]])
def test_a_trellis_of_impossible_states_is_refused(tmp_path, refused, states):
    net = nn.Linear(4, 2)
    hold(net, "weight", Trellis.encode(net.weight, step=0.1, states=8))
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    module(pieces, "")["weight"][2]["states"] = states
    refused(pieces, "cannot be rebuilt", load, verify)


@pytest.mark.parametrize("rows", [2, 5, 9])
def test_rows_that_the_parts_of_a_form_do_not_have_are_refused(tmp_path, refused, rows):
    net = nn.Linear(36, 6)
    hold(net, "weight", Affine.encode(net.weight, bits=4, group_size=12, symmetric=False))
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    module(pieces, "")["weight"][1][0] = rows
    refused(pieces, "cannot be rebuilt", lambda path: read_tensor(path, "weight", slice(0, 2)))


def test_forms_inside_forms_are_bounded(pieces, refused):
    inner = module(pieces, "0")["weight"]
    for _ in range(9):
        inner = [*inner[:3], {"codes": inner}]
    module(pieces, "0")["weight"] = inner
    refused(pieces, "more than 8 forms inside one another")


def test_a_code_past_the_codebook_is_refused(tmp_path, refused):
    net = nn.Linear(4, 2)
    hold(net, "weight", Codebook.encode(net.weight, torch.tensor([-1.0, 0.0, 1.0, 2.0])))
    net.weight_form.codes[0, 0] = 3
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    module(pieces, "")["weight"][3]["values"][1] = 3
    pieces.header["runs"][0][0], pieces.chunks[0] = "raw", bytes(4 * 5)
    refused(pieces.settle(), "a code points past the 3 values", verify)


def test_a_mask_that_disagrees_with_its_values_is_refused(tmp_path, refused):
    net = nn.Linear(4, 2, bias=False)
    hold(net, "weight", Bitmask.encode(torch.ones(2, 4)))
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    assert pieces.header["kinds"][0] == ["uint8", "01"]
    pieces.header["kinds"][0][1] = "00"
    refused(pieces, "as many as the mask has bits set", verify)
    pieces.header["kinds"][0][1] = "02"
    refused(pieces, "holds bits that are neither 0 nor 1", verify)


# The header as text


def test_only_canonical_json_is_read(pieces, refused):
    text = json.dumps(pieces.header, sort_keys=True, separators=(",", ":")).encode()
    for altered in (
        text.replace(b'"kinds":', b'"kinds": '),
        text.replace(b'{"kinds":', b'{"kinds":[],"kinds":'),
        text.replace(b',"modules"', b',"metrics":{"a":1e2},"modules"'),
        text[:1] + b" " * 4000 + text[1:],
    ):
        pieces.header_text = altered
        refused(pieces, "not written as tersor writes it")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a":NaN}',
        b'{"a":' + b"9" * 5000 + b"}",
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_broken_json_is_refused(pieces, refused, text):
    pieces.header_text = text
    refused(pieces, "cannot be read as JSON|nested too deeply|not written as tersor")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("writer", 1), ("modules", {}), ("kinds", None), ("runs", {}), ("recipe", {"a": 1})],
        *[("metrics", [1]), ("provenance", {}), ("constants", []), ("tied", [1]), ("base", 5)],
        *[("new", 0)],
    ],
)
def test_each_field_of_the_header_is_checked(pieces, refused, field, value):
    pieces.header[field] = value
    refused(pieces, f'"{field}" of the header|the fields of the header')


@pytest.mark.parametrize("text", [b"[]", b"0", b'"x"', b"null"])
def test_a_header_must_be_an_object(pieces, refused, text):
    pieces.header_text = text
    refused(pieces, "the header is no JSON object")


def test_a_recipe_must_be_steps(pieces, refused):
    pieces.header["recipe"] = [{"method": 5}]
    refused(pieces, "its recipe cannot be read: step 1", load, verify)


def test_a_program_with_an_operator_that_reads_files_is_refused(pieces, refused):
    pieces.program = pieces.program.replace(b"relu.default", b"from_file.default")
    refused(pieces, "from_file.default", load, verify)


def test_a_program_that_asks_for_other_tensors_is_refused(pieces, refused):
    tensors = module(pieces, "0")
    tensors["basis"] = tensors.pop("bias")
    refused(pieces, "its graph and its tensors do not fit together", load, verify)


# Sizes: nothing is allocated for what the file only claims to hold


def peak(reader, path):
    """Most memory that the process held more than before while `reader` refused `path`."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with pytest.raises(FileError):
        reader(path)
    return resident("VmHWM") - before


def resident(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def test_an_oversized_header_is_refused_unread(path, pieces, tmp_path):
    lengths = ({"stored": 2**32 - 1}, {"header": 2**32 - 1}, {"program": 2**31}, {"chunks": 2**31})
    for preamble in lengths:
        pieces.preamble = preamble
        forged = pieces.write(tmp_path / "forged.tersor")
        assert peak(load, forged) < 4 * 2**20
        assert peak(read_header, forged) < 4 * 2**20


def test_a_header_bomb_is_refused_unread(pieces, tmp_path):
    pieces.squeezed = zstandard.compress(bytes(2**28))
    forged = pieces.write(tmp_path / "forged.tersor")
    assert forged.stat().st_size < 2**15
    assert peak(load, forged) < 4 * 2**20


def test_a_header_of_too_many_values_is_refused_unparsed(pieces, tmp_path):
    pieces.header_text = b"[" + b"[]," * 5_000_000 + b"[]]"
    forged = pieces.write(tmp_path / "forged.tersor")
    with pytest.raises(FileError, match="more than 4194304 values"):
        load(forged)
    assert peak(load, forged) < 64 * 2**20


def test_a_bomb_in_a_chunk_is_refused_before_it_unfolds(pieces, tmp_path):
    index = run(pieces, "float32")
    pieces.header["runs"][index][0] = "zstd"
    pieces.chunks[index] = zstandard.compress(bytes(2**30))
    forged = pieces.settle().write(tmp_path / "forged.tersor")
    assert peak(load, forged) < 4 * 2**20


@pytest.mark.parametrize("coder", ["raw", "00000000"])
def test_ten_terabytes_of_zeros_are_refused(pieces, tmp_path, coder):
    pieces.header["kinds"].append(["float32", coder if coder != "raw" else 0])
    module(pieces, "0")["bias"] = [len(pieces.header["kinds"]) - 1, 5 * 2**37, 4]
    forged = pieces.write(tmp_path / "forged.tersor")
    assert peak(load, forged) < 4 * 2**20


def test_a_small_mask_cannot_stand_for_a_huge_weight(tmp_path):
    # 2**33 weights, of every 256 of them none stored.
    net = nn.Linear(4, 2)
    hold(net, "weight", Bitmask.encode(torch.eye(2, 4)))
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    pieces.header["kinds"] = [["uint8", ""], ["float32", ""]]
    pieces.header["modules"] = [["", "Linear", {"weight": None}]]
    del pieces.header["runs"]
    pieces.chunks = []
    module(pieces, "")["weight"] = [
        *("nofm", [2**17, 2**16], {"axis": 0, "m": 256}),
        {"places": [0, 2**17, 2**8, 0], "values": [1, 2**17, 2**8, 0]},
    ]
    forged = pieces.write(tmp_path / "forged.tersor")
    with pytest.raises(FileError, match="its weights unfold to 34359738368 bytes"):
        verify(forged)


def test_tiny_chunks_of_many_codes_take_no_more_than_stated(tmp_path):
    # Three chunks of 2**24 codes, all of them 0, in a few bytes each.
    net = nn.Module()
    net.register_buffer("ids", torch.eye(2, dtype=torch.int8))
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    net.ids = torch.zeros(3 * 2**12, 2**12, dtype=torch.int8)
    module(pieces, "")["ids"][1:] = net.ids.shape
    zeros = encode_group([np.zeros((2**12, 2**12), np.int32)], profile="small", kernels=[1])
    pieces.chunks = [zeros] * 3
    pieces.header["runs"] = [["small", [len(zeros)] * 3, 2**12]]
    forged = pieces.write(tmp_path / "forged.tersor")
    assert forged.stat().st_size < 16_000
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    load(forged, into=net, threads=4)
    assert resident("VmHWM") - before < 3 * 2**24 + 40 * 2**24 + 16 * 2**20
    assert not net.ids.any()


def test_nothing_in_a_file_can_run_code(pieces, tmp_path):
    """Loading opens no other file, starts no process and imports nothing by name from the file."""
    forged = pieces.write(tmp_path / "forged.tersor")
    watch = (
        "import sys, torch, tersor; from tersor.codec import load; load(sys.argv[1])\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append((event, args)))\n"
        "load(sys.argv[1])\n"
        "bad = [e for e in seen if e[0] in ('exec', 'compile', 'import', 'os.system', "
        "'subprocess.Popen', 'pickle.find_class', 'socket.connect')]\n"
        "opened = {str(a[0]) for e, a in seen if e == 'open'}\n"
        "assert not bad, bad\n"
        "assert opened == {sys.argv[1]}, opened\n"
    )
    subprocess.run([sys.executable, "-c", watch, forged], check=True)
