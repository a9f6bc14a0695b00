"""Files written once: read for ever as what they held, and written the same until a new version."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import make_golden
from attacks.forge import PREAMBLE, VOCABULARY, Pieces
from tersor.codec import load, read_header, save, text, verify
from tersor.codec.container import FILE_VERSION

FILES = sorted(make_golden.GOLDEN.glob("*.tersor"))
BASES = {"changes": "max", "trained": "floats"}


def base_of(path):
    base = BASES.get(path.stem)
    return path.with_name(f"{base}.tersor") if base else None


def test_there_are_golden_files_of_this_version():
    names = {"fast", "small", "max", "trellis", "sparse", "floats", "changes", "chunks", "trained"}
    assert {path.stem for path in FILES} == names
    versions = {PREAMBLE.unpack(path.read_bytes()[:40])[1] for path in FILES}
    # A new version gets files of its own, and readers keep these.
    assert versions == {FILE_VERSION}


def test_together_they_have_every_coder():
    runs = [run for path in FILES for run in read_header(path).runs]
    # zstandard may code differently in its next version.
    assert {run.coder for run in runs} == {
        *("fast", "small", "max", "floats", "exponents", "planes", "raw")
    }
    assert any(run.changed for run in runs)
    assert any(run.unit for run in runs)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_file_gives_its_values(path):
    verify(path, base=base_of(path))
    model = load(path, base=base_of(path))
    state = model.state_dict()
    for name, wanted in load_file(path.with_suffix(".safetensors")).items():
        layer, _, leaf = name.rpartition(".")
        found = state[name] if name in state else getattr(model.get_submodule(layer), leaf)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_writer_changes_no_byte_without_a_new_version(tmp_path, path):
    model = load(path, base=base_of(path))
    profile = make_golden.profile_of(path.stem)
    with make_golden.settings(path.stem):
        again = save(model, tmp_path / path.name, profile=profile, base=base_of(path))
    wanted, found = Pieces.of(path), Pieces.of(again)
    wanted.header["writer"] = found.header["writer"]
    assert found == wanted
    assert found.write(tmp_path / "found").read_bytes() == again.read_bytes()


def test_the_vocabulary_is_part_of_the_version():
    words = Path(text.__file__).with_name("vocabulary.txt").read_bytes()
    assert VOCABULARY.as_bytes() == words
    assert hashlib.sha256(words).hexdigest()[:16] == "ae8cc6e9569a22a8"


WITHOUT = """
import sys, warnings
import make_golden
from tersor.codec import coders, load, save
assert coders.native.native() is None
for name in sys.argv[2:]:
    model = load(make_golden.GOLDEN / f"{name}.tersor")
    with make_golden.settings(name):
        save(model, f"{sys.argv[1]}/{name}.tersor", profile=make_golden.profile_of(name))
"""


def test_readable_coders_read_and_write_the_same_bytes(tmp_path):
    names = ["fast", "small", "max", "trellis", "floats", "sparse"]
    tools = str(Path(make_golden.__file__).parent)
    environment = os.environ | {"TERSOR_NO_NATIVE": "1", "PYTHONPATH": tools}
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), *names]
    subprocess.run(command, check=True, env=environment)
    for name in names:
        found = Pieces.of(tmp_path / f"{name}.tersor")
        assert found == Pieces.of(make_golden.GOLDEN / f"{name}.tersor")
