"""Whole-layer sharing: which blocks are alike, which share, and one weight for all that do."""

import copy
from itertools import combinations

import pytest
import torch
from torch import nn

from surgery.nets import NETS, make
from tersor.codec import load, save
from tersor.errors import OptionError, TaskError
from tersor.measure import divergence_of, reference_outputs
from tersor.methods import run
from tersor.methods.share.layers import alike, layers
from tersor.surgery import walk
from tersor.task import classification, regression


class Block(nn.Module):
    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Deep(nn.Module):
    """A list of blocks, of which the last two are wider inside, between two layers."""

    def __init__(self, narrow=4, wide=2):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        blocks = [Block() for _ in range(narrow)] + [Block(hidden=20) for _ in range(wide)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def deep(narrow=4, wide=2, seed=0):
    torch.manual_seed(seed)
    return Deep(narrow, wide).eval()


def task():
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
    return regression(calibration=x[:64], holdout=x[64:])


def weights_of(block):
    return [block.up.weight, block.down.weight]


def distinct(model):
    """How many different weights there are of two or more dimensions."""
    return len({id(p) for p in model.parameters() if p.dim() > 1})


@pytest.mark.parametrize(("size", "left"), [(0.9, 5), (0.7, 4), (0.5, 3), (0.37, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_no_more_bytes_remain_than_asked_for(size, left, seed):
    net = deep(seed=seed)
    before = {name: p.clone() for name, p in net.named_parameters()}
    total = sum(p.numel() for b in net.blocks for p in weights_of(b))
    layers(net, task(), size=size)
    kept = {id(p): p.numel() for b in net.blocks for p in weights_of(b)}
    outcome = net.recipe.steps[-1].outcome
    assert sum(kept.values()) / total == pytest.approx(outcome["size"])
    assert outcome["size"] <= size
    assert len(kept) / 2 <= left
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if parameter.dim() == 1 or name in ("first.weight", "last.weight"):
            assert torch.equal(parameter, before[name])
    for names in outcome["shared"]:
        first, *others = (net.get_submodule(name) for name in names)
        for other in others:
            assert all(a is b for a, b in zip(weights_of(first), weights_of(other), strict=True))


def test_blocks_with_equal_weights_share_for_nothing():
    net = deep(narrow=3, wide=0)
    for mine, theirs in zip(weights_of(net.blocks[2]), weights_of(net.blocks[0]), strict=True):
        mine.data.copy_(theirs.data)
    before = [p.clone() for p in weights_of(net.blocks[1])]
    layers(net, task(), size=0.7)
    assert net.recipe.steps[-1].outcome["shared"] == [["blocks.0", "blocks.2"]]
    assert net.recipe.steps[-1].outcome["divergence"] == 0
    for mine, old in zip(weights_of(net.blocks[1]), before, strict=True):
        assert torch.equal(mine, old)


def test_the_mean_of_two_worked_by_hand():
    # y = (1 + a)(1 + b) x at first; both 0.1 or 0.3 is 1.21 or 1.69 instead of 1.43, both 0.2 1.44.
    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[factor]]))

        def forward(self, x):
            return x + x * self.weight

    net = nn.Sequential(Times(0.1), Times(0.3)).eval()
    x = torch.linspace(-1, 1, 16)[:, None]
    layers(net, regression(calibration=x), size=0.5)
    assert net[0].weight is net[1].weight
    assert net[0].weight.item() == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(3))
def test_the_pair_and_its_weights_are_the_best_of_all(seed):
    net, data = deep(narrow=4, wide=0, seed=seed), task()
    batches = data.calibration()
    wanted = reference_outputs(net, data, batches)
    found = {}
    for one, other in combinations(range(4), 2):
        first, second = weights_of(net.blocks[one]), weights_of(net.blocks[other])
        mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        for kind, weights in enumerate((first, second, mean)):
            twin = copy.deepcopy(net)
            for block in (twin.blocks[one], twin.blocks[other]):
                for parameter, weight in zip(weights_of(block), weights, strict=True):
                    parameter.data.copy_(weight.data)
            found[one, other, kind] = divergence_of(twin, data, batches, wanted)
    one, other, _ = min(found, key=found.get)
    layers(net, data, size=0.75)
    outcome = net.recipe.steps[-1].outcome
    assert outcome["shared"] == [[f"blocks.{one}", f"blocks.{other}"]]
    assert outcome["divergence"] == pytest.approx(min(found.values()), rel=1e-4)


def test_a_file_gives_tied_blocks_back_into_a_fresh_network_and_without_its_code(tmp_path):
    net = layers(deep(), task(), size=0.4)
    path = save(net, tmp_path / "net.tersor", example=torch.randn(2, 6))
    plain = save(deep(), tmp_path / "plain.tersor", example=torch.randn(2, 6))
    assert path.stat().st_size < 0.8 * plain.stat().st_size
    x = torch.randn(5, 6)
    again = load(path, into=deep(seed=9))
    assert distinct(again) == distinct(net) < distinct(deep())
    for loaded in (again, load(path)):
        assert torch.allclose(loaded(x), net(x), atol=1e-6)
    for names in net.recipe.steps[-1].outcome["shared"]:
        first, *others = (again.get_submodule(name) for name in names)
        assert all(other.up.weight is first.up.weight for other in others)


def test_what_follows_keeps_blocks_tied():
    steps = [
        {"method": "share.layers", "options": {"size": 0.5}},
        {"method": "prune.magnitude", "options": {"sparsity": 0.5}},
        {"method": "share.kmeans", "options": {"values": 8}},
    ]
    done = run(deep(), steps, task())
    for names in done.recipe.steps[0].outcome["shared"]:
        first, *others = (done.get_submodule(name) for name in names)
        assert all(other.up.weight_form is first.up.weight_form for other in others)


def test_lists_within_blocks_are_left_to_their_blocks_and_ties_are_no_ones_own():
    net = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)),
    )
    groups = [[block.name for block in group] for group in alike(net, walk(net))]
    assert groups == [["0", "1"]]
    net[1][0].weight = net[0][0].weight
    groups = [[block.name for block in group] for group in alike(net, walk(net))]
    assert groups == [["0", "1"]]
    assert [site.name for site in alike(net, walk(net))[0][0].sites] == ["0.1.weight"]
    # Blocks that nothing is like are looked into.
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
    assert [[b.name for b in g] for g in alike(net, walk(net))] == [["0.0", "0.1"]]


@pytest.mark.parametrize("name", NETS)
def test_networks_without_alike_blocks_are_refused_unchanged(name):
    net, inputs = make(name)
    before = copy.deepcopy(net.state_dict()) if name != "old weight norm" else net.state_dict()
    with pytest.raises(OptionError, match="has no two blocks in one ModuleList or Sequential"):
        layers(net, regression(calibration=inputs))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_what_cannot_be_tied_is_refused():
    with pytest.raises(TaskError, match=r"share\.layers needs inputs"):
        layers(deep())
    with pytest.raises(OptionError, match=r"size=0.2 is below the 0.\d+ that one block of each"):
        layers(deep(), task(), size=0.2)
    rounded = run(deep(), [{"method": "quantize.rtn", "options": {}}])
    with pytest.raises(OptionError, match=r'"blocks.0.down.weight" .* is held as affine'):
        layers(rounded, task())
    with pytest.raises(
        OptionError, match=r"cannot follow quantize\.rtn, because it compares plain"
    ):
        run(rounded, [{"method": "share.layers", "options": {}}], task())
    with pytest.raises(OptionError, match="include='Conv9d'"):
        layers(deep(), task(), include="Conv9d")


@pytest.mark.parametrize("blocks", [7, 49])
def test_one_block_of_many_is_a_share_that_can_be_asked_for(blocks):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(blocks)]).eval()
    task = classification(calibration=torch.randn(16, 4))
    layers(model, task, size=1 / blocks)
    assert len({id(layer.weight) for layer in model}) == 1
