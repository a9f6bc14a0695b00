"""For research: each technique as a plain function, recipes as plain data, a form held by hand.

python examples/one_technique.py
"""

import copy
from pathlib import Path

from torch import nn

import digits
import tersor
from tersor.forms import Affine
from tersor.measure import quality, size
from tersor.methods.prune.magnitude import magnitude
from tersor.methods.quantize.rtn import rtn
from tersor.methods.recover.batchnorm import batchnorm
from tersor.recipe import recipe_of
from tersor.surgery import hold, walk


def show(what: str, model: nn.Module, task: tersor.Task) -> None:
    """One line: size and accuracy."""
    kilobytes = size(model).total_bits / 8000
    accuracy = quality(model, task)["accuracy"]
    print(
        f"{what:34}{kilobytes:7.1f} kB   accuracy {accuracy.value:.1f} "
        f"({accuracy.low:.1f} to {accuracy.high:.1f})"
    )


def main() -> None:
    """Four ways to use one technique, on a network trained here."""
    model, task = digits.model(), digits.task()
    show("original", model, task)

    # A technique is a function that changes the model it is given; it notes itself on the model.
    pruned = magnitude(copy.deepcopy(model), sparsity=0.5, exclude="Linear")
    small = rtn(pruned, bits=4)
    show("half pruned, then 4 bits", small, task)
    small = batchnorm(small, task, original=model)
    show("and its batch norms corrected", small, task)
    for step in recipe_of(small).steps:
        print(f"    {step.method} {step.options}")

    # A recipe is a list; `run` checks all of it first and works on a copy of the model.
    steps = [
        {"method": "quantize.rtn", "options": {"bits": 3}},
        {"method": "recover.batchnorm", "options": {}},
    ]
    recovered = tersor.run(model, steps, task)
    show("3 bits", tersor.run(model, steps[:1]), task)
    show("3 bits, batch norms corrected", recovered, task)

    # The file remembers its recipe, so the next training run can be treated alike.
    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    path = tersor.save(recovered, folder / "digits-3-bits.tersor", example=task.example())
    again = tersor.replay(digits.model(epochs=15), path, task)
    show("the same, trained longer", again, task)

    # A form can be held by hand: 5 bits for the widest weight, 8 for the others.
    by_hand = copy.deepcopy(model)
    widest = max(walk(by_hand), key=lambda site: site.weight.numel())
    for site in walk(by_hand):
        bits = 5 if site.name == widest.name else 8
        for layer, attribute in site.uses:
            hold(layer, attribute, Affine.encode(site.weight, bits=bits, axis=site.axis))
    show("8 bits, 5 for the widest", by_hand, task)


if __name__ == "__main__":
    main()
