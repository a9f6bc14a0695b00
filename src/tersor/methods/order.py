"""The order of a recipe: cut or tie, factorize, transform, sparsify, quantize or share; recover.

Each step keeps what the steps before it made. In another order a later step would undo them.
"""

from collections.abc import Sequence

from tersor.errors import OptionError

_RANK = {
    "cut": 0,
    "share.layers": 0,
    "factorize": 1,
    "transform": 2,
    "prune": 3,
    "quantize": 4,
    "share": 4,
}
_WHY = {
    "share.layers": "it compares plain weights, and those of two forms are not told apart",
    "cut": "cutting channels changes the shapes that other forms were fitted to",
    "factorize": "factors of a weight have neither its zeros nor its codes",
    "transform": "it moves factors between weights, and what forms hold stays as it is",
    "prune": "the weights it keeps would be stored as floats again, and the codes be lost",
}


def check_order(before: Sequence[str], new: Sequence[str]) -> None:
    """Raises OptionError for a step of `new` that cannot come where it stands.

    before: names of the steps that the model has already been through
    """
    done = list(before)
    for number, name in enumerate(new, 1):
        family = name.partition(".")[0]
        where = f"step {number} of {len(new)}, {name}"
        if family == "recover" and not done:
            raise OptionError(
                f"{where}: nothing has been compressed yet, so there is nothing to recover; "
                "move it behind the first compressing step"
            )
        rank = _rank(name)
        later = [other for other in done if _rank(other) > rank]
        if rank >= 0 and later:
            why = _WHY[name if name in _WHY else family]
            raise OptionError(
                f"{where}: cannot follow {later[0]}, because {why}; "
                f"move it before {later[0]}"
                + ("" if later[0] in new else ", which this model has been through already")
            )
        done.append(name)


def _rank(name: str) -> int:
    """Of a technique, or else of its family; -1 for one that may stand anywhere."""
    return _RANK.get(name, _RANK.get(name.partition(".")[0], -1))
