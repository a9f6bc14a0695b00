"""Loads a proof's file where no model code can be imported, and compares outputs.

python bench/_reload.py <name> <folder>
"""

import json
import sys
from pathlib import Path

import torch

import tersor
from tersor.surgery import decoded

FORBIDDEN = ("zoo", "sentences", "cifar10", "stories", "speech", "transformers", "torchvision")


class _Refusing:
    """Makes importing any model code an error."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is model code, which this process must do without")


def main() -> None:
    """Writes reload.json: the largest difference, relative to the largest output, per batch."""
    sys.meta_path.insert(0, _Refusing())
    already = sys.modules.keys() & set(FORBIDDEN)
    if already:
        raise ImportError(f"{sorted(already)} are here already, so this would prove nothing")
    folder = Path(sys.argv[2])
    model = tersor.load(folder / "run" / "model.tersor")
    differences = {}
    for said, inputs, expected in torch.load(folder / "outputs.pt", weights_only=True):
        with torch.inference_mode(), decoded(model):
            found = call(model, inputs)
        pairs = list(zip(found, expected, strict=True))
        differences[said] = max(
            ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs
        )
    content = {
        "largest_relative_difference": max(differences.values()),
        "relative_difference": differences,
    }
    (folder / "reload.json").write_text(json.dumps(content), encoding="utf-8")


def call(model: torch.nn.Module, inputs: object) -> list[torch.Tensor]:
    """Every tensor of the model's answer."""
    if isinstance(inputs, dict):
        answer = model(**inputs)
    else:
        answer = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    leaves = torch.utils._pytree.tree_leaves(answer)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


if __name__ == "__main__":
    main()
