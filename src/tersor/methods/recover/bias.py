"""Bias correction: what compression adds to a layer's mean output is taken off its bias.

After `quantize.static` or few-bit weights, for networks whose batch norms are folded or that never
had any; where there are batch norms, `recover.batchnorm` does this and more. Needs a few hundred
unlabelled inputs and no training, and adds no byte. With few inputs, or inputs that are loud in a
few channels, the measured means can be off by more than the error they are to correct: so the
correction stays only if held-out inputs are answered more like before.

Source: Nagel et al. 2019 (DFQ), arXiv:1906.04721, section 4.2 and appendix D (empirical).
Differs from the paper: layers are corrected in one pass, each while it runs, so that those behind
see corrected inputs, with the means of all batches so far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.errors import OptionError
from tersor.measure import divergence_of, evaluating, reference_outputs
from tersor.measure.channels import Channels
from tersor.methods.asked import held_out_of, original_of, prepared
from tersor.methods.placing import is_linear
from tersor.recipe import Outcome, method
from tersor.surgery.fold import FoldedNorm, fold
from tersor.task import Inputs, Task


@method
def bias(
    model: nn.Module,
    task: Task | None = None,
    *,
    original: nn.Module | None = None,
    samples: Annotated[int, Field(ge=2)] = 256,
) -> tuple[nn.Module, Outcome]:
    """Corrects the bias of every linear layer and convolution that has one, in place.

    original: the network before compression; `run` passes the one it was given
    samples: unlabelled calibration inputs to use, at most

    The correction stays only if it brings the outputs for held-out inputs closer to the original's;
    the step's outcome says whether, with the divergence before and after. Raises OptionError for a
    network without such biases, TaskError without data.
    """
    task, held_out = held_out_of("recover.bias", task, samples)
    original = original_of("recover.bias", original)
    batches = task.calibration(samples)
    prepared, unlike = _prepared(original, model, task)
    layers = _layers(model, prepared, unlike)
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no linear layer or convolution with a plain bias of its "
            "own that the original has as well, so there is nothing to correct; leave out this step"
        )
    answers = reference_outputs(original, task, held_out)
    saved = {name: layer.get_parameter("bias").detach().clone() for name, layer in layers.items()}
    before = divergence_of(model, task, held_out, answers)
    _correct(model, task, batches, layers, _outputs(prepared, task, batches, layers))
    after = divergence_of(model, task, held_out, answers)
    if not after < before:
        for name, layer in layers.items():
            layer.get_parameter("bias").data.copy_(saved[name])
    outcome = {"kept": after < before, "divergence_before": before, "divergence_after": after}
    return model, {**outcome, "layers": len(layers)}


def _prepared(original: nn.Module, model: nn.Module, task: Task) -> tuple[nn.Module, set[str]]:
    """The original after the steps that change no output, so that its layers give the same.

    And the paths of layers that give something else all the same.
    """
    done = prepared(original, model, task)
    norms = {path for path, m in model.named_modules() if isinstance(m, FoldedNorm)}
    pairs = fold(done, task.example(2)).pairs if norms else ()
    return done, {layer for layer, norm in pairs if norm not in norms}


def _layers(model: nn.Module, prepared: nn.Module, unlike: set[str]) -> dict[str, nn.Module]:
    """Layers to correct, by path: plain bias, of their own, the same kind of thing in both."""
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    others = dict(prepared.named_modules())
    found = {}
    for path, layer in model.named_modules():
        bias = layer._parameters.get("bias")
        other = others.get(path)
        if bias is None or path in unlike or not (is_linear(layer) or isinstance(layer, _ConvNd)):
            continue
        if places[id(bias)] == 1 and getattr(other, "bias", None) is not None:
            found[path] = layer
    return found


def _outputs(
    model: nn.Module, task: Task, batches: Sequence[Inputs], layers: dict[str, nn.Module]
) -> list[dict[str, Channels]]:
    """What the layers of these paths give for each batch."""
    found: list[dict[str, Channels]] = []
    with evaluating(model), ExitStack() as stack:
        for path in layers:
            layer = model.get_submodule(path)

            def look(layer: nn.Module, _: Any, output: Tensor, path: str = path) -> None:
                found[-1][path] = _channels(layer, output) + found[-1].get(path)

            stack.callback(layer.register_forward_hook(look).remove)
        for batch in batches:
            found.append({})
            task.predict(model, batch)
    return found


def _correct(
    model: nn.Module,
    task: Task,
    batches: Sequence[Inputs],
    layers: dict[str, nn.Module],
    wanted: Sequence[dict[str, Channels]],
) -> None:
    """Sets each bias while its layer runs, so that its mean output is the wanted one."""
    seen: dict[str, Channels] = {}
    target: dict[str, Channels] = {}

    def correct(layer: nn.Module, _: Any, output: Tensor, path: str) -> Tensor | None:
        if path not in target:
            return None
        bias = layer.get_parameter("bias")
        axis = _axis(layer, output)
        shape = [-1 if n == axis else 1 for n in range(output.dim())]
        bare = output - bias.detach().reshape(shape)
        seen[path] = _channels(layer, bare) + seen.get(path)
        bias.data.copy_(target[path].mean - seen[path].mean)
        return bare + bias.detach().reshape(shape)

    with evaluating(model), ExitStack() as stack:
        for path, layer in layers.items():

            def hook(layer: nn.Module, args: Any, output: Tensor, path: str = path) -> Any:
                return correct(layer, args, output, path)

            # Before a grid on the output rounds it.
            stack.callback(layer.register_forward_hook(hook, prepend=True).remove)
        for batch, more in zip(batches, wanted, strict=True):
            for path, channels in more.items():
                target[path] = channels + target.get(path)
            task.predict(model, batch)


def _axis(layer: nn.Module, output: Tensor) -> int:
    spatial = output.dim() - (len(layer.kernel_size) if isinstance(layer, _ConvNd) else 0)
    return spatial - 1


def _channels(layer: nn.Module, output: Tensor) -> Channels:
    axis = _axis(layer, output)
    return Channels.of(output.movedim(axis, -1).flatten(0, -2))
