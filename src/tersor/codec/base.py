"""A file that another one counts changes from."""

from __future__ import annotations

from dataclasses import replace

from tersor.codec.chunks import counterpart, places_of, read_coded
from tersor.codec.geometry import as_coded, pieces
from tersor.codec.header import Kind
from tersor.codec.pack import MOST_CODE, encode_codes, encode_words, numpy_type, word_coders
from tersor.codec.runs import differences
from tersor.codec.shelf import Item
from tersor.codec.source import Place

_JUDGED = 2**17
"""Elements, about, by which it is judged whether changes are smaller."""


class Base:
    """What a file holds in place of the tensors of the next one."""

    def __init__(self, place: Place) -> None:
        self.header, self._arrays = read_coded(place)
        self._places = places_of(self.header)

    def compared(self, item: Item, kind: Kind | None) -> tuple[Item, Kind | None]:
        """See `Compared`."""
        index = counterpart(item.leaf, item.dtype, self.header, self._places)
        if kind is not None or index is None:
            return item, kind
        array = self._arrays[index]
        if array.tobytes() == item.array.tobytes():
            return item, Kind(item.dtype, None)
        changed = replace(item, base=array, center=0)
        return (changed if _smaller(changed, item) else item), None


def _smaller(changed: Item, item: Item) -> bool:
    """Whether the changes of a tensor take fewer bytes than the tensor."""
    matrix = item.leaf.matrix
    along = matrix.columns if matrix.rows == 1 else matrix.rows
    rows = max(1, along * _JUDGED // max(_JUDGED, matrix.size))
    _, shape = next(iter(pieces(matrix, rows if matrix.states == 1 or matrix.rows > 1 else None)))
    start = slice(0, shape.size)
    if item.sort != "words":
        changes = differences(changed)
        if int(abs(changes).max()) > MOST_CODE:
            return False
        simple = as_coded(shape, changed=True)
        plainly = encode_codes([differences(item)[start]], [shape], "small")
        return len(encode_codes([changes[start]], [simple], "small")) < len(plainly)
    if changed.base is None or numpy_type(item.dtype).kind != "u":
        return False
    words, base, dtype = item.array[start], changed.base[start], item.dtype
    itself = min(len(encode_words(words, shape, c, dtype)) for c in word_coders(dtype))
    return len(encode_words(words, shape, "planes", dtype, base)) < itself
