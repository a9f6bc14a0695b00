"""job.yaml: the arguments of `tersor compress` in a file."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tersor.errors import OptionError


class Job(BaseModel):
    """A model, data and a budget. Paths start from the folder that tersor is run in.

    budget: "size=0.15x, drop=0.5", or the same as a mapping
    recipe: steps, or a file that holds them; None has them searched for
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    data: str | None = None
    budget: str | dict[str, Any] = "size=0.25x"
    out: str | None = None
    recipe: str | list[dict[str, Any]] | None = None
    profile: str = "small"
    seed: int = 0


def read_job(path: Path) -> Job:
    """Reads a job file. Raises OptionError naming the field that is wrong."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OptionError(
            f"{path} does not exist; check the path, which starts from {Path.cwd()}"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(
            f"{path} holds no fields; write, for example, model: net.py:make and budget: size=0.2x"
        )
    try:
        return Job.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        reason = {
            "extra_forbidden": f"is no field of a job; these are: {', '.join(Job.model_fields)}",
            "missing": "is missing; every job names its model",
        }.get(first["type"], f"{first['msg'].lower()}, not {first['input']!r:.60}")
        raise OptionError(f"{path}: {name!r} {reason}") from error
