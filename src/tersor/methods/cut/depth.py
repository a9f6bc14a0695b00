"""Cutting depth: whole blocks that change least are skipped, and hand on what they are given.

For deep networks of equal blocks, such as transformers: each block less makes every run faster by
its whole share, where narrower layers often are not. `distill.logits` behind it takes back much of
what is lost. A network of few blocks is better cut by `cut.channels`.

Source: Men et al. 2024 (ShortGPT), arXiv:2403.03853, eq. 1, for a block's influence.
Differs from the paper: by default blocks go one after another, each time the one without which the
network's own answers diverge least; influence is there to choose from, for it needs one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import OptionError, TaskError
from tersor.measure import divergence_of, evaluating, reference_outputs
from tersor.measure.running import unfused
from tersor.recipe import Outcome, method
from tersor.surgery.skip import Skipped, returned, skip
from tersor.surgery.walk import Patterns, walk
from tersor.task import Task


@method
def depth(
    model: nn.Module,
    task: Task | None = None,
    *,
    blocks: Annotated[int, Field(ge=1)] = 1,
    criterion: Literal["divergence", "influence"] = "divergence",
    samples: Annotated[int, Field(ge=1)] = 128,
    include: Patterns = None,
    exclude: Patterns = None,
) -> tuple[nn.Module, Outcome]:
    """Skips blocks, in place.

    blocks: how many
    criterion: "divergence" runs the network without each, and goes on with what is left;
        "influence" is 1 - cosine of what a block is given and what it gives, over all rows
    samples: calibration inputs to use, at most
    include, exclude: patterns, see `walk`; blocks with a weight that is chosen, none excluded

    A block can be skipped if it is one of several of its type in a list or sequence and gives back
    the shape that it is given. One at least stays in each list. The outcome holds the skipped ones
    and what each cost. Raises TaskError without inputs, OptionError for more blocks than there are.
    """
    if task is None:
        raise TaskError("cut.depth needs inputs to run the network on; pass a task")
    batches = task.calibration(samples)
    found = _Blocks(model, task, batches)
    left = found.chosen(include, exclude)
    most = found.most(left)
    if blocks > most:
        raise OptionError(
            f"blocks={blocks}: {type(model).__name__} has {most} that can be skipped"
            + (f", {', '.join(left[:3])} and so on" if left else "")
            + "; a block must be one of several of its type and give back the shape it is given, "
            "and one of each list stays"
        )
    measured = found.influence if criterion == "influence" else found.divergence
    skipped: dict[str, float] = {}
    for _ in range(blocks):
        harms = {path: measured(path) for path in found.removable(left)}
        path = min(harms, key=lambda p: harms[p])
        skipped[path] = harms[path]
        # What lies inside goes with it; what lies around would count it twice.
        left = [p for p in left if not f"{p}.".startswith(f"{path}.")]
        left = [p for p in left if not path.startswith(f"{p}.")]
        found.skip(path)
    return model, {"skipped": skipped, "left": left}


class _Blocks:
    """The blocks of a network, by path, with what a run shows of each."""

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Any]) -> None:
        self._model, self._task, self._batches = model, task, batches
        self._several: dict[str, int] = {}
        self._turned: dict[str, float] = {}
        self._answers = reference_outputs(model, task, batches)
        self._look()

    def chosen(self, include: Patterns, exclude: Patterns) -> list[str]:
        """Those with a weight that was chosen, and none that was excluded."""
        wanted = [site.name for site in walk(self._model, include)]
        kept = {site.name for site in walk(self._model, None, exclude)}
        others = [site.name for site in walk(self._model) if site.name not in kept]
        return [
            path
            for path in self._several
            if any(name.startswith(f"{path}.") for name in wanted)
            and not any(name.startswith(f"{path}.") for name in others)
        ]

    def removable(self, left: Sequence[str]) -> list[str]:
        """Those of `left` whose list has another block that still computes."""
        return [p for p in left if sum(self._siblings(p)) > 1]

    def most(self, left: Sequence[str]) -> int:
        """How many can be skipped together: of lists in each other, those of the innermost."""
        lists: dict[tuple[str, type[nn.Module]], list[str]] = {}
        for path in left:
            if not any(other.startswith(f"{path}.") for other in left):
                kind = type(self._model.get_submodule(path))
                lists.setdefault((path.rpartition(".")[0], kind), []).append(path)
        return sum(min(len(paths), sum(self._siblings(paths[0])) - 1) for paths in lists.values())

    def influence(self, path: str) -> float:
        """1 - cosine of what it is given and what it gives."""
        return self._turned[path]

    def divergence(self, path: str) -> float:
        """Of the network's answers without it."""
        with _without(self._model, path, self._several[path]):
            return divergence_of(self._model, self._task, self._batches, self._answers)

    def skip(self, path: str) -> None:
        skip(self._model, {path: self._several[path]})

    def _siblings(self, path: str) -> list[bool]:
        """Of each block in the same list, whether it computes as one of this type."""
        owner = self._model.get_submodule(path.rpartition(".")[0])
        kind = type(self._model.get_submodule(path))
        return [type(block) is kind for block in owner.children()]

    def _look(self) -> None:
        """Runs the network once and notes what goes in and out of each block."""
        sums: dict[str, list[float]] = {}
        unfit: set[str] = set()

        def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Any) -> None:
            given = next(iter((*args, *kwargs.values())), None)
            several = returned(given, outcome)
            if several is None or self._several.setdefault(path, several) != several:
                unfit.add(path)
                return
            assert isinstance(given, Tensor)
            outcome = outcome[0] if several else outcome
            cosine = _cosines(given, outcome)
            others = [a for a in (*args, *kwargs.values()) if a is not given]
            if any(_nearer(other, outcome, cosine) for other in others):
                unfit.add(path)
                return
            before = sums.setdefault(path, [0.0, 0])
            before[0] += float((1 - cosine).sum())
            before[1] += cosine.numel()

        with evaluating(self._model), unfused(), ExitStack() as stack:
            for path, block in _candidates(self._model):

                def hook(_: Any, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
                    note(path, args, kwargs, out)

                stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
            for batch in self._batches:
                self._task.predict(self._model, batch)
        self._several = {p: n for p, n in self._several.items() if p not in unfit}
        self._turned = {path: total / count for path, (total, count) in sums.items()}


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children of lists and sequences that have weights, and a sister of their type."""
    for path, owner in model.named_modules():
        if not isinstance(owner, nn.ModuleList | nn.Sequential):
            continue
        kinds = [type(child) for child in owner.children() if any(True for _ in child.parameters())]
        for name, child in owner.named_children():
            if kinds.count(type(child)) > 1 and list(child.children()):
                yield f"{path}.{name}".removeprefix("."), child


def _cosines(given: Tensor, outcome: Tensor) -> Tensor:
    """Of each row: a token's vector, or all channels of a sample's picture."""
    if given.dim() > 3:
        given, outcome = given.flatten(1), outcome.flatten(1)
    return functional.cosine_similarity(given.float(), outcome.float(), dim=-1)


def _nearer(other: Any, outcome: Tensor, cosine: Tensor) -> bool:
    """Whether a block's outcome goes on from another input than its first."""
    if not isinstance(other, Tensor) or other.shape != outcome.shape:
        return False
    return bool(_cosines(other, outcome).mean() > cosine.mean())


@contextmanager
def _without(model: nn.Module, path: str, several: int) -> Iterator[None]:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    block = owner.get_submodule(name)
    try:
        setattr(owner, name, Skipped(block, several))
        yield
    finally:
        setattr(owner, name, block)
