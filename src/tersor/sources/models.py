"""Models as the command line names them.

file.py:factory, package.module:factory    Python code that is run; a module or (module, example)
folder                                     a Hugging Face folder with safetensors weights
hub:organization/name[@revision]           the same, fetched from the hub
file.pt2                                   an exported program; opened by torch, trusted like code
file.tersor                                a compressed model; nothing in it is executed
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from tersor.errors import ModelError
from tersor.sources.code import made_by
from tersor.surgery import check_finite, held

KINDS = (
    "file.py:factory, package.module:factory, a Hugging Face folder, hub:org/name, .pt2, .tersor"
)


@dataclass(frozen=True)
class Opened:
    """A model and what its source knows beside it.

    name: what reports call it
    example: inputs to trace it with, where the source has any
    folder: where its tokenizer lies, for models of a Hugging Face folder
    made_up: True where `example` has the right types and sizes, but values that mean nothing
    """

    model: nn.Module
    name: str
    example: Any = None
    folder: Path | None = None
    made_up: bool = False


def open_model(spec: str, *, like: nn.Module | None = None) -> Opened:
    """Opens the model that `spec` names, in evaluation mode.

    like: the network that a .tersor file without a stored graph belongs to

    Raises ModelError saying what is wrong with it, FileError for a damaged .tersor file.
    """
    path = Path(spec)
    if spec.startswith("hub:"):
        opened = _from_hub(spec)
    elif path.suffix in _FILES and path.is_file():
        opened = _FILES[path.suffix](path, like)
    elif path.is_dir():
        from tersor.sources.huggingface import from_folder

        opened = from_folder(path)
    elif path.is_file() and path.suffix != ".py":
        raise ModelError(_not_a_network(path))
    elif ":" in spec or path.suffix == ".py":
        opened = _from_code(spec)
    else:
        raise ModelError(
            f"{spec} does not exist; a model is {KINDS}, and paths start from {Path.cwd()}"
        )
    return _checked(opened, spec)


def _checked(opened: Opened, spec: str) -> Opened:
    model = opened.model
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} gave {type(model).__name__}, not a torch.nn.Module; return the network "
            "itself, or (network, example inputs)"
        )
    if any(isinstance(part, ScriptModule) for part in model.modules()):
        raise ModelError(
            f"{spec} gave a TorchScript module, whose layers cannot be changed; return the "
            "torch.nn.Module that it was scripted from"
        )
    if not any(True for _ in model.parameters()) and not any(True for _ in held(model)):
        raise ModelError(
            f"{spec} gave a {type(model).__name__} without parameters, so there is nothing to "
            "compress or measure; return the trained network itself"
        )
    check_finite(model)
    return replace(opened, model=model.eval())


def _from_code(spec: str) -> Opened:
    found = made_by(spec, ModelError)
    name = spec.rpartition(":")[2]
    if isinstance(found, tuple) and len(found) == 2:
        return Opened(found[0], name, example=found[1])
    return Opened(found, name)


def _from_tersor(path: Path, like: nn.Module | None) -> Opened:
    import torch

    from tersor.codec import load, read_header
    from tersor.program import Interpreted, example_of

    header = read_header(path)
    if header.program_bytes:
        model = load(path)
        example = None
        if isinstance(model, Interpreted):
            example = example_of(model.program, torch.Generator().manual_seed(0))
        return Opened(model, path.stem, example=example, made_up=example is not None)
    if like is None:
        raise ModelError(
            f"{path} holds weights without a graph, so the network's code is needed; name it with "
            "--like file.py:factory"
        )
    return Opened(load(path, into=like), path.stem)


def _from_exported(path: Path, _: nn.Module | None) -> Opened:
    from tersor.sources.exported import from_exported

    model, example = from_exported(path)
    return Opened(model, path.stem, example=example)


def _from_hub(spec: str) -> Opened:
    from tersor.sources.huggingface import from_hub

    return from_hub(spec.removeprefix("hub:"))


_FILES = {".tersor": _from_tersor, ".pt2": _from_exported}


def _not_a_network(path: Path) -> str:
    weights = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz"}
    if path.suffix in weights:
        return (
            f"{path} holds weights without the network; write a function that builds the network "
            f"and loads them, and name it as file.py:factory"
        )
    return f"{path} is not a model; a model is {KINDS}"
