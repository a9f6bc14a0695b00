"""A training that is stopped goes on as if it had not been."""

import copy
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tersor.errors import ModelError, OptionError, OutputError
from tersor.methods import run
from tersor.methods.distill.decoupled import decoupled
from tersor.task import classification
from tersor.train import Labels, TrainingLog, fit
from tersor.train.checkpoint import read, store
from train.test_loop import blobs


class Stop(Exception):
    pass


def net() -> nn.Module:
    torch.manual_seed(0)
    parts = (nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    return nn.Sequential(*parts)


def train(
    folder=None, *, stop=None, optimizer="Adam", width=16, minutes=0.0, epochs=3, seed=0, rate=0.02,
    failure=None, judged=True, made=None, masked=False,
):  # fmt: skip
    """12 steps in an epoch; `minutes=0` writes a checkpoint behind each of them."""
    model = net().train() if width == 16 else nn.Linear(2, 3)
    if made is not None:
        made.append(model)
    if masked:
        model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    torch.manual_seed(1)
    lessons, seen = Labels(classification(train=blobs(), batch_size=8)), []

    def loss(lesson):
        seen.append(None)
        if len(seen) == stop and failure is None:
            raise Stop
        if len(seen) == stop:
            return failure * lessons.loss(model(lesson.inputs), lesson)
        return lessons.loss(model(lesson.inputs), lesson)

    def judge():
        with torch.no_grad():
            x, y = blobs(seed=3)
            return float(nn.functional.cross_entropy(model(x), y))

    fitted = fit(
        model,
        getattr(torch.optim, optimizer)(model.parameters(), lr=rate),
        lessons,
        loss,
        epochs=epochs,
        judge=judge if judged else None,
        generator=torch.Generator().manual_seed(seed),
        training={"ema": 0.9, "accumulate": 2},
        log=TrainingLog(folder, minutes=minutes),
    )
    return model, fitted


@pytest.mark.parametrize("stop", [1, 2, 7, 12, 13, 20, 36])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_where_it_stops_makes_no_difference(stop, optimizer, tmp_path):
    expected, whole = train(optimizer=optimizer)
    with pytest.raises(Stop):
        train(tmp_path, stop=stop, optimizer=optimizer)
    model, fitted = train(tmp_path, optimizer=optimizer)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert fitted == whole


def test_a_network_with_a_mask_of_infinities_goes_on(tmp_path):
    expected, _ = train(masked=True)
    with pytest.raises(Stop):
        train(tmp_path, stop=20, masked=True)
    model, _ = train(tmp_path, masked=True)
    assert model.mask.tolist() == [0.0, -math.inf]
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_finished_training_is_not_done_again(tmp_path):
    expected, whole = train(tmp_path)
    model, fitted = train(tmp_path, stop=1)
    assert fitted == whole
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    train(tmp_path)
    for other in ({"width": 3}, {"epochs": 4}, {"optimizer": "SGD"}, {"seed": 2}, {"rate": 0.01}):
        with pytest.raises(OptionError, match="holds another training"):
            train(tmp_path, **other)


def test_a_damaged_one_is_refused_and_the_network_is_as_it_was(tmp_path):
    train(tmp_path)
    path = tmp_path / "training.training.safetensors"
    whole = read(path)
    for key in ("optimizer", "random", "curve", "kept"):
        store(path, {k: v for k, v in whole.items() if k != key})
        with pytest.raises(OptionError, match="is damaged"):
            train(tmp_path)
    store(path, whole | {"tensors": [t * math.nan for t in whole["tensors"]]})
    with pytest.raises(OptionError, match="holds weights that are not finite"):
        train(tmp_path)


def test_a_training_that_failed_leaves_its_best_state_and_nothing_to_go_on_from(tmp_path):
    with pytest.raises(ModelError, match="the loss is nan") as told:
        train(tmp_path, stop=8, failure=math.nan)
    # In its first epoch it was at its best at the start.
    assert not list(tmp_path.iterdir())
    assert "behind epoch" not in str(told.value)
    made: list[nn.Module] = []
    with pytest.raises(ModelError, match=r"as it was behind epoch \d is in ") as told:
        train(tmp_path, stop=30, failure=math.nan, made=made)
    (path,) = tmp_path.iterdir()
    assert str(path) in str(told.value)
    kept = load_file(path)
    assert kept.keys() == made[0].state_dict().keys()
    assert all(torch.equal(kept[name], value) for name, value in made[0].state_dict().items())
    assert not torch.equal(kept["0.weight"], net()[0].weight)


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        train(tmp_path / "file")


def test_without_a_judge_the_last_state_counts_where_it_stops_too(tmp_path):
    expected, whole = train(judged=False)
    assert whole.epoch == 3
    with pytest.raises(Stop):
        train(tmp_path, stop=20, judged=False)
    model, _ = train(tmp_path, judged=False)
    assert torch.equal(model[0].weight, expected[0].weight)


def test_what_is_stored_comes_back(tmp_path):
    state = {"a": [torch.arange(3), {1: torch.tensor(2.5), "x": None}], "b": [1, "two", 3.0, True]}
    store(tmp_path / "deep" / "x.safetensors", state)
    found = read(tmp_path / "deep" / "x.safetensors")
    assert found["b"] == state["b"]
    assert torch.equal(found["a"][0], state["a"][0])
    assert found["a"][1][1] == 2.5
    assert found["a"][1]["x"] is None
    assert read(tmp_path / "none") is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", bytes(100)])
def test_another_file_is_refused(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(OptionError, match="holds no training"):
        read(path)


PROGRAM = """
import sys
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from train.test_checkpoint import train
from safetensors.torch import save_file
print("go", flush=True)
model, fitted = train({folder!r}, minutes=0.0, epochs=20)
save_file(model.state_dict(), {out!r})
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_killed_at_random_moments_the_weights_are_the_same(tmp_path):
    tests = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def start(folder, out):
        code = PROGRAM.format(tests=tests, folder=str(folder), out=str(out))
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "whole", tmp_path / "whole.safetensors")
    began = time.monotonic()
    assert whole.wait(timeout=120) == 0
    left = time.monotonic() - began
    kills = 0
    for number in range(3):
        process = start(tmp_path / "killed", tmp_path / "killed.safetensors")
        process.stdout.readline()
        time.sleep(left * 0.1 * (number + 1) / 3)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert start(tmp_path / "killed", tmp_path / "killed.safetensors").wait(timeout=120) == 0
    one, other = (tmp_path / f"{name}.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


def test_another_teacher_or_option_is_another_training(tmp_path):
    x = blobs()[0]
    task = classification(calibration=x[:64], holdout=x[64:])

    def taught(seed, **options):
        torch.manual_seed(seed)
        teacher = nn.Linear(2, 3)
        torch.manual_seed(9)
        steps = [{"method": "distill.decoupled", "options": {"epochs": 1, **options}}]
        return run(nn.Linear(2, 3), steps, task, original=teacher, log=TrainingLog(tmp_path))

    first = taught(1)
    assert torch.equal(taught(1).weight, first.weight)
    for seed, options in ((2, {}), (1, {"temperature": 3.0})):
        with pytest.raises(OptionError, match="holds another training"):
            taught(seed, **options)


def test_answers_that_cannot_be_kept_are_asked_for_again(tmp_path):
    (tmp_path / "answers").touch()
    x = blobs()[0]
    task = classification(calibration=x[:64], holdout=x[64:])
    steps = [{"method": "distill.logits", "options": {"epochs": 1}}]
    done = run(nn.Linear(2, 3), steps, task, original=nn.Linear(2, 3), log=TrainingLog(tmp_path))
    assert done.recipe.steps


def test_other_labels_and_other_options_are_another_training(tmp_path):
    x, y = blobs()
    student, teacher = net(), net()
    teacher[4].weight.data.mul_(3)

    def taught(labels, **options) -> nn.Module:
        data = classification(train=(x, labels), holdout=x, batch_size=16)
        log = TrainingLog(tmp_path)
        model = copy.deepcopy(student)
        return decoupled(model, data, original=teacher, epochs=1, log=log, **options)

    first = taught(y)
    assert torch.equal(taught(y)[0].weight, first[0].weight)
    corrected = y.clone()
    corrected[-1] = (y[-1] + 1) % 3
    for labels, options in ((corrected, {}), (y, {"beta": 3.0})):
        with pytest.raises(OptionError, match="holds another training"):
            taught(labels, **options)
