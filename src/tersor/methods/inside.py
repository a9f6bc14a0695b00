"""Learning from what lies inside a teacher: what layers gave, and what becomes small beside logits.

Source: Romero et al. 2015 (FitNets), arXiv:1412.6550, section 2.2, for regressors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import ModelError, TaskError
from tersor.measure import evaluating
from tersor.measure.running import tensors_in, unfused
from tersor.methods.learning import learn, trainable
from tersor.recipe import Outcome
from tersor.surgery.walk import Patterns
from tersor.task import Task
from tersor.train import Lesson, Teacher, TrainingLog

Paths = tuple[Sequence[str], Sequence[str]]
"""Of layers in the student, and of layers in the teacher."""
Hint = Callable[["Inside", "Inside"], Tensor]
"""A number, from what was taken down of the student and of the teacher on the same inputs."""


@dataclass
class Inside:
    """What was taken down while a network ran, once for each time that it was called.

    outputs, inputs: by path, the first tensor that a layer gave, and was given
    masks: the `attention_mask` of each call of the network, None without
    """

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    masks: list[Tensor | None] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Of what was taken down."""
        return next(iter(self.outputs.values()))[0].device

    def taken(self) -> Inside:
        """All of it, of which nothing is left here."""
        found = Inside(self.outputs, self.inputs, self.masks)
        self.outputs, self.inputs, self.masks = {}, {}, []
        return found


@contextmanager
def watching(model: nn.Module, paths: Sequence[str], *, learning: bool = False) -> Iterator[Inside]:
    """Inside the block each run of `model` is taken down.

    learning: only of runs that gradients are recorded of, so not of those that judge
    """
    inside = Inside()

    def note(path: str, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Any) -> None:
        if torch.is_grad_enabled() or not learning:
            for known, tree in ((inside.inputs, (args, kwargs)), (inside.outputs, outcome)):
                first = next(tensors_in(tree), None)
                if first is not None:
                    known.setdefault(path, []).append(first)

    def mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() or not learning:
            inside.masks.append(kwargs.get("attention_mask"))

    with ExitStack() as stack, unfused():
        stack.callback(model.register_forward_pre_hook(mask, with_kwargs=True).remove)
        for path in dict.fromkeys(paths):

            def hook(_: Any, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
                note(path, args, kwargs, out)

            module = model.get_submodule(path)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield inside


def learn_inside(
    name: str,
    model: nn.Module,
    lessons: Teacher,
    paths: Paths,
    hint: Hint,
    *,
    weight: float,
    epochs: int,
    rate: float,
    regressors: nn.Module | None = None,
    training: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    log: TrainingLog | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Outcome:
    """Trains in place, on the lessons' loss and `weight` times the hint. Returns what to report.

    paths: of layers that are watched
    regressors: are trained beside, and forgotten
    """
    own = trainable(name, model, include, exclude)
    extra = [] if regressors is None else list(regressors.parameters())
    lessons.watch = lambda: watching(lessons.original, paths[1])
    with watching(model, paths[0], learning=True) as seen:

        def loss(outputs: Tensor, lesson: Lesson) -> Tensor:
            found = hint(seen.taken(), lesson.inside)
            return lessons.loss(outputs, lesson) + weight * found

        outcome = learn(
            name,
            model,
            lessons,
            lessons.original,
            parameters=[*own, *extra],
            epochs=epochs,
            rate=rate,
            loss=loss,
            training=training,
            generator=generator,
            log=log,
        )
    return {**outcome, "trained": sum(p.numel() for p in own)}


def probed(
    name: str, model: nn.Module, original: nn.Module, task: Task, paths: Paths
) -> tuple[Inside, Inside]:
    """What student and teacher compute of the first inputs. name: of the method

    Raises TaskError without inputs, ModelError for a layer that does not run or gives no tensor.
    """
    batches = task.calibration(2)
    if not batches:
        raise TaskError(f"{name} needs inputs to train on and the task has none; give it some")
    found = []
    for network, role, wanted in ((model, "student", paths[0]), (original, "teacher", paths[1])):
        with evaluating(network), watching(network, wanted) as seen:
            task.predict(network, batches[0])
        missing = [path for path in wanted if path not in seen.outputs]
        if missing:
            raise ModelError(
                f"{name}: layer {missing[0]!r} of the {role} gives no tensor when it runs on "
                "inputs of the task; name others with pairs"
            )
        found.append(seen)
    return found[0], found[1]


class Regressors(nn.Module):
    """Linear maps from a student's channels to its teacher's, a 1x1 convolution for pictures.

    For each place whose numbers of channels differ; the others are the identity.
    """

    def __init__(self, widths: Sequence[tuple[int, int]], generator: torch.Generator) -> None:
        """widths: channels of student and teacher, place by place"""
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Identity() if own == theirs else _empty(own, theirs) for own, theirs in widths
        )
        for layer in self.maps:
            if isinstance(layer, nn.Linear):
                drawn = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.data = drawn / layer.in_features**0.5
                layer.bias.data.zero_()

    def forward(self, place: int, output: Tensor) -> Tensor:
        """(n, channels, ...) of the student -> (n, channels of the teacher, ...)."""
        mapped: Tensor = self.maps[place](output.movedim(1, -1))
        return mapped.movedim(-1, 1)


def channels_first(output: Tensor, layer: nn.Module) -> Tensor:
    """(n, channels, places, ...) of what a layer gave; tokens have their channels last.

    Three dimensions are (n, channels, places) where the layer has an `nn.Conv1d` in it.
    """
    convolves = any(isinstance(part, nn.Conv1d | nn.ConvTranspose1d) for part in layer.modules())
    return output.movedim(-1, 1) if output.dim() == 3 and not convolves else output


def same_places(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both averaged over places down to the smaller size of each dimension.

    one, other: (n, channels, places, ...). Raises ModelError where dimensions differ in number.
    """
    if one.dim() != other.dim():
        raise ModelError(
            f"the student's layer gives {tuple(one.shape)} and the teacher's {tuple(other.shape)}, "
            "channels second; match layers of one kind with pairs"
        )
    sizes = [min(pair) for pair in zip(one.shape[2:], other.shape[2:], strict=True)]
    return _pooled(one, sizes), _pooled(other, sizes)


def weights(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """(n, places) of 0 and 1 where a mask belongs to outputs of this shape; None elsewhere."""
    fits = mask is not None and mask.dim() == 2 and mask.shape == (shape[0], *shape[2:])
    return mask.float() if mask is not None and fits else None


def _pooled(output: Tensor, sizes: Sequence[int]) -> Tensor:
    if list(output.shape[2:]) == list(sizes):
        return output
    pools: dict[int, Callable[..., Tensor]] = {
        1: functional.adaptive_avg_pool1d,
        2: functional.adaptive_avg_pool2d,
        3: functional.adaptive_avg_pool3d,
    }
    return pools[len(sizes)](output, sizes)


def _empty(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that drew no random number for its weights."""
    return nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
