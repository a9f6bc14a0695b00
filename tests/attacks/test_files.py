"""Altered files by the thousand through the loader, and that what it must not do is noticed."""

import io
import sys

import pytest

import fuzz_files
import fuzz_judge
from attacks.forge import Pieces
from fuzz_judge import Finding, Judge
from fuzz_mutants import Mutant, Mutants
from fuzz_seeds import read_seeds, write_seeds
from tersor.codec import load
from tersor.forms import KINDS

COUNT = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    write_seeds(folder)
    return folder


@pytest.fixture(scope="module")
def seeds(folder):
    return read_seeds(folder)


def whole(seeds):
    return Mutant(seeds[-1].content, seeds[-1].name, "nothing")


def test_altered_files_load_or_are_refused(seeds):
    mutants, judge = Mutants(seeds, seed=1), Judge(seeds)
    found = [judge.outcome(mutants.make(number), number) for number in range(COUNT)]
    assert found.count("refused") > COUNT // 2
    # Else checksums or something else at the door would hide all that lies behind it.
    assert found.count("loaded") > COUNT // 100
    assert found.count("read") > COUNT // 100


def test_seeds_load_and_have_every_coder_and_form(seeds):
    for seed in seeds:
        if seed.name != "no-graph":
            load(io.BytesIO(seed.content), base=seed.base and io.BytesIO(seed.base))
    headers = [Pieces.parse(seed.content).header for seed in seeds]
    coders = {run[0] for header in headers for run in header["runs"]}
    assert coders >= {"fast", "small", "max", "floats", "exponents", "planes", "raw"}
    texts = " ".join(map(str, headers))
    for form in KINDS:
        assert f"'{form}'" in texts


def test_a_mutant_depends_on_its_number_alone(seeds):
    forth, back = Mutants(seeds, seed=2), Mutants(seeds, seed=2)
    there = [forth.make(number) for number in range(300)]
    assert there == [back.make(number) for number in reversed(range(300))][::-1]
    assert there != [Mutants(seeds, seed=3).make(number) for number in range(300)]


def test_most_mutants_pass_the_checksums(seeds):
    mutants = Mutants(seeds, seed=4)
    says = []
    for number in range(200):
        mutant = mutants.make(number)
        if mutant.how not in ("damaged", "other base"):
            try:
                load(io.BytesIO(mutant.content), base=mutant.base and io.BytesIO(mutant.base))
            except fuzz_judge.FileError as error:
                says.append(str(error))
    assert sum("checksum" in said for said in says) < len(says) // 10


@pytest.mark.parametrize("error", [KeyError("runs"), MemoryError(), RecursionError(), SystemExit()])
def test_another_error_than_a_refusal_is_a_finding(seeds, monkeypatch, error):
    def raising(*_, **__):
        raise error

    for name in ("load", "read_tensor"):
        monkeypatch.setattr(fuzz_judge, name, raising)
    for number in range(5):
        with pytest.raises(Finding, match=f"raised {type(error).__name__}"):
            Judge(seeds).outcome(whole(seeds), number)


def test_time_above_the_limit_is_a_finding(seeds, monkeypatch):
    monkeypatch.setattr(fuzz_judge, "SECONDS", 0.0)
    monkeypatch.setattr(fuzz_judge, "SECONDS_FOR_ELEMENT", 0.0)
    with pytest.raises(Finding, match="of the processor"):
        Judge(seeds).outcome(whole(seeds), 0)


def test_memory_above_the_stated_bound_is_a_finding(seeds, monkeypatch):
    if not fuzz_judge._forget_peak():
        pytest.skip("this system does not let a process measure its peak anew")
    judge, taken = Judge(seeds), []

    def wasting(*_, **__):
        taken.append(bytearray(b"x") * (400 * 2**20))

    for name in ("load", "read_tensor"):
        monkeypatch.setattr(fuzz_judge, name, wasting)
    monkeypatch.setattr(fuzz_judge, "ALWAYS", 0)
    with pytest.raises(Finding, match=r"took \d{3} MiB, above the 0 MiB of docs/format.md"):
        judge.outcome(whole(seeds), 0)


def run(monkeypatch, tmp_path, capfd, *options):
    monkeypatch.setattr(fuzz_files, "FINDINGS", tmp_path / "findings")
    monkeypatch.setattr(sys, "argv", ["fuzz_files.py", *options])
    status = fuzz_files.main()
    return status, capfd.readouterr()


def test_processes_share_the_mutants_out(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(fuzz_files, "sanitized", lambda: None)
    status, said = run(monkeypatch, tmp_path, capfd, "--files", "60", "--processes", "2")
    assert status == 0
    assert said.out.startswith("60 files in ")
    assert ", 0 finding" in said.out


def test_findings_are_kept_and_fail_the_run(monkeypatch, tmp_path, capfd, folder):
    options = ("--files", "3", "--progress", str(tmp_path / "progress"), "--folder", str(folder))
    monkeypatch.setattr(fuzz_judge, "load", lambda *_, **__: {}["runs"])
    monkeypatch.setattr(fuzz_judge, "read_tensor", lambda *_, **__: {}["runs"])
    # Within this process, where what was planted is seen.
    monkeypatch.setattr(fuzz_files, "sanitized", lambda: None)
    monkeypatch.setattr(fuzz_files, "MOST_SPACE", None)
    run(monkeypatch, tmp_path, capfd, *options, "--first", "0", "--step", "1")
    assert fuzz_files.Progress(tmp_path / "progress").counts == [0, 0, 0, 0, 0, 3]
    kept = sorted((tmp_path / "findings").glob("0-*.tersor"))
    assert kept[1].read_bytes() == Mutants(read_seeds(folder), 0).make(1).content
    assert "raised KeyError('runs')" in kept[1].with_suffix(".txt").read_text()


CRASHING = """
import argparse, os, sys
sys.path[:0] = [{tools!r}, {tests!r}]
from pathlib import Path
from fuzz_files import Progress
parser = argparse.ArgumentParser()
parser.add_argument("--progress", type=Path)
parser.add_argument("--first", type=int)
options = parser.parse_known_args()[0]
progress = Progress(options.progress)
progress.begin(options.first, b"number %d" % options.first)
if options.first < 4:
    os.abort()
progress.count(0)
"""


def test_a_crash_is_kept_and_the_rest_is_read(monkeypatch, tmp_path, capfd):
    script = tmp_path / "crashing.py"
    folders = {name: str(fuzz_files.ROOT / name) for name in ("tools", "tests")}
    script.write_text(CRASHING.format(**folders))
    monkeypatch.setattr(fuzz_files, "__file__", str(script))
    monkeypatch.setattr(fuzz_files, "sanitized", lambda: None)
    status, said = run(monkeypatch, tmp_path, capfd, "--files", "9", "--processes", "2")
    assert status == 1
    assert ", 4 finding" in said.out
    assert "mutant 3 of seed 0 ended the process with -6" in said.err
    kept = sorted((tmp_path / "findings").glob("0-*.tersor"))
    assert [path.read_bytes() for path in kept] == [b"number %d" % n for n in range(4)]
