"""What a form takes in a file, without writing one."""

from __future__ import annotations

from torch import Tensor

from tersor.codec.contents import described
from tersor.codec.leaves import leaves_of
from tersor.codec.runs import encoded
from tersor.codec.shelf import Shelf
from tersor.forms import Form


def coded_bytes(form: Form) -> int:
    """Bytes that the tensors of `form` take in a file when each is coded by itself."""
    tensors: list[Tensor] = []
    shelf = Shelf(list(leaves_of(described(form, "", tensors), "")), tensors)
    return sum(sum(encoded(run, "small")[0].lengths) for run in shelf.runs)
