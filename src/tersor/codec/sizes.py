"""What a form takes in a file, without writing one."""

from __future__ import annotations

from torch import Tensor

from tersor.codec.contents import described
from tersor.codec.header import placed
from tersor.codec.shelf import Shelf
from tersor.forms import Form


def coded_bytes(form: Form) -> int:
    """Bytes that the tensors of `form` take in a file when each is coded by itself."""
    tensors: list[Tensor] = []
    shelf = Shelf("small")
    for leaf in placed(described(form, "", tensors), ""):
        shelf.put(tensors[len(shelf)], leaf.matrix)
    shelf.sort()
    return sum(len(chunk) for _, chunks in shelf.runs() for chunk in chunks)
