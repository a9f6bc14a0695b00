"""compress(): budgets met on the written file, refused with figures, resumed after a kill."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tersor.codec import load
from tersor.errors import BudgetError, ModelError, OptionError, OutputError, TaskError
from tersor.measure import quality, safetensors_bytes, statistics
from tersor.plan import coded as coded_module
from tersor.plan import compress
from tersor.plan import ladder as ladder_module
from tersor.plan import search as search_module
from tersor.plan import trial as trial_module
from tersor.plan.journal import model_hash
from tersor.plan.trial import Bench
from tersor.surgery import walk
from tersor.task import classification

needs_onnx = pytest.mark.skipif(
    not importlib.util.find_spec("onnxruntime"), reason="needs the extra onnx"
)
# Whichever way the weights are stored, a run is a run.
both_routes = pytest.mark.parametrize(
    "target", ["", pytest.param(", target=onnxruntime", marks=needs_onnx)], ids=["coded", "ladder"]
)


class Blobs(nn.Module):
    """A small convolution net for 3 classes of noisy 8x8 patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def blobs(n, seed):
    g = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, 3, (n,), generator=g)
    return patterns[y] + 1.2 * torch.randn(n, 1, 8, 8, generator=g), y


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    # No test here asks how wide an interval is, and a thousand take half of a run's time.
    monkeypatch.setattr(statistics, "RESAMPLES", 50)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    net = Blobs()
    x, y = blobs(512, 1)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def task():
    return classification(train=blobs(256, 1), test=blobs(300, 2))


@both_routes
def test_the_written_file_meets_size_and_drop(trained, task, tmp_path, target):
    result = compress(trained, task, f"size=0.6x, drop=2{target}", run=tmp_path / "run")
    assert result.path.stat().st_size <= 0.6 * safetensors_bytes(trained)
    before, after = quality(trained, task), quality(load(result.path), task)
    assert after["accuracy"].value >= before["accuracy"].value - 2
    assert result.report["after"]["metrics"]["accuracy"] == pytest.approx(after["accuracy"].value)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["met"] is True
    assert not list((tmp_path / "run").glob("trial-*"))


def test_the_given_model_is_left_as_it_was(trained, task, tmp_path):
    state = {k: v.clone() for k, v in trained.state_dict().items()}
    compress(trained, task, "size=0.6x", run=tmp_path / "run")
    assert list(trained.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in trained.state_dict().items())


def test_modes_are_given_back(trained, task, tmp_path):
    trained.conv1.train()
    try:
        compress(trained, task, "size=0.6x", run=tmp_path / "run")
        assert trained.conv1.training
        assert not trained.training
    finally:
        trained.eval()


def test_with_a_drop_alone_a_looser_one_gives_a_smaller_file(trained, task, tmp_path):
    tight = compress(trained, task, "drop=0.4", run=tmp_path / "tight")
    loose = compress(trained, task, "drop=20", run=tmp_path / "loose")
    assert loose.path.stat().st_size < tight.path.stat().st_size
    floor = tight.report["before"]["metrics"]["accuracy"] - 0.4
    assert tight.report["after"]["metrics"]["accuracy"] >= floor


@both_routes
def test_two_runs_write_the_same_bytes(trained, task, tmp_path, target):
    budget = f"size=0.4x{target}"
    first = compress(trained, task, budget, run=tmp_path / "a").path.read_bytes()
    assert compress(trained, task, budget, run=tmp_path / "b").path.read_bytes() == first


def never(*_):
    raise AssertionError("measured again")


def test_a_second_run_in_the_folder_tries_nothing_again(trained, task, tmp_path, monkeypatch):
    first = compress(trained, task, "size=0.4x, drop=2", run=tmp_path / "run").path.read_bytes()
    monkeypatch.setattr(Bench, "_trial", never)
    again = compress(trained, task, "size=0.4x, drop=2", run=tmp_path / "run")
    assert again.path.read_bytes() == first


@needs_onnx
def test_a_second_run_for_a_runtime_measures_no_choice_again(trained, task, tmp_path, monkeypatch):
    budget = "size=0.6x, target=onnxruntime"
    first = compress(trained, task, budget, run=tmp_path / "run").path.read_bytes()
    monkeypatch.setattr(ladder_module, "_measure", never)
    assert compress(trained, task, budget, run=tmp_path / "run").path.read_bytes() == first


@pytest.mark.slow
def test_a_run_stopped_at_any_trial_goes_on_where_it_was(trained, task, tmp_path, monkeypatch):
    budget, real = "size=0.4x, drop=30", Bench.write
    calls = []
    monkeypatch.setattr(Bench, "write", lambda *args: calls.append(1) or real(*args))
    whole = compress(trained, task, budget, run=tmp_path / "whole").path.read_bytes()
    assert len(calls) > 2
    for stop in range(len(calls)):
        left = [None] * stop

        def stopped(*args, left=left):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return real(*args)

        monkeypatch.setattr(Bench, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            compress(trained, task, budget, run=tmp_path / str(stop))
        assert not (tmp_path / str(stop) / "model.tersor").exists()
        again = []
        monkeypatch.setattr(Bench, "write", lambda *args, a=again: a.append(1) or real(*args))
        resumed = compress(trained, task, budget, run=tmp_path / str(stop))
        assert resumed.path.read_bytes() == whole
        assert len(again) == len(calls) - stop


@needs_onnx
def test_a_run_stopped_while_it_measures_goes_on_where_it_was(trained, task, tmp_path, monkeypatch):
    budget = "size=0.6x, target=onnxruntime"
    whole = compress(trained, task, budget, run=tmp_path / "whole").path.read_bytes()
    real, calls = ladder_module._measure, []

    def stopped(*args):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(ladder_module, "_measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress(trained, task, budget, run=tmp_path / "run")
    assert not (tmp_path / "run" / "model.tersor").exists()
    again = []
    monkeypatch.setattr(ladder_module, "_measure", lambda *a: again.append(a) or real(*a))
    assert compress(trained, task, budget, run=tmp_path / "run").path.read_bytes() == whole
    total = sum(len(ladder_module.choices_for(s)) for s in walk(trained))
    assert len(again) == total - 7


def test_a_folder_of_another_job_is_refused_and_kept(trained, task, tmp_path):
    kept = compress(trained, task, "size=0.6x", run=tmp_path / "run").path.read_bytes()
    with pytest.raises(OptionError, match=r"belongs to a run with another budget"):
        compress(trained, task, "size=0.7x", run=tmp_path / "run")
    assert (tmp_path / "run" / "model.tersor").read_bytes() == kept


def test_a_folder_with_other_files_is_refused(trained, task, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OptionError, match="holds other files and no run"):
        compress(trained, task, "size=0.6x", run=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_what_a_kill_left_half_written_is_no_obstacle_and_goes(trained, task, tmp_path):
    for name in (".job.yaml.0011aabb.part", ".model.tersor.0011aabb.part"):
        (tmp_path / name).write_text("half")
    compress(trained, task, "size=0.6x", run=tmp_path)
    assert not list(tmp_path.glob(".*"))
    (tmp_path / ".git").mkdir()
    compress(trained, task, "size=0.6x", run=tmp_path)
    assert (tmp_path / ".git").is_dir()


def test_a_damaged_journal_is_refused(trained, task, tmp_path):
    compress(trained, task, "size=0.6x", run=tmp_path)
    (tmp_path / "journal.sqlite").write_bytes(b"SQLite format 3\0" + bytes(4096))
    with pytest.raises(OutputError, match=r"journal of a run.* choose another folder"):
        compress(trained, task, "size=0.6x", run=tmp_path)


def test_a_model_whose_code_was_changed_is_another_model(tmp_path):
    hashes = set()
    for number, function in enumerate(("relu", "relu", "tanh")):
        file = tmp_path / f"net{number}.py"
        file.write_text(
            "import torch\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n"
            f"        return torch.{function}(super().forward(x))\n"
        )
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        hashes.add(model_hash(module.Net(4, 2)))
    assert len(hashes) == 2


@needs_onnx
class Scaled(nn.Module):
    """Its answers depend on what no tensor holds."""

    def __init__(self, gain):
        super().__init__()
        self.head, self.gain = nn.Linear(64, 3), gain

    def forward(self, x):
        return self.gain * self.head(x.flatten(1))


def test_a_model_made_otherwise_and_another_example_are_other_jobs(task, tmp_path):
    torch.manual_seed(0)
    models = [Scaled(1.0), Scaled(2.0)]
    models[1].load_state_dict(models[0].state_dict())
    assert model_hash(models[0]) != model_hash(models[1])
    assert model_hash(models[0]) == model_hash(models[0].train())
    given = {"budget": "size=0.9x", "run": tmp_path / "run"}
    compress(models[0], task, **given)
    with pytest.raises(OptionError, match="with another model"):
        compress(models[1], task, **given)
    examples = [torch.zeros(n, 1, 8, 8) for n in (1, 2)]
    compress(models[0], None, "size=0.9x", run=tmp_path / "blind", example=examples[0])
    with pytest.raises(OptionError, match="with another example"):
        compress(models[0], None, "size=0.9x", run=tmp_path / "blind", example=examples[1])


def test_a_trial_whose_answers_are_no_numbers_is_only_too_small(
    trained, task, tmp_path, monkeypatch
):
    real, asked = trial_module.quality, []

    def judged(model, task, **options):
        asked.append(model)
        if len(asked) == 1:
            raise ModelError("gives NaN")
        return real(model, task, **options)

    monkeypatch.setattr(trial_module, "quality", judged)
    result = compress(trained, task, "drop=30", run=tmp_path / "run")
    assert result.report["met"] is True
    assert len(asked) > 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (lost,) = [p for p in report["points"] if p["metrics"]["accuracy"] is None]
    assert not lost["chosen"]
    assert (tmp_path / "run" / "report.html").exists()


def test_without_inputs_kept_apart_batch_norms_stay_and_a_note_says_so(trained, tmp_path):
    single = classification(calibration=blobs(1, 1)[0])
    result = compress(trained, single, "size=0.6x, target=onnxruntime", run=tmp_path / "run")
    assert any("statistics were not corrected" in note for note in result.report["notes"])
    assert "recover.batchnorm" not in [step["method"] for step in result.report["recipe"]]


@needs_onnx
def test_choices_that_break_the_network_are_left_out_and_counted(
    trained, task, tmp_path, monkeypatch
):
    real, budget = ladder_module._measure, "size=0.5x, target=onnxruntime"

    def breaking(site, choice, probe):
        size, loss = real(site, choice, probe)
        return [size, float("inf") if choice.label == "int4" else loss]

    monkeypatch.setattr(ladder_module, "_measure", breaking)
    report = compress(trained, task, budget, run=tmp_path / "run").report
    assert any(re.match(r"1 of \d+ choices made an output infinite", n) for n in report["notes"])
    assert "int4" not in {row["option"] for row in report["sensitivity"]}
    everything = [9, float("inf")]
    monkeypatch.setattr(
        ladder_module, "_measure", lambda site, choice, _: everything if choice.steps else [9, 0.0]
    )
    with pytest.raises(ModelError, match="infinite or NaN outputs whichever weight"):
        compress(trained, task, budget, run=tmp_path / "other")


def test_a_note_of_the_task_that_came_later_is_in_the_report(trained, tmp_path):
    task = classification(train=blobs(64, 1), test=blobs(64, 2))
    model = nn.Sequential(trained, nn.Softmax(1))
    report = compress(model, task, "size=0.6x", run=tmp_path / "run").report
    assert any("the model gives probabilities" in note for note in report["notes"])


def test_a_smaller_file_that_keeps_the_quality_is_taken(trained, task, tmp_path, monkeypatch):
    real, seen = search_module.shortfalls, []

    def noisy(metrics, *rest):
        seen.append(metrics)
        return "unlucky" if len(seen) == 1 else real(metrics, *rest)

    monkeypatch.setattr(search_module, "shortfalls", noisy)
    result = compress(trained, task, "size=0.9x, drop=20", run=tmp_path / "run")
    assert result.report["met"]
    assert result.path.stat().st_size < 0.4 * safetensors_bytes(trained)


def test_a_size_out_of_reach_says_what_is_reachable(trained, task, tmp_path):
    with pytest.raises(BudgetError, match=r"the smallest file.*the size limit binds"):
        compress(trained, task, "size=500", run=tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.tersor"))


def test_size_and_quality_together_out_of_reach_say_which_binds(trained, tmp_path):
    # Labels are the model's own answers, so every answer that changes is a loss.
    x = blobs(300, 2)[0]
    strict = classification(train=blobs(256, 1), test=(x, trained(x).argmax(1)))
    with pytest.raises(BudgetError) as refused:
        compress(trained, strict, "size=500", run=tmp_path / "probe")
    reachable = re.search(r"ask for (size=[0-9.]+x)", str(refused.value))[1]
    with pytest.raises(
        BudgetError, match=r"accuracy is .* must be at least 100 .*binds"
    ) as refused:
        compress(trained, strict, f"{reachable}, drop=0", run=tmp_path / "run")
    assert not (tmp_path / "run" / "model.tersor").exists()
    larger = re.search(r"ask for (size=[0-9.]+x)", str(refused.value))[1]
    assert compress(trained, strict, f"{larger}, drop=0", run=tmp_path / "larger").report["met"]


def test_a_floor_above_the_original_is_refused(trained, task, tmp_path):
    with pytest.raises(
        BudgetError, match=r"accuracy>=100.5 in the budget is out of reach: the original"
    ):
        compress(trained, task, "size=0.6x, accuracy>=100.5", run=tmp_path / "run")


@pytest.mark.parametrize(
    ("bound", "said"),
    [
        ("accuracy<=90", "accuracy should be high; write accuracy>=90"),
        ("calibration_error>=3", "calibration_error should be low; write calibration_error<=3"),
        ("speed>=3", r"names no metric of the task; it has \['accuracy'"),
        ("calibration_error<=0.0001", "out of reach"),
    ],
)
def test_bounds_that_make_no_sense_for_the_metric_are_refused(trained, task, tmp_path, bound, said):
    with pytest.raises(BudgetError, match=said):
        compress(trained, task, f"size=0.6x, {bound}", run=tmp_path / "run")


def test_macs_are_limited_per_sample(trained, task, tmp_path):
    per_sample = 64 * (9 * 16 + 9 * 16 * 32) + 32 * 3
    kept = compress(trained, task, f"size=0.6x, macs={per_sample}", run=tmp_path / "run")
    assert kept.report["costs"]["macs"] == {"before": per_sample, "after": per_sample}


@pytest.mark.parametrize("limit", ["macs=0.5x", "memory=0.1x"])
def test_limits_that_storage_cannot_change_bind_and_say_so(trained, task, tmp_path, limit):
    with pytest.raises(BudgetError, match=f"the {limit.partition('=')[0]} limit binds"):
        compress(trained, task, f"size=0.6x, {limit}", run=tmp_path / "run")


def test_without_data_it_works_and_says_what_that_costs(trained, tmp_path):
    result = compress(
        trained, None, "size=0.6x", run=tmp_path / "run", example=torch.randn(2, 1, 8, 8)
    )
    assert result.path.stat().st_size <= 0.6 * safetensors_bytes(trained)
    assert any("No data was given" in note for note in result.report["notes"])
    blind = compress(trained, None, "size=0.6x", run=tmp_path / "blind")
    assert any("weights alone" in note for note in blind.report["notes"])
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(load(blind.path, into=Blobs()).eval()(x), blind.model(x))


def test_quality_limits_without_data_are_refused(trained, tmp_path):
    with pytest.raises(TaskError, match=r"size=0.6x, drop=1 needs data"):
        compress(trained, None, "size=0.6x, drop=1", run=tmp_path / "run")


def test_a_recipe_can_be_given(trained, task, tmp_path):
    recipe = [{"method": "quantize.rtn", "options": {"bits": 8}}]
    result = compress(trained, task, "drop=5", run=tmp_path / "run", recipe=recipe)
    assert [s["method"] for s in result.report["recipe"]] == ["quantize.rtn"]
    with pytest.raises(BudgetError, match="the given recipe does not meet"):
        compress(trained, task, "size=0.2x", run=tmp_path / "other", recipe=recipe)


def test_the_profile_of_the_file_can_be_chosen(trained, task, tmp_path):
    recipe = [{"method": "quantize.rtn", "options": {"bits": 5}}]
    sizes = {}
    for profile in ("small", "max"):
        result = compress(
            trained, task, "drop=5", run=tmp_path / profile, recipe=recipe, profile=profile
        )
        sizes[profile] = result.path.stat().st_size
        job = (tmp_path / profile / "job.yaml").read_text(encoding="utf-8")
        assert f"profile: {profile}" in job
    # Runs as short as this network's are coded by the slowest coder in every profile.
    assert sizes["max"] <= sizes["small"]
    with pytest.raises(OptionError, match="profile='tiny' is none of fast, small, max"):
        compress(trained, task, "drop=5", run=tmp_path / "tiny", profile="tiny")
    assert not (tmp_path / "tiny").exists()


def test_weights_that_are_not_numbers_are_refused(task, tmp_path):
    net = Blobs().eval()
    with torch.no_grad():
        net.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r'"conv2.weight" of shape \(32, 16, 3, 3\) holds NaN or'):
        compress(net, task, "size=0.6x", run=tmp_path / "run")


def test_a_model_without_weights_is_refused(task, tmp_path):
    with pytest.raises(ModelError, match="nothing to compress"):
        compress(nn.Sequential(nn.ReLU()), None, "size=0.6x", run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_refused(trained, task, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        compress(trained, task, "size=0.6x", run=tmp_path / "file" / "run")


@pytest.mark.slow
def test_killed_at_random_moments_the_file_is_the_same(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import torch; torch.set_num_threads(1);"
        "from test_compress import Blobs, blobs; from tersor.plan import compress;"
        "from tersor.task import classification; torch.manual_seed(3); net = Blobs().eval();"
        "compress(net, classification(train=blobs(256, 1), test=blobs(300, 2)), 'size=0.6x', "
        "run=sys.argv[1])"
    )

    def start(folder):
        command = [sys.executable, "-c", program, str(folder), str(Path(__file__).parent)]
        return subprocess.Popen(command, env={**os.environ, "OMP_WAIT_POLICY": "passive"})

    assert start(tmp_path / "whole").wait(120) == 0
    whole = (tmp_path / "whole" / "model.tersor").read_bytes()
    delays = torch.rand(20, generator=torch.Generator().manual_seed(5)) * 8
    for attempt, delay in enumerate(delays.tolist()):
        folder = tmp_path / f"killed{attempt}"
        running = start(folder)
        try:
            running.wait(delay)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            running.wait()
        assert start(folder).wait(120) == 0
        assert (folder / "model.tersor").read_bytes() == whole


@needs_onnx
def test_a_folder_without_a_file_goes_to_the_next_job(trained, task, tmp_path, monkeypatch):
    with pytest.raises(BudgetError, match="the size limit binds"):
        compress(trained, task, "size=500, target=onnxruntime", run=tmp_path / "run")
    monkeypatch.setattr(ladder_module, "_measure", never)
    result = compress(trained, task, "size=0.6x, target=onnxruntime", run=tmp_path / "run")
    assert result.path.stat().st_size <= 0.6 * safetensors_bytes(trained)


def test_a_second_run_at_once_is_refused(trained, task, tmp_path, monkeypatch):
    real = coded_module.look

    def meanwhile(*args):
        with pytest.raises(OptionError, match="another run is at work in the folder"):
            compress(trained, task, "size=0.6x", run=tmp_path / "run")
        return real(*args)

    monkeypatch.setattr(coded_module, "look", meanwhile)
    assert compress(trained, task, "size=0.6x", run=tmp_path / "run").report["met"]


def test_what_cannot_be_used_leaves_no_folder(trained, task, tmp_path):
    wide = classification(test=(torch.randn(9, 2, 8, 8), torch.zeros(9, dtype=torch.int64)))
    locked = Blobs()
    locked.lock = threading.Lock()
    order = [{"method": "quantize.rtn"}, {"method": "prune.magnitude"}]
    for error, given in [
        (TaskError, {"task": wide, "budget": "size=0.6x"}),
        (TaskError, {"task": blobs(9, 1)}),
        (ModelError, {"model": trained.state_dict()}),
        (ModelError, {"model": locked}),
        (OptionError, {"recipe": order}),
        (OptionError, {"recipe": []}),
        (OptionError, {"seed": -1}),
        (OptionError, {"budget": "size=0.6x, target=onnxruntime", "task": None}),
        (BudgetError, {"budget": "size=0.6x, f1000>=3"}),
    ]:
        with pytest.raises(error):
            compress(**{"model": trained, "task": task, "run": tmp_path / "run", **given})
        assert not list(tmp_path.iterdir())


class PerRow(nn.Module):
    """A loop over the rows, which a graph holds for one number of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 32)

    def forward(self, x):
        return self.head(x.flatten(1)) + sum(1 for _ in range(int(x.shape[0])))


def test_a_graph_that_would_not_take_the_data_is_left_out(task, tmp_path):
    result = compress(PerRow().eval(), task, "size=0.9x", run=tmp_path / "run")
    assert result.report["file"]["graph"] is False
    assert any("would not take all of the data" in note for note in result.report["notes"])


def test_a_size_beyond_the_original_is_asked_for_in_bytes(task, tmp_path):
    tiny = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(BudgetError, match=r"ask for size=[0-9]+ or more") as refused:
        compress(tiny, task, "size=0.2x", run=tmp_path / "run")
    asked = re.search(r"ask for (size=[0-9]+)", str(refused.value))[1]
    assert compress(tiny, task, asked, run=tmp_path / "run").report["met"]


def test_one_small_weight_can_have_a_limit_on_quality_alone(tmp_path):
    # Its smallest choice has 198 bytes, and numpy.geomspace(198, 198) has 197.99999999999991.
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(64, 1, 8, 8)
    same = classification(test=(x, tiny(x).argmax(1)), calibration=x)
    assert compress(tiny, same, "drop=5", run=tmp_path / "run").report["met"]


class Normed(nn.Module):
    """A weight-normed layer that stays as it is, and one that is worth compressing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(64, 4))
        self.wide = nn.Linear(4, 512)

    def forward(self, x):
        return self.wide(self.first(x.flatten(1)))


def test_weight_norms_are_computed_out_whatever_form_they_get(task, tmp_path):
    torch.manual_seed(0)
    net = Normed().eval()
    result = compress(
        net,
        task,
        "size=0.9x",
        run=tmp_path / "run",
        recipe=[{"method": "quantize.rtn", "options": {"include": ["wide"]}}],
    )
    x = torch.randn(5, 1, 8, 8)
    assert result.report["file"]["graph"]
    assert torch.allclose(load(result.path)(x), net(x), atol=0.02)
    assert torch.equal(load(result.path, into=Normed())(x), result.model(x))
    assert "first.parametrizations.weight.original0" in net.state_dict()
