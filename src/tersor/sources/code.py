"""Python objects by name: `file.py:name` and `package.module:name`.

This runs the code that is named, exactly as `import` would: name only code that you trust.
"""

import importlib
import importlib.util
import inspect
import sys
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from tersor.errors import CompressError


def made_by(spec: str, error: type[CompressError]) -> Any:
    """Imports the module of `spec`, calls what it names without arguments, returns the result.

    Something that is not callable is returned as it is. Raises `error`, saying what went wrong.
    """
    place, _, name = spec.rpartition(":")
    module = imported(place or name, error)
    if not place or not hasattr(module, name):
        missing = f"has no {name!r}" if place else "is a whole module"
        raise error(f"{place or name} {missing}; {_offer(place or name, module, meant=name)}")
    found = getattr(module, name)
    if not callable(found) or _is_model(found):
        return found
    needed = _needed(found)
    if needed:
        raise error(
            f"{spec} needs the arguments {', '.join(needed)}; name a function that needs none"
        )
    try:
        return found()
    except CompressError:
        raise
    except Exception as fault:
        raise error(
            f"{spec} was called and raised {said(fault)}; call it in Python to see where"
        ) from fault


def imported(place: str, error: type[CompressError]) -> ModuleType:
    """The module at a path that ends in .py, or of that name. Raises `error`."""
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise error(f"{place} does not exist; check the path, which starts from {Path.cwd()}")
    try:
        return _from_file(Path(place)) if is_file else _from_name(place)
    except CompressError:
        raise
    # SystemExit: a script without a main guard may call sys.exit while it is imported.
    except (Exception, SystemExit) as fault:
        command = f"python {place}" if is_file else f"python -c 'import {place}'"
        raise error(f"{place} does not import: {said(fault)}; `{command}` shows where") from fault


def said(fault: BaseException) -> str:
    """An exception as its type and the first line of what it says."""
    lines = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {lines[0]}" if lines else type(fault).__name__


def _from_file(path: Path) -> ModuleType:
    path = path.resolve()
    # Neighbours import as they do when the file is run.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    if known is not None or (importlib.util.find_spec(name) is not None and not _is_at(name, path)):
        name = f"{path.parent.name}_{path.stem}_from_file"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_name(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _is_at(name: str, path: Path) -> bool:
    found = importlib.util.find_spec(name)
    return found is not None and found.origin == str(path)


def _offer(place: str, module: ModuleType, *, meant: str) -> str:
    """What the module defines that could have been meant: callables without needed arguments."""
    names = sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (_is_model(value) or (_is_own(value, module) and not _needed(value)))
    )
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    if not names:
        return "it defines no function that can be called without arguments; write one"
    closest = [*get_close_matches(meant, names, 1), names[0]][0]
    return f"it has {shown}: write {place}:{closest}"


def _is_own(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _is_model(value: Any) -> bool:
    from torch import nn

    return isinstance(value, nn.Module)


def _needed(function: Any) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
