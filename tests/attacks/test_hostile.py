"""Files made to harm, with right checksums: each rule of docs/format.md is broken once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from torch import nn

from attacks.forge import Pieces
from tersor.codec import load, read_header, save, verify
from tersor.errors import FileError
from tersor.forms import Affine, Bitmask, Codebook
from tersor.surgery import hold, walk


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two 3-bit weights with biases: chunks of codes, of bfloat16 scales and of floats."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()
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


def entry(pieces, name):
    return next(e for e in pieces.header["tensors"] if name in e[0])


def chunk(pieces, name):
    return next(i for i, row in enumerate(pieces.header["chunks"]) if row[0] == name)


# The table of chunks


def test_chunks_must_not_overlap(pieces, refused):
    pieces.header["chunks"][1][2] = 0
    refused(pieces, "chunk 1 begins at byte .* inside what ends at", load, verify)


def test_chunks_must_leave_no_holes(pieces, refused):
    pieces.chunks[0] = pieces.chunks[0].ljust(200, b"x")
    pieces.header["chunks"][1][2] += 200 - sum(pieces.header["chunks"][0][3])
    pieces.header["chunks"][1][2] //= 8
    pieces.header["chunks"][1][2] *= 8
    refused(pieces, "lies a hole", load, verify)


def test_bytes_between_chunks_must_be_zero(pieces, refused):
    sizes = [sum(row[3]) for row in pieces.header["chunks"]]
    first = next(i for i, size in enumerate(sizes[:-1]) if size % 8)
    pieces.chunks[first] += b"x"
    refused(pieces, "the padding before chunk .* is not zero", load, verify)


def test_nothing_may_follow_the_last_chunk(pieces, refused):
    pieces.chunks.append(b"#!/bin/sh\n")
    refused(pieces, "bytes after its last chunk belong to nothing", load, verify)


def test_chunks_must_end_inside_the_file(pieces, refused):
    last = pieces.header["chunks"][-1]
    last[2] += 8
    pieces.chunks[-1] = bytes(8) + pieces.chunks[-1]
    pieces.preamble = {}
    refused(pieces, "lies a hole", load, verify)
    last[2] -= 8
    pieces.chunks[-1] = pieces.chunks[-1][8:-1]
    refused(pieces, "behind the last one", load, verify)


def test_a_chunk_must_belong_to_a_tensor(pieces, refused):
    pieces.header["chunks"].append(["uint8", 8, 0, [0], ""])
    refused(pieces, "a chunk belongs to no tensor")


def test_a_tensor_must_lie_in_a_chunk(pieces, refused):
    entry(pieces, "0.bias")[2][1] = 99
    refused(pieces, "a tensor lies in chunk 99 of")


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        (0, "object", "unknown type 'object'"),
        (1, 9, "has 9 bits per int8"),
        (1, 0, "has 0 bits per int8"),
        (1, True, "has True bits"),
        (2, -8, "has no place"),
        (3, [], "has no place"),
        (3, [-1], "has no place"),
        (3, [1e3], "has no place"),
        (3, [10**6], "is longer than its 45 elements need"),
        (4, 5, "has no checksum"),
        (4, "00" * 16, "the checksum of chunk . is wrong"),
    ],
)
def test_each_field_of_a_chunk_is_checked(pieces, refused, column, value, rule):
    pieces.header["chunks"][chunk(pieces, "int8")][column] = value
    refused(pieces, rule, load, verify)


def test_codes_above_their_bits_are_refused(pieces, refused):
    # Two 3-bit codes fill 6 bits of a byte.
    index = chunk(pieces, "int8")
    pieces.chunks[index] = b"\xff" * (-(-45 // 2))
    refused(pieces.settle(), "codes that do not fit 3 bits", load, verify)


def test_codes_after_the_last_one_are_refused(pieces, refused):
    index = chunk(pieces, "int8")
    pieces.chunks[index] = b"\x3f" * (-(-45 // 2))
    refused(pieces.settle(), "has codes after its last one", load, verify)


def test_a_zstd_frame_must_hold_what_its_tensors_need(pieces, refused):
    index = chunk(pieces, "float32")
    pieces.chunks[index] = zstandard.compress(bytes(17))
    refused(pieces.settle(), "holds 17 bytes where its tensors need", load, verify)
    pieces.chunks[index] = zstandard.compress(bytes(17))[:-1] + b"x"
    refused(pieces.settle(), "chunk . holds 17 bytes", load, verify)


def test_garbage_instead_of_zstd_is_refused(pieces, refused):
    pieces.chunks[chunk(pieces, "float32")] = b"not zstd"
    refused(pieces.settle(), "cannot be decompressed|holds", load, verify)


def test_a_second_frame_behind_the_first_is_refused(pieces, refused):
    index = chunk(pieces, "float32")
    size = 4 * 28
    assert sum(len(c) for c in [pieces.chunks[index]]) <= size
    pieces.chunks[index] = zstandard.compress(bytes(size)) + zstandard.compress(b"more")
    refused(pieces.settle(), "cannot be decompressed", load, verify)


# Tensors


def test_a_name_occurs_once(pieces, refused):
    tensors = pieces.header["tensors"]
    tensors[1][0] = tensors[0][0]
    refused(pieces, "a name of a tensor occurs twice")


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", ".bias", "bias.", 5, None, "a\nb", "\x1b[2J", "x" * 2000]
)
def test_a_name_must_be_one_that_a_module_can_have(pieces, refused, name):
    entry(pieces, "0.bias")[0][0] = name
    refused(pieces, "is no name of a tensor")


@pytest.mark.parametrize("name", ["forward", "0.forward", "__class__", "program", "_parameters.x"])
def test_a_name_cannot_replace_part_of_a_module(pieces, refused, name):
    entry(pieces, "0.bias")[0][0] = name
    refused(pieces, "clashes|do not fit together", load, verify)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ([-5], "the shape of"),
        ([5.0], "the shape of"),
        ([True], "the shape of"),
        ("5", "the shape of"),
        ([1] * 17, "the shape of"),
        ([2**50], "has 1125899906842624 elements"),
        ([0, 2**50], "has 1125899906842624 elements"),
        ([2**39], "above the limit"),
    ],
)
def test_each_size_of_a_shape_is_checked(pieces, refused, shape, rule):
    entry(pieces, "0.bias")[2][0] = shape
    refused(pieces, rule)


def test_a_shape_must_agree_with_the_bytes(pieces, refused):
    entry(pieces, "0.bias")[2][0] = [6]
    refused(pieces, "holds .* bytes where its tensors need|streams", load, verify)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("form", "pickle", "stored as 'pickle', an unknown form"),
        ("form", "codebook", "cannot be rebuilt"),
        ("dtype", "object", "unknown type"),
        ("shape", [5, 7], "cannot be rebuilt"),
        ("shape", [30], "cannot be rebuilt"),
        ("config", {"bits": 3, "group_size": None}, "cannot be rebuilt"),
        ("config", {"bits": 9, "group_size": None, "axis": 0}, "cannot be rebuilt"),
        ("config", {"bits": 4, "group_size": None, "axis": 0}, "coded at 3 bits"),
        ("config", {"bits": "3", "group_size": None, "axis": 0}, "cannot be rebuilt"),
        ("config", {"bits": 3, "group_size": 0, "axis": 0}, "cannot be rebuilt"),
        ("config", {"bits": 3, "group_size": 2, "axis": 0}, "cannot be rebuilt"),
        ("config", {"bits": 3, "group_size": None, "axis": 7}, "cannot be rebuilt"),
        ("config", {"bits": 3, "group_size": None, "axis": 0, "x": 1}, "are not those of"),
        ("config", [], '"config" of .* is no dict'),
        ("parts", [], "longer than its 15 elements need"),
        ("parts", [["codes", [[5, 6], 1]]], "holds|chunk"),
    ],
)
def test_each_field_of_a_form_is_checked(pieces, refused, field, value, rule):
    entry(pieces, "0.weight")[2][field] = value
    refused(pieces, rule, load, verify)


def test_forms_inside_forms_are_bounded(pieces, refused):
    inner = entry(pieces, "0.weight")[2]
    for _ in range(9):
        inner = {**inner, "parts": [["codes", inner]]}
    entry(pieces, "0.weight")[2] = inner
    refused(pieces, "more than 8 forms inside one another")


def test_a_part_occurs_once(pieces, refused):
    parts = entry(pieces, "0.weight")[2]["parts"]
    parts.append(parts[0])
    refused(pieces, "occurs twice")


def test_a_code_past_the_codebook_is_refused(tmp_path, refused):
    net = nn.Linear(4, 2)
    hold(net, "weight", Codebook.encode(net.weight, torch.tensor([-1.0, 0.0, 1.0])))
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    pieces.chunks[chunk(pieces, "uint8")] = b"\xff\xff"
    refused(pieces.settle(), "a code points past the 3 values", verify)


def test_a_mask_that_disagrees_with_its_values_is_refused(tmp_path, refused):
    net = nn.Linear(4, 2)
    hold(net, "weight", Bitmask.encode(torch.eye(2, 4)))
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    pieces.chunks[chunk(pieces, "uint8")] = b"\xff"
    refused(pieces.settle(), "as many as the mask has bits set", verify)


# The header as text


def test_only_canonical_json_is_read(pieces, refused):
    text = json.dumps(pieces.header, sort_keys=True, separators=(",", ":")).encode()
    for altered in (
        text.replace(b'"chunks":', b'"chunks": '),
        text.replace(b'{"chunks":', b'{"chunks":[],"chunks":'),
        text.replace(b'"metrics":{}', b'"metrics":{"a":1e2}'),
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
    [("writer", 1), ("tensors", {}), ("chunks", None), ("recipe", {}), ("metrics", []), ("new", 0)],
)
def test_each_field_of_the_header_is_checked(pieces, refused, field, value):
    pieces.header[field] = value
    refused(pieces, f'"{field}" of the header|the fields of the header')


def test_a_recipe_must_be_steps(pieces, refused):
    pieces.header["recipe"] = [{"method": 5}]
    refused(pieces, "its recipe cannot be read: step 1", load, verify)


def test_a_program_with_an_operator_that_reads_files_is_refused(pieces, refused):
    pieces.program = pieces.program.replace(b"relu.default", b"from_file.default")
    refused(pieces, "from_file.default", load, verify)


def test_a_program_that_asks_for_other_tensors_is_refused(pieces, refused):
    entry(pieces, "0.bias")[0][0] = "0.basis"
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
    for preamble in ({"stored": 2**40}, {"header": 2**32 - 1}, {"program": 2**31}):
        pieces.preamble = preamble
        forged = pieces.write(tmp_path / "forged.tersor")
        assert peak(load, forged) < 4 * 2**20
        assert peak(read_header, forged) < 4 * 2**20


def test_a_header_bomb_is_refused_unread(pieces, tmp_path):
    pieces.section = zstandard.compress(bytes(2**28))
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
    index = chunk(pieces, "float32")
    pieces.chunks[index] = zstandard.compress(bytes(2**30))
    forged = pieces.settle().write(tmp_path / "forged.tersor")
    assert peak(load, forged) < 4 * 2**20


def test_ten_terabytes_of_zeros_are_refused(pieces, tmp_path):
    entry(pieces, "0.bias")[2][0] = [10 * 2**38]
    forged = pieces.write(tmp_path / "forged.tersor")
    assert peak(load, forged) < 4 * 2**20


def test_a_small_mask_cannot_stand_for_a_huge_weight(tmp_path):
    # 2**33 weights, of every 256 of them none stored.
    net = nn.Linear(4, 2)
    hold(net, "weight", Bitmask.encode(torch.eye(2, 4)))
    pieces = Pieces.of(save(net, tmp_path / "net.tersor"))
    huge = entry(pieces, "weight")[2]
    huge.update(form="nofm", shape=[2**17, 2**16], config={"axis": 0, "m": 256})
    huge["parts"] = [["values", [[2**17, 2**8, 0], 0]], ["places", [[2**17, 2**8, 0], 1]]]
    for row in pieces.header["chunks"][:2]:
        row[3] = [0]
    forged = pieces.write(tmp_path / "forged.tersor")
    with pytest.raises(FileError, match="its weights unfold to 34359738368 bytes"):
        verify(forged)


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
