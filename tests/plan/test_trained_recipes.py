"""Recipes that train, in a run: killed they go on from checkpoints, and their curves are shown."""

import pytest

from plan.test_compress import _few_resamples, task, trained  # noqa: F401
from tersor.errors import BudgetError, ModelError
from tersor.plan import compress
from tersor.progress import Bar
from tersor.train.loop import Run

RECIPE = [
    {"method": "prune.magnitude", "options": {"sparsity": 0.5}},
    {"method": "distill.logits", "options": {"epochs": 3, "rate": 5e-3}},
]


@pytest.fixture
def steps(monkeypatch):
    """How many steps were made, and after how many to stop."""
    seen, real = {"made": 0, "stop": -1, "raise": KeyboardInterrupt}, Run._step

    def counted(self, group):
        if seen["made"] == seen["stop"]:
            raise seen["raise"]
        seen["made"] += 1
        return real(self, group)

    monkeypatch.setattr(Run, "_step", counted)
    return seen


def test_a_run_killed_while_it_trains_goes_on_where_it_was(trained, task, tmp_path, steps):  # noqa: F811
    def result(name: str):
        return compress(trained, task, "drop=30", run=tmp_path / name, recipe=RECIPE)

    whole = result("whole")
    every = steps["made"]
    (curve,) = whole.report["training"]
    assert curve["step"] == "2-distill.logits"
    assert len(curve["losses"]) == every
    assert "2-distill.logits" in (tmp_path / "whole" / "report.html").read_text("utf-8")
    steps |= {"made": 0, "stop": 2 * every // 3 + 2}
    with pytest.raises(KeyboardInterrupt):
        result("killed")
    steps |= {"made": 0, "stop": -1}
    again = result("killed")
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert steps["made"] == every // 3
    assert again.report["training"] == whole.report["training"]
    assert not (tmp_path / "killed" / "training").exists()


def test_after_a_budget_that_was_missed_nothing_is_trained_again(trained, task, tmp_path, steps):  # noqa: F811
    with pytest.raises(BudgetError):
        compress(trained, task, "size=0.1x", run=tmp_path / "run", recipe=RECIPE)
    made = steps["made"]
    compress(trained, task, "size=2mb", run=tmp_path / "run", recipe=RECIPE)
    assert steps["made"] == made


def test_what_a_training_had_reached_when_it_failed_stays(trained, task, tmp_path, steps):  # noqa: F811
    steps |= {"stop": 5, "raise": ModelError("the loss is nan")}
    with pytest.raises(ModelError, match=r"as it was behind epoch 1 is in .*best\.safetensors"):
        compress(trained, task, "drop=30", run=tmp_path / "run", recipe=RECIPE)
    assert list((tmp_path / "run").rglob("*.best.safetensors"))


def test_a_bar_inside_another_is_a_row_of_it():
    with Bar("outer", 3, shown=False) as outer:
        with Bar("inner", 2, shown=False) as inner:
            inner.advance(note="loss 1")
            assert [task.description for task in outer._progress.tasks] == ["outer", "inner"]
        assert [task.description for task in outer._progress.tasks] == ["outer"]
        outer.advance()
    with Bar("another", shown=False) as another:
        assert another._progress is not outer._progress
