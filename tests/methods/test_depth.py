"""Depth: the block that changes least is skipped, and the network is as if it were not there."""

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import stories
import zoo
from surgery.test_couple import GPT2, IDS, VISION
from tersor.errors import OptionError, TaskError
from tersor.measure import divergence_of, macs, reference_outputs
from tersor.methods.cut.depth import depth
from tersor.surgery.skip import Skipped
from tersor.task import Task, classification


class Block(nn.Module):
    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.inner.weight, std=size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).relu()


def tower(*sizes: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(6, size) for size in sizes], nn.Linear(6, 4)).eval()


def task_of(n: int = 64) -> Task:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(1))
    return classification(calibration=x, holdout=x[:8])


def skipped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Skipped)]


@pytest.mark.parametrize("criterion", ["divergence", "influence"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_blocks_that_do_least_go_first(criterion, blocks):
    model = tower(0.5, 0.01, 1.0, 0.02)
    depth(model, task_of(), blocks=blocks, criterion=criterion)
    assert skipped(model) == sorted(["1", "3", "0"][:blocks])
    assert len(model) == 5


def test_influence_is_that_of_the_paper():
    # ShortGPT, eq. 1: 1 - E[x_in . x_out / (|x_in| |x_out|)].
    model, task = tower(0.5, 0.3, 0.4), task_of()
    (x,) = task.calibration()
    with torch.no_grad():
        out = model[0](x)
        influence = {}
        for name, block in list(model.named_children())[:3]:
            out = block(x)
            cosine = (x * out).sum(1) / (x.norm(dim=1) * out.norm(dim=1))
            influence[name], x = 1 - float(cosine.mean()), out
    first = min(influence, key=lambda name: influence[name])
    depth(model, task, criterion="influence")
    assert model.recipe.steps[0].outcome["skipped"] == {first: pytest.approx(influence[first])}


def test_divergence_is_what_the_network_without_the_block_shows():
    model, task = tower(0.5, 0.3, 0.4), task_of()
    answers = reference_outputs(model, task, task.calibration())
    found = {}
    for gone in range(3):
        shorter = copy.deepcopy(model)
        del shorter[gone]
        found[str(gone)] = divergence_of(shorter, task, task.calibration(), answers)
    first = min(found, key=lambda name: found[name])
    depth(model, task)
    assert model.recipe.steps[0].outcome["skipped"] == {first: pytest.approx(found[first])}
    assert model.recipe.steps[0].outcome["left"] == [name for name in "012" if name != first]


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_transformers_get_cheaper_by_whole_layers(name):
    if name == "gpt2":
        config = hf.GPT2Config(**{**GPT2, "n_layer": 4}, num_labels=3, pad_token_id=0)
        model, x = hf.GPT2ForSequenceClassification(config).eval(), IDS
    else:
        config = hf.ViTConfig(**{**VISION, "num_hidden_layers": 4}, num_labels=3)
        model, x = hf.ViTForImageClassification(config).eval(), torch.randn(4, 3, 64, 64)
    task = classification(calibration=x, holdout=x)
    before = macs(model, x).total
    one = depth(copy.deepcopy(model), task, blocks=1)
    two = depth(copy.deepcopy(model), task, blocks=2)
    saved = before - macs(one, x).total
    assert saved > 0
    assert before - macs(two, x).total == 2 * saved


def test_excluded_blocks_stay():
    model = tower(0.5, 0.01, 1.0, 0.02)
    depth(model, task_of(), exclude="1.*")
    assert skipped(model) == ["3"]
    model = tower(0.5, 0.01, 1.0, 0.02)
    depth(model, task_of(), include="2.*")
    assert skipped(model) == ["2"]


def test_what_cannot_be_skipped_is_refused():
    with pytest.raises(TaskError, match=r"cut\.depth needs inputs"):
        depth(tower(1, 1))
    with pytest.raises(OptionError, match=r"blocks=4: Sequential has 3 that can be skipped, 0, 1"):
        depth(tower(1, 1, 1, 1)[:4], task_of(), blocks=4)
    with pytest.raises(OptionError, match="blocks=1: Sequential has 0 that can be skipped; a bl"):
        depth(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), task_of())
    with pytest.raises(OptionError, match=r"blocks=0"):
        depth(tower(1, 1), task_of(), blocks=0)
    with pytest.raises(OptionError, match="exclude='nothing' matches no weight"):
        depth(tower(1, 1), task_of(), exclude="nothing")


def test_a_real_language_model_loses_a_layer(shared_data):
    model, task = zoo.stories260k().eval(), stories.task(calibration=8)
    before = task.calibration()[0].clone()
    depth(model, task, samples=8)
    assert len(skipped(model)) == 1
    assert model(before[:1]).isfinite().all()


def test_of_blocks_in_each_other_one_counts():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([tower(0.1, 0.2, 0.3)[:3] for _ in range(3)])
            self.out = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    for criterion in ("influence", "divergence"):
        model = depth(Nested().eval(), task_of(), blocks=3, criterion=criterion)
        found = skipped(model)
        assert len(found) == 3
        assert not any(a != b and a.startswith(f"{b}.") for a in found for b in found)


def test_a_block_that_goes_on_from_another_input_is_left():
    class Masked(Block):
        def forward(self, mask: Tensor, x: Tensor) -> Tensor:
            return x + self.inner(x * mask).relu()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([Masked(6, 0.1) for _ in range(3)])
            self.out = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones_like(x)
            for block in self.blocks:
                x = block(mask, x)
            return self.out(x)

    with pytest.raises(OptionError, match="has 0 that can be skipped"):
        depth(Net().eval(), task_of())


def test_a_head_in_the_list_is_no_block_that_stays():
    with pytest.raises(OptionError, match="has 3 that can be skipped"):
        depth(tower(0.1, 0.2, 0.3, 0.4), task_of(), blocks=4)
