"""Matching: which block of a student stands for which of its teacher.

Source: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, section 3.1, for the uniform mapping
g(m) = m N / M of M student blocks onto N of the teacher.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import chain

from torch import nn

from tersor.errors import ModelError, OptionError
from tersor.surgery.skip import Skipped

Pair = tuple[str, str]
"""Paths of a student's layer and of its teacher's."""


def matched(
    name: str, model: nn.Module, original: nn.Module, pairs: Mapping[str, str] | None
) -> list[Pair]:
    """Pairs of layers: those given, or blocks mapped uniformly, list by list if there are as many.

    name: of the method
    pairs: paths in the student -> paths in the teacher

    A block that was skipped counts where it stood, so that the others keep to their namesakes.
    Raises OptionError for a path without a layer, ModelError where no blocks are found.
    """
    if pairs is not None:
        return named(model, original, pairs)
    students, teachers = blocks(model), blocks(original)
    for network, role, found in ((model, "student", students), (original, "teacher", teachers)):
        if not found:
            raise ModelError(
                f"{name} finds no repeated blocks in the {role}, {type(network).__name__}; name "
                'layers with pairs={"layer of the student": "layer of the teacher"}, or use '
                "distill.logits"
            )
    if len(students) != len(teachers):
        students, teachers = [list(chain(*students))], [list(chain(*teachers))]
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        (own, theirs)
        for small, large in zip(students, teachers, strict=True)
        for own, theirs in zip(small, uniform(small, large), strict=True)
        if not isinstance(modules[own], Skipped)
    ]


def named(model: nn.Module, original: nn.Module, pairs: Mapping[str, str]) -> list[Pair]:
    """The pairs that a caller gave. Raises OptionError for none, or a path without a layer."""
    if not pairs:
        raise OptionError(f"pairs={dict(pairs)!r} names no layer; leave it out to match blocks")
    for network, role, paths in (
        (model, "student", pairs),
        (original, "teacher", pairs.values()),
    ):
        known = [path for path, _ in network.named_modules(remove_duplicate=False) if path]
        for path in paths:
            if path not in known:
                near = get_close_matches(path, known, 1) or known[:1]
                raise OptionError(
                    f"pairs={dict(pairs)!r}: the {role} has no layer {path!r}; use one of its "
                    f"{len(known)} names, as {near[0] if near else ''!r}"
                )
    return list(pairs.items())


def uniform(small: Sequence[str], large: Sequence[str]) -> list[str]:
    """Of each place in `small` the one in `large`: g(m) = m N / M, rounded, both from 1."""
    few, many = len(small), len(large)
    places = (max(1, (2 * place * many + few) // (2 * few)) for place in range(1, few + 1))
    return [large[place - 1] for place in places]


def blocks(model: nn.Module) -> list[list[str]]:
    """Paths of the outermost repeated blocks, list by list; skipped ones hold their places.

    A block is a child of a list or sequence that is made of layers itself, and not the only one of
    its class; of a list that holds several classes, the one with most parameters. Where nothing is
    repeated, a plain sequence is a block too, and so is all that stands alone in a list.
    """
    return (
        _blocks(model, plain=False)
        or _blocks(model, plain=True)
        or _blocks(model, plain=False, alone=True)
    )


_SKIPPED = "Skipped"


def _blocks(model: nn.Module, *, plain: bool, alone: bool = False) -> list[list[str]]:
    lists: list[dict[str, nn.Module]] = []
    for path, owner in model.named_modules():
        inner = any(path == child or path.startswith(f"{child}.") for f in lists for child in f)
        kinds = nn.ModuleList if alone else nn.ModuleList | nn.Sequential
        if isinstance(owner, kinds) and not inner:
            children = ((f"{path}.{n}".removeprefix("."), c) for n, c in owner.named_children())
            lists.append({p: c for p, c in children if _composed(c, plain=plain)})
    times = Counter(_kind(child) for found in lists for child in found.values())
    # Of a list that was cut down to one block, the others hold their places.
    several = {kind for kind, n in times.items() if n > 1 or alone or _SKIPPED in times}
    chosen = ((found, _largest(found, several - {_SKIPPED})) for found in lists)
    kept = ([p for p, c in f.items() if _kind(c) in (kind, _SKIPPED)] for f, kind in chosen if kind)
    return [paths for paths in kept if paths]


def _largest(found: Mapping[str, nn.Module], kinds: set[str]) -> str | None:
    """Of these classes the one with most parameters in a list; None where there is none."""
    sizes: Counter[str] = Counter()
    for child in found.values():
        if _kind(child) in kinds:
            sizes[_kind(child)] += sum(p.numel() for p in child.parameters())
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else None


def _kind(module: nn.Module) -> str:
    return _SKIPPED if isinstance(module, Skipped) else type(module).__qualname__


def _composed(module: nn.Module, *, plain: bool) -> bool:
    if not plain and type(module) in (nn.Sequential, nn.ModuleList):
        return False
    layers = any(True for _ in module.children()) and any(True for _ in module.parameters())
    return layers or isinstance(module, Skipped)
