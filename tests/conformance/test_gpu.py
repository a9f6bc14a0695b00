"""What every technique promises of a network on a GPU: there it stays, and nothing else differs."""

import os
from collections.abc import Iterator

# cuBLAS reads it when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from conformance.test_techniques import (
    DREAMS,
    RECOVERIES,
    SPEAKS,
    every_technique,
    ids,
    net,
    same,
    steps,
    stored_bits,
    task,
)
from tersor.codec import load, save
from tersor.forms import Form
from tersor.measure.running import whole_floats
from tersor.methods import run
from tersor.surgery import walk
from tersor.task import classification, language_model

__all__ = ["task"]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """The same sums in each run, and convolutions that do not round to eleven bits before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with whole_floats():
        yield
    torch.use_deterministic_algorithms(False)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.cpu() - other.cpu()).norm() <= 1e-4 * other.cpu().norm())


@every_technique
def test_a_network_stays_on_its_gpu_and_its_file_can_be_read_anywhere(name, task, tmp_path):
    done = run(net().cuda(), steps(name), task)
    assert {tensor.device.type for tensor in done.state_dict().values()} == {"cuda"}
    path = save(done, tmp_path / "done.tersor", example=ids(2))
    with torch.no_grad():
        expected = done(ids(5, 7).cuda())
        for loaded in (load(path), load(path, into=net())):
            assert close(loaded(ids(5, 7)), expected)
        assert close(load(path, into=net()).cuda()(ids(5, 7).cuda()), expected)
        assert close(load(path).cuda()(ids(5, 7).cuda()), expected)


@every_technique
def test_it_does_there_what_it_does_elsewhere(name, task):
    there, here = run(net().cuda(), steps(name), task), run(net(), steps(name), task)
    assert kinds(there) == kinds(here)
    assert stored_bits(there) == pytest.approx(stored_bits(here), rel=0.05)


def kinds(model: torch.nn.Module) -> dict[str, str | None]:
    """Of forms, by weight."""
    return {
        site.name: site.form.kind if isinstance(site.form, Form) else None for site in walk(model)
    }


@every_technique
def test_the_same_call_gives_the_same_bits_there(name, task):
    assert same(run(net().cuda(), steps(name), task), run(net().cuda(), steps(name), task))


@every_technique
def test_data_may_lie_on_the_gpu_too(name, task):
    on_gpu = {"calibration": ids(128, 100).cuda(), "holdout": ids(64, 101).cuda()}
    if name == SPEAKS:
        data = language_model(**on_gpu)
    elif name == DREAMS:
        data = classification(calibration=torch.zeros(8, 6, 24, device="cuda"))
    elif task.has_train:
        labels = (torch.arange(128) % 24).cuda()
        data = classification(train=(ids(128, 102).cuda(), labels), **on_gpu)
    else:
        data = classification(**on_gpu)
    done = run(net().cuda(), steps(name), data)
    assert same(done, run(net().cuda(), steps(name), task))


@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_the_original_may_be_elsewhere(name, task):
    compressed = run(net().cuda(), steps(name)[:1], task)
    done = run(compressed, steps(name)[1:], task, original=net())
    assert {tensor.device.type for tensor in done.state_dict().values()} == {"cuda"}
