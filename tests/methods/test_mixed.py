"""Mixed precision: the bits are kept, the allocation is the best there is, and refining helps."""

import itertools

import pytest
import torch
from torch import nn

from tersor.errors import BudgetError, OptionError, TaskError
from tersor.forms import Affine, BlockFloat
from tersor.methods import run
from tersor.methods.quantize.mixed import mixed
from tersor.methods.quantize.rtn import rtn
from tersor.surgery import walk
from tersor.task import classification


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers).eval()


def task():
    generator = torch.Generator().manual_seed(1)
    return classification(calibration=torch.randn(128, 16, generator=generator))


def stored(model: nn.Module) -> int:
    return sum(-(-site.form.stored_bits() // 8) for site in walk(model))


def test_the_allocation_is_that_of_least_summed_divergence():
    from tersor.measure import sensitivity
    from tersor.methods.encoders import encoder
    from tersor.methods.layerwise import layers_of

    model, choices = net(), ["rtn 2", "rtn 4", "rtn 8"]
    layers = {
        layer.site.name: layer for layer in layers_of(model, task(), walk(model), samples=512)
    }
    options = {c: (lambda site, c=c: encoder(c)(layers[site.name])) for c in choices}
    rows = sensitivity(model, task(), options)
    named = [[r for r in rows if r.site == name] for name in layers]
    limit = 5.2 * sum(site.weight.numel() for site in walk(model)) / 8
    best = min(
        (p for p in itertools.product(*named) if sum(r.bytes for r in p) <= limit),
        key=lambda p: sum(r.divergence for r in p),
    )
    done = mixed(model, task(), bits=5.2, choices=choices, generations=0)
    found = done.recipe.steps[0].outcome["choices"]
    assert found == {r.site: r.option for r in best}


@pytest.mark.parametrize("bits", [2.7, 3.6, 5.0])
def test_the_bits_are_kept_and_refining_never_hurts(bits):
    done = mixed(net(), task(), bits=bits, generations=3)
    outcome = done.recipe.steps[0].outcome
    weights = sum(site.weight.numel() for site in walk(done))
    assert outcome["bits"] == pytest.approx(8 * stored(done) / weights)
    assert outcome["bits"] <= bits
    assert outcome["divergence_refined"] <= outcome["divergence_allocated"]


def test_each_weight_is_stored_as_its_choice_says():
    choices = ["gptq 2", "gptq 3 16", "nvfp4", "adaround 5", "rtn 8"]
    done = mixed(net(), task(), bits=4.9, choices=choices, generations=1)
    said = done.recipe.steps[0].outcome["choices"]
    for site in walk(done):
        name, *numbers = said[site.name].split()
        if name == "nvfp4":
            assert isinstance(site.form, BlockFloat)
        else:
            assert isinstance(site.form, Affine)
            assert site.form.bits == int(numbers[0])
            assert site.form.group_size == (int(numbers[1]) if len(numbers) > 1 else None)


def test_a_pruned_layer_keeps_its_zeros():
    steps = [
        {"method": "prune.magnitude", "options": {"sparsity": 0.5}},
        {"method": "quantize.mixed", "options": {"bits": 4.5, "choices": ["gptq 3", "rtn 6"]}},
    ]
    pruned, done = run(net(), steps[:1]), run(net(), steps, task())
    for before, after in zip(walk(pruned), walk(done), strict=True):
        assert not after.weight[before.weight == 0].any()


def test_what_cannot_be_is_refused():
    with pytest.raises(TaskError, match="needs inputs"):
        mixed(net())
    with pytest.raises(BudgetError, match=r"bits=1\.0 with choices=.*the smallest options"):
        mixed(net(), task(), bits=1.0)
    with pytest.raises(OptionError, match="choices has 'gptq'; a choice is one of"):
        mixed(net(), task(), choices=["gptq"])
    with pytest.raises(OptionError, match="choices has 'gptq 9'; bits are 2 to 8"):
        mixed(net(), task(), choices=["gptq 9"])
    with pytest.raises(OptionError, match="is held as affine already"):
        mixed(rtn(net()), task())
