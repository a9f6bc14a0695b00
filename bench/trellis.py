"""Trellis codes at 1 to 4 bits: error on N(0, 1), and networks at 2 to 4 bits.

    python bench/trellis.py                    all (half an hour on two cores)
    python bench/trellis.py normal stories     some, merged into bench/results/trellis.json

Weights in kB or MB count every stored bit before entropy coding: codes, scales, embeddings, and
biases and norms as float32. Networks are judged on data that steered nothing.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from _record import RESULTS, record
from smallest import pairs
from torch import nn

import sentences
import stories
import zoo
from tersor.forms.bitshift import states, values
from tersor.measure import divergence_of, quality, reference_outputs
from tersor.methods import run
from tersor.methods.ldlq import SPREAD
from tersor.methods.viterbi import nearest_rings
from tersor.surgery import decoded, walk

RINGS, LENGTH = 200, 256


def normal() -> dict[str, Any]:
    """Mean squared error on N(0, 1), and the processor time of one ring."""
    numbers = torch.randn(RINGS, LENGTH, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for state_bits in (12, 14, 16):
        for bits in (1, 2, 3, 4):
            wanted = numbers * SPREAD[bits]
            started = time.process_time()
            codes = nearest_rings(wanted, torch.ones(1, 1), bits=bits, state_bits=state_bits)
            seconds = time.process_time() - started
            apart = (wanted - values(states(codes, bits, state_bits))) / SPREAD[bits]
            found[f"{bits} bits, {state_bits} state bits"] = {
                "error": round(float(apart.square().mean()), 5),
                "shannon": 2.0 ** (-2 * bits),
                "ms_per_ring": round(1000 * seconds / RINGS, 2),
            }
    torch.set_num_threads(threads)
    return found


def llama() -> dict[str, Any]:
    """Perplexity of stories260K, its embedding at 8 bits and the rest at 2 to 4."""
    task = stories.task(128)
    found = {}
    for bits in (2, 3, 4):
        recipe = [
            {"method": "quantize.rtn", "options": {"bits": 8, "include": "tok_embeddings"}},
            _trellis(bits, 16, 128, "tok_embeddings"),
        ]
        found |= _curve(f"{bits} bits", zoo.stories260k(), task, recipe, epochs=4)
    return found


def encoder() -> dict[str, Any]:
    """MiniLM, linear layers at 2 bits and embeddings at 4: cosine to what it was, and Spearman."""
    model, task = sentences.model(), pairs()
    model.pooler = None
    recipe = [
        {
            "method": "quantize.rtn",
            "options": {"bits": 4, "group_size": 64, "include": "embeddings.*"},
        },
        _trellis(2, 12, 512, "embeddings.*"),
    ]
    return _curve("2 bits", model, task, recipe, epochs=2)


def rotation() -> dict[str, Any]:
    """How far folded rotations move the outputs of stories260K."""
    done = run(zoo.stories260k(), [{"method": "transform.rotate"}], stories.task(8))
    return dict(done.recipe.steps[0].outcome)  # type: ignore[union-attr]


def _trellis(bits: int, state_bits: int, samples: int, exclude: str) -> dict[str, Any]:
    options = {"bits": bits, "state_bits": state_bits, "samples": samples, "exclude": exclude}
    return {"method": "quantize.trellis", "options": options}


def _curve(
    name: str, model: nn.Module, task: Any, recipe: list[Any], *, epochs: int
) -> dict[str, Any]:
    """What the recipe makes of a network, and what training its scales makes of that."""
    tuning = {"method": "recover.scales", "options": {"epochs": epochs}}
    inputs = [batch for batch, _ in task.test()]
    reference = reference_outputs(model, task, inputs)
    found, done = {}, copy.deepcopy(model)
    for steps in (recipe, [tuning]):
        started = time.perf_counter()
        done = run(done, steps, task, original=model)
        seconds = time.perf_counter() - started
        with decoded(done):
            figures = {k: round(v.value, 3) for k, v in quality(done, task).items()}
            away = divergence_of(done, task, inputs, reference)
        name = name if steps is recipe else f"{name}, scales trained"
        found[name] = {
            "bytes": _stored_bits(done) / 8,
            "divergence": round(away, 5),
            **figures,
            "seconds": round(seconds, 1),
        }
        print(name, found[name], flush=True)
    return found


def _stored_bits(model: nn.Module) -> int:
    forms = [site.form for site in walk(model)]
    vectors = sum(p.numel() * 32 for p in model.parameters() if p.dim() == 1 and p.requires_grad)
    return sum(form.stored_bits() for form in forms if form is not None) + vectors


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "normal": normal,
    "rotation": rotation,
    "stories": llama,
    "minilm": encoder,
}


def main() -> None:
    """Measures the chosen parts and records them."""
    parser = argparse.ArgumentParser(description="Trellis codes.")
    parser.add_argument("names", nargs="*", metavar="part", help=f"among {list(PARTS)}")
    chosen = parser.parse_args().names or list(PARTS)
    path = RESULTS / "trellis.json"
    figures = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}
    for name in chosen:
        print(f"== {name}", flush=True)
        figures[name] = PARTS[name]()
        record("trellis", figures)


if __name__ == "__main__":
    main()
