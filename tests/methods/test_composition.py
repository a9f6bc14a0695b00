"""Every step's promise still holds at the end, in the file and in what is exported from it."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from tersor.codec import load, save
from tersor.errors import OptionError
from tersor.export import OnnxModel, to_onnx
from tersor.forms import NofM
from tersor.measure import macs
from tersor.methods import run
from tersor.surgery import walk
from tersor.task import Task, classification

STEPS = [
    {"method": "cut.channels", "options": {"keep": 0.8}},
    {"method": "factorize.svd", "options": {"keep": 0.8}},
    {"method": "prune.sparsegpt", "options": {"sparsity": "2:4"}},
    {"method": "quantize.gptq", "options": {"bits": 4}},
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def pictures(n: int, seed: int) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def task() -> Task:
    return classification(calibration=pictures(256, 1), holdout=pictures(64, 2))


def test_all_of_them_behind_each_other(task, tmp_path):
    model, x = net(), pictures(5, 3)
    done = run(model, STEPS, task)
    assert macs(done, x).total <= 0.8 * macs(model, x).total
    path = save(done, tmp_path / "small.tersor", example=x)
    with torch.no_grad():
        wanted = done(x)
        loaded, into = load(path), load(path, into=Net())
        assert torch.allclose(loaded(x), wanted, atol=1e-5)
        assert torch.equal(into(x), wanted)
    for network in (loaded, into):
        sites = walk(network)
        sparse = [s for s in sites if any(isinstance(f, NofM) for f in s.form.forms())]
        assert len(sparse) >= 2
        for site in sparse:
            groups = site.weight.flatten(1).unflatten(1, (-1, 4))
            assert int((groups != 0).sum(-1).max()) <= 2
        assert all(len(row.unique()) <= 15 for site in sites for row in site.weight)
    onnx = OnnxModel(to_onnx(loaded, tmp_path / "small.onnx", example=x).path)
    assert torch.allclose(onnx(x), wanted, atol=1e-4)


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(range(4), 2)])
def test_another_order_is_refused_before_anything_is_done(first, second, task):
    model = net()
    with pytest.raises(OptionError, match=r"step 2 of 2, .*: cannot follow .* move it before"):
        run(model, [STEPS[second], STEPS[first]], task)
