"""What a training keeps of itself, and how another process goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tersor.errors import OptionError
from tersor.train.log import Curve
from tersor.train.memory import fingerprint
from tersor.train.states import put, random_numbers, set_random_numbers

if TYPE_CHECKING:
    from tersor.train.loop import Run

_PLAIN = (int, float, str, bool, tuple, type(None))


def identity_of(run: Run) -> str:
    """What tells a training from others: its settings, its data, the network's start."""
    digest = hashlib.sha256()
    # Of lessons that are a part of others, those.
    lessons = getattr(run.lessons, "lessons", run.lessons)
    teacher = getattr(lessons, "original", None)
    parts = [run.lessons, lessons, *run.regimes]
    known = [
        {k: v for k, v in vars(part).items() if k != "_count" and isinstance(v, _PLAIN)}
        for part in parts
    ]
    groups = [
        {k: v for k, v in group.items() if isinstance(v, _PLAIN)}
        for group in run.optimizer.param_groups
    ]
    said = [run.log.name, run.log.about, run.settings, run.epochs, run.steps, known, groups]
    digest.update(repr([*said, type(run.optimizer).__name__]).encode())
    task = run.lessons.task
    known_by = task.fingerprint() if teacher is None else fingerprint(teacher, task)
    digest.update(known_by.encode())
    digest.update(run.generator.get_state().numpy().tobytes())
    for tensor in (*run.tensors, *run.model.state_dict().values()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def state_of(run: Run) -> dict[str, Any]:
    """All that `resume` needs."""
    return {
        "about": run.about,
        "at": [run.epoch, run.batches, run.step, run.best, run.best_epoch, run.counted],
        "curve": run.curve.state(),
        "tensors": run.tensors,
        "kept": run.kept.values,
        "average": None if run.average is None else run.average.state(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "health": run.health.state(),
        "regimes": [regime.state() for regime in run.regimes],
        "generator": run.generator.get_state(),
        "random": random_numbers(run.device),
        "epoch_random": run.random,
    }


def last_kept(run: Run) -> dict[str, Any] | None:
    """The last checkpoint; where other processes take part, the last that all of them have."""
    kept = run.log.read()
    known = {_place(run, state): state for state in reversed(kept)}
    places: Sequence[int] | None = None if run.log.path is None else list(known)[::-1]
    for regime in run.regimes:
        places = regime.common(places)
    return known[places[0]] if places else None


def resume(run: Run, state: dict[str, Any]) -> None:
    """Puts `run` where the state was. Raises OptionError for one of another training."""
    if state.get("about") != run.about:
        raise OptionError(
            f"{run.log.path} holds another training: options, data or the network's start "
            "are not what they were; delete it to start anew, or name another folder"
        )
    try:
        _put_back(run, state)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(run, error) from error
    # Buffers may hold infinities, as masks do.
    if not all(weight.isfinite().all() for weight in run.trained):
        raise OptionError(
            f"{run.log.path} holds weights that are not finite; delete it to start anew"
        )


def _put_back(run: Run, state: dict[str, Any]) -> None:
    run.epoch, run.batches, run.step, run.best, run.best_epoch, run.counted = state["at"]
    run.curve = Curve.of(state["curve"])
    put(run.tensors, state["tensors"])
    run.kept.values = [
        value.to(tensor.device) for value, tensor in zip(state["kept"], run.tensors, strict=True)
    ]
    if run.average is not None:
        run.average.restore(state["average"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.health.restore(state["health"])
    for regime, kept in zip(run.regimes, state["regimes"], strict=True):
        regime.restore(kept)
    run.generator.set_state(state["generator"])
    set_random_numbers(state["random"], run.device)
    run.random = state["epoch_random"]


def _place(run: Run, state: dict[str, Any]) -> int:
    """Where a checkpoint stands: behind an epoch is later than behind its last batch."""
    try:
        epoch, batches = state["at"][:2]
        return int(epoch * (len(run.lessons) + 1) + batches)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(run, error) from error


def _damaged(run: Run, error: Exception) -> OptionError:
    return OptionError(
        f"{run.log.path} is damaged ({type(error).__name__}: {error}); delete it to start anew"
    )
