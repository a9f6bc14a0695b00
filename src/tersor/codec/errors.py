"""What goes wrong while a file is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tersor.errors import FileError

_DAMAGED = "the file was damaged on its way or altered; get it again from where it came from"


class Unreadable(ValueError):
    """Bytes that no writer makes; the message is a sentence about them."""


@contextmanager
def about(name: str) -> Iterator[None]:
    """Turns what goes wrong while reading the file `name` into one FileError that names it."""
    try:
        yield
    except FileError as error:
        raise FileError(f"{name}: {error}") from None
    except Unreadable as error:
        raise FileError(f"{name} is not usable: {error}; {_DAMAGED}") from None
    except FileNotFoundError:
        raise FileError(f"{name} does not exist; check the path") from None
    except OSError as error:
        raise FileError(
            f"{name} cannot be read: {error.strerror or error}; give a .tersor file"
        ) from error


def whole(value: Any) -> bool:
    """Whether a JSON value is a whole number from 0."""
    return type(value) is int and 0 <= value < 2**62


def expect(held: bool, rule: str) -> None:
    """Raises Unreadable with `rule` unless it held."""
    if not held:
        raise Unreadable(rule)
