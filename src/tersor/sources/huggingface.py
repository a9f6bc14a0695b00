"""Models in Hugging Face folders: the published class and weights, nothing pickled, no code run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tersor.errors import MissingExtra, ModelError
from tersor.sources.code import said
from tersor.sources.models import Opened

# What a model and its tokenizer need; a repository may hold gigabytes of other formats beside it.
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json", "*/*.safetensors"]


def from_hub(name: str) -> Opened:
    """Fetches `organization/name[@revision]` into the hub's own cache and opens it."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtra("hf", "huggingface_hub") from error
    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=WANTED)
    # The hub's client raises errors of its own, of the network and of the disk.
    except Exception as fault:
        raise ModelError(
            f"hub:{name} cannot be fetched: {said(fault)}. Check the name and the network, or give "
            "the path of a folder that was downloaded before"
        ) from fault
    return from_folder(Path(folder), name=repository.rpartition("/")[2])


def from_folder(folder: Path, *, name: str | None = None) -> Opened:
    """Opens a folder with config.json and safetensors weights, as float32.

    A folder of the hub's cache (models--org--name) and a sentence-transformers folder count too.
    """
    shown = name or folder.resolve().name
    folder = _transformer(_snapshot(folder))
    config = _config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(_no_weights(folder))
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra("hf", "transformers") from error
    loader = _loader(transformers, config, folder)
    with _quiet(transformers):
        try:
            model, loaded = loader.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        # Damaged weights and odd settings surface as errors of many types.
        except Exception as fault:
            raise ModelError(
                f"{folder} cannot be opened by transformers: {said(fault)}; check that config.json "
                "and the weights belong together"
            ) from fault
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}, among them "
            f"{missing[0]!r}, which would be random; save the model again in full"
        )
    return Opened(model, shown, folder=folder)


def _snapshot(folder: Path) -> Path:
    """The newest main revision inside a folder of the hub's cache."""
    reference = folder / "refs" / "main"
    if not (folder / "snapshots").is_dir():
        return folder
    if reference.is_file():
        return folder / "snapshots" / reference.read_text(encoding="utf-8").strip()
    revisions = sorted((folder / "snapshots").iterdir())
    if len(revisions) != 1:
        raise ModelError(f"{folder} has {len(revisions)} snapshots and no main; name one of them")
    return revisions[0]


def _transformer(folder: Path) -> Path:
    """The part of a sentence-transformers folder that holds the network."""
    modules = folder / "modules.json"
    if (folder / "config.json").is_file() or not modules.is_file():
        return folder
    try:
        inside: Path = folder / json.loads(modules.read_text(encoding="utf-8"))[0]["path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ModelError(f"{modules} names no network; name its folder instead") from error
    if not inside.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{modules} leads out of its folder; name the network's folder instead")
    return inside


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"the folder {folder} has no config.json, so it is not a Hugging Face model; name one "
            "that has, or write file.py:factory"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}; save the model again") from error
    return config if isinstance(config, dict) else {}


def _loader(transformers: Any, config: dict[str, Any], folder: Path) -> Any:
    names = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    found = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if found is not None and hasattr(found, "from_pretrained"):
        return found
    if names and config.get("auto_map"):
        raise ModelError(
            f"{folder} needs code of its own for {names[0]}, which is not run; write a factory "
            "that builds it, and name it as file.py:factory"
        )
    return transformers.AutoModel


def _no_weights(folder: Path) -> str:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if not pickled:
        return f"the folder {folder} has no weights (*.safetensors); download it in full"
    return (
        f"{folder} has its weights only in {pickled[0]}, a pickle, which can run code when it is "
        "opened and is refused; where you trust it, convert it with transformers: "
        f"AutoModel.from_pretrained({str(folder)!r}).save_pretrained(new_folder)"
    )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice while weights load; what matters becomes an error."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
