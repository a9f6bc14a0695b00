"""Bad input: one paragraph that names the thing and a way out, the right exit code, no damage."""

import errno
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from tersor.version import VERSION

DATA = "npz:data.npz"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("missing.py:net", "missing.py does not exist"),
        ("missing", "missing does not exist; a model is file.py:factory"),
        ("no.such.package:net", "no.such.package does not import: ModuleNotFoundError"),
        ("./missing", "./missing does not exist; a model is file.py:factory"),
        ("net.py", "net.py is a whole module; it has broken, empty, net"),
        ("net.py:nett", "net.py has no 'nett'; it has broken, empty, net"),
        ("net.py:no_network", "gave list, not a torch.nn.Module"),
        ("net.py:empty", "a ReLU without parameters"),
        ("net.py:broken", "was called and raised RuntimeError: weights; call it"),
        ("net.py:needs", "needs the arguments path"),
        ("bad.py:net", "bad.py does not import: SyntaxError"),
        ("leaves.py:net", "leaves.py does not import: SystemExit"),
        ("data.npz", "holds weights without the network"),
        ("folder", "has no config.json"),
        ("hub:", "cannot be fetched"),
    ],
)
def test_a_model_that_cannot_be_used(refused, folder, model, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "bad.py").write_text("def net(:\n")
    (folder / "leaves.py").write_text("raise SystemExit(0)\n")
    (folder / "folder").mkdir()
    text, code = refused("compress", model, "--out", "run")
    assert code == 3
    assert said in text


def test_weights_that_are_not_finite(tersor, folder):
    done = tersor("compress", "net.py:not_finite", "--out", "run")
    assert done.exit_code == 3
    assert '"0.weight" of shape (64, 16) holds NaN or infinity in 1 of' in done.stderr
    assert not (folder / "run" / "model.tersor").exists()


def _arrays(folder, **changed):
    arrays = dict(np.load(folder / "data.npz"))
    np.savez(folder / "bad.npz", **{**arrays, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"x_test": np.zeros((32, 16, 2), np.float32)}, "shape"),
        ({"x_test": np.zeros((0, 16), np.float32), "y_test": np.zeros(0, int)}, "no samples"),
        ({"x_test": np.full((32, 16), np.nan, np.float32)}, "NaN"),
        ({"y_test": np.zeros(31, int)}, "32 inputs but 31 targets"),
        ({"y_test": np.zeros(32, np.float32)}, "one integer per sample"),
        ({"y_test": np.full(32, 7)}, "labels reach 7"),
        ({"x_test": np.array(["a"] * 32)}, "no numbers"),
    ],
)
def test_data_that_cannot_be_used(refused, folder, changed, said):
    _arrays(folder, **changed)
    text, code = refused("profile", "net.py:net", "--data", "npz:bad.npz")
    assert code == 4
    assert said in text


@pytest.mark.parametrize(
    ("spec", "said", "code"),
    [
        ("npz:none.npz", "none.npz does not exist", 4),
        ("data.npz", "needs its kind in front: npz:data.npz", 4),
        ("npz:", "names no file", 4),
        ("net.py:net", "gave Sequential, not a tersor.Task", 4),
        ("npz:net.py", "cannot be read as .npz", 4),
        ("npz:data.npz?colour=1", "has no option 'colour'", 2),
        ("npz:data.npz?colour", "is not option=value", 2),
    ],
)
def test_a_spec_that_names_no_data(refused, spec, said, code):
    text, found = refused("profile", "net.py:net", "--data", spec)
    assert found == code
    assert said in text


@pytest.mark.parametrize(
    ("budget", "said", "code"),
    [
        ("size=2x", "allows more than the original", 5),
        ("size=0.2x, size=0.3x", "size is given twice", 5),
        ("weight=3", "the budget knows no 'weight'", 5),
        ("size=small", "is not a number", 5),
        ("drop=0.5", "needs data to measure it on", 4),
    ],
)
def test_a_budget_that_cannot_be(refused, budget, said, code):
    text, found = refused("compress", "net.py:net", "--budget", budget, "--out", "run")
    assert found == code
    assert said in text


def test_a_budget_out_of_reach_says_how_near_it_came(tersor):
    done = tersor("compress", "net.py:net", "--data", DATA, "--budget", "size=0.01x", "--out", "r")
    assert done.exit_code == 5
    assert done.stderr.count("\n") <= 2
    assert "size" in done.stderr


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"method": "quantize.rnt"}], "did you mean 'quantize.rtn'"),
        ([{"method": "quantize.rtn", "options": {"bit": 4}}], "no option 'bit'"),
        (
            [
                {"method": "quantize.rtn", "options": {"bits": 4}},
                {"method": "prune.magnitude", "options": {"sparsity": 0.5}},
            ],
            "prune.magnitude",
        ),
        ({"method": "quantize.rtn"}, "a recipe is a list of steps"),
    ],
)
def test_a_recipe_that_cannot_be_run(tersor, folder, steps, said):
    (folder / "recipe.json").write_text(json.dumps(steps))
    done = tersor("compress", "net.py:net", "--recipe", "recipe.json", "--out", "run")
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (folder / "run" / "model.tersor").exists()


def test_a_job_that_is_not_there(refused):
    text, code = refused("compress", "none.yaml")
    assert code == 2
    assert text.startswith("none.yaml does not exist; check the path, which starts from ")


def test_warnings_of_torch_itself_are_for_debugging(tersor, monkeypatch):
    def warns(*_, **__):
        warnings.warn("`LeafSpec` is deprecated", FutureWarning, stacklevel=1)
        return {}

    monkeypatch.setattr("tersor.codec.read_header", warns)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tersor("inspect", "net.py")
        assert not seen
        tersor("inspect", "net.py", "--debug")
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: net.py:net\ncolour: 1\n", "'colour' is no field of a job"),
        ("data: npz:data.npz\n", "'model' is missing"),
        ("model: net.py:net\nseed: many\n", "'seed' input should be a valid integer, not 'many'"),
        ("- 1\n", "holds no fields"),
        ("model: [\n", "cannot be read as YAML"),
        ("!!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
)
def test_a_job_that_cannot_be_read(refused, folder, text, said):
    (folder / "job.yaml").write_text(text)
    found, code = refused("compress", "job.yaml")
    assert code == 2
    assert said in found


def _harmed(folder, file, harm):
    data = bytearray(file.read_bytes())
    if harm == "truncated":
        data = data[: len(data) // 2]
    elif harm == "flipped":
        data[-20] ^= 1
    elif harm == "text":
        data = b"hello"
    elif harm == "empty":
        data = b""
    (folder / "bad.tersor").write_bytes(data)


@pytest.mark.parametrize("verb", ["verify", "inspect", "profile"])
@pytest.mark.parametrize("harm", ["truncated", "flipped", "text", "empty"])
def test_a_damaged_file(refused, tersor, folder, file, harm, verb):
    _harmed(folder, file, harm)
    if verb == "inspect" and harm == "flipped":
        # Only the header is read, and the damage is in a tensor.
        assert tersor(verb, "bad.tersor").exit_code == 0
        return
    text, code = refused(verb, "bad.tersor")
    assert code == 6
    assert "bad.tersor" in text


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_a_file_that_is_not_there(refused, verb):
    text, code = refused(verb, "none.tersor")
    assert code == 6
    assert "none.tersor" in text


def test_a_report_that_is_none(refused, folder):
    (folder / "report.json").write_text('{"a": 1}')
    assert refused("report", "report.json")[1] == 6
    assert refused("report", "no_folder")[1] == 6
    odd = {"model": {"name": "x"}, "before": {}, "after": {}, "layers": [3]}
    (folder / "report.json").write_text(json.dumps(odd))
    text, code = refused("report", "report.json")
    assert code == 6
    assert "is not a report" in text


def test_a_folder_that_cannot_be_written(refused, folder):
    (folder / "run").write_text("a file")
    text, code = refused("compress", "net.py:net", "--budget", "size=0.9x", "--out", "run")
    assert code == 8
    assert "run" in text


def test_a_folder_with_other_files_is_left_alone(refused, folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("keep")
    text, code = refused("compress", "net.py:net", "--budget", "size=0.9x", "--out", "mine")
    assert code == 2
    assert "holds other files" in text


def test_a_full_disk_is_named(refused, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tersor.plan.compress", full)
    text, code = refused("compress", "net.py:net", "--out", "run")
    assert code == 8
    assert "No space left on device; free space" in text


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(refused, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tersor.plan.compress", stopped)
    text, code = refused("compress", "net.py:net", "--out", "run")
    assert code == 130
    assert "kept in run: run the same command again" in text


def test_ctrl_c_elsewhere_says_that_nothing_was_written(refused, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tersor.measure.size", stopped)
    assert refused("profile", "net.py:net") == ("stopped; nothing was written", 130)


def test_what_nobody_expected_is_one_paragraph_too(refused, tersor, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("tersor.measure.size", broken)
    text, code = refused("profile", "net.py:net")
    assert code == 70
    assert text == (
        "something that tersor did not expect: ZeroDivisionError: first line second line; "
        "--debug shows where"
    )
    assert "Traceback" in tersor("profile", "net.py:net", "--debug").stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("profile", "missing.py:net"), 3),
        (("verify", "none.tersor"), 6),
        (("methods", "quantize.none"), 2),
        (("profile", "--none"), 2),
        (("profile",), 2),
        (("none",), 2),
    ],
)
def test_with_json_an_error_is_json_too(tersor, arguments, code):
    done = tersor(*arguments, "--json")
    assert done.exit_code == code
    found = json.loads(done.stdout)
    assert found["exit_code"] == code
    assert found["error"]
    assert "\n" not in found["error"]


def test_prints_of_the_model_do_not_get_into_the_json(tersor):
    done = tersor("profile", "net.py:net", "--json")
    assert json.loads(done.stdout)["model"]["name"] == "net"
    assert "importing the network" in done.stderr


def test_an_unknown_verb_is_a_usage_error(tersor):
    done = tersor("squeeze", "net.py:net")
    assert done.exit_code == 2
    assert "squeeze" in done.stderr


def test_python_m_tersor_knows_its_version_and_help_does_not_load_torch():
    code = (
        "import sys; from tersor.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "tersor", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"tersor {VERSION}\n"


def test_shells_can_complete_the_verbs():
    env = {
        **os.environ,
        "_TERSOR_COMPLETE": "complete_bash",
        "COMP_WORDS": "tersor com",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tersor"], env=env, capture_output=True, text=True, check=False
    )
    assert set(done.stdout.split()) == {"compare", "compress"}


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "tersor", "quantize", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.close()
        said = child.stderr.read()
    assert said == b""
