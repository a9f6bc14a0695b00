"""A tiny network, data for it, and the command line run in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tersor.cli import app

NETWORK = """
import torch
from torch import nn

print("importing the network")

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))

def with_example():
    return net(), torch.zeros(2, 16)

def no_network():
    return [1, 2]

def empty():
    return nn.ReLU()

def broken():
    raise RuntimeError("weights\\nare missing")

def needs(path):
    return net()

def not_finite():
    found = net()
    found[0].weight.data[3, 4] = float("nan")
    return found
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with net.py and data.npz in it."""
    (tmp_path / "net.py").write_text(NETWORK)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(96, 16)).astype(np.float32)
    labels = inputs[:, :3].argmax(1)
    np.savez(
        tmp_path / "data.npz",
        x_test=inputs[:32],
        y_test=labels[:32],
        x_train=inputs[32:],
        y_train=labels[32:],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def tersor(folder: Path) -> Callable[..., Result]:
    """`tersor(verb, ...)` in that folder."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def answer(tersor: Callable[..., Result]) -> Callable[..., dict]:
    """The JSON that a verb prints, after it went well."""

    def run(*arguments: object) -> dict:
        done = tersor(*arguments, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


@pytest.fixture
def refused(tersor: Callable[..., Result]) -> Callable[..., tuple[str, int]]:
    """The paragraph and the exit code of a verb that must refuse; the folder stays as it was."""

    def run(*arguments: object) -> tuple[str, int]:
        before = _contents(Path.cwd())
        done = tersor(*arguments)
        assert _contents(Path.cwd()) == before
        assert done.exit_code != 0
        assert "Traceback" not in done.output
        text = done.stderr.removeprefix("importing the network\n").strip()
        assert text.startswith("error: ")
        assert "\n" not in text
        return text.removeprefix("error: "), done.exit_code

    return run


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture
def file(folder: Path) -> Path:
    """A compressed network in a .tersor file."""
    import torch
    from torch import nn

    from tersor.codec import save
    from tersor.methods import run

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    small = run(model, [{"method": "quantize.rtn", "options": {"bits": 8}}])
    return save(small, folder / "small.tersor", example=torch.zeros(2, 16))
