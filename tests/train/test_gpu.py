"""Training on a GPU: in half precision, from a checkpoint, with a teacher, and in processes.

This file is also the program of two processes on one GPU: `python THIS rank folder`.
"""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersor.methods import run
from tersor.task import classification
from tersor.train import Labels, Teacher, TrainingLog, fit
from tersor.train.distributed import (
    TORCH_HOOKS,
    Averaging,
    DiLoCo,
    Int8,
    LocalUpdates,
    Portion,
    add_hook,
    add_torch_hook,
    shard,
    world,
)
from train.processes import results_of
from train.toys import (
    COMPRESSORS,
    FLAT,
    WORKERS,
    Blocks,
    adam,
    always_better,
    blobs,
    close,
    lessons,
    looped,
    loss_of,
    net,
    sgd,
    simulated,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Stop(Exception):
    pass


def plain() -> nn.Module:
    torch.manual_seed(0)
    parts = (nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 3))
    return nn.Sequential(*parts)


def trained(precision="float32", *, folder=None, stop=None, device="cuda", epochs=6):
    """On 12 batches an epoch; with a folder it is kept behind each of them."""
    model = plain().train().to(device)
    torch.manual_seed(1)
    task = classification(train=blobs(), batch_size=8)
    labels, seen = Labels(task), []

    def loss(lesson):
        seen.append(None)
        if len(seen) == stop:
            raise Stop
        return labels.loss(task.predict(model, lesson.inputs), lesson)

    fitted = fit(
        model,
        torch.optim.Adam(model.parameters(), lr=0.02),
        labels,
        loss,
        epochs=epochs,
        judge=None,
        generator=torch.Generator().manual_seed(0),
        training={"ema": 0.9, "precision": precision},
        log=TrainingLog(folder, minutes=0, show=False),
    )
    return model.eval(), fitted


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_it_learns_in_each_precision_and_weights_stay_whole(precision):
    model, fitted = trained(precision)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    with torch.no_grad():
        x, y = blobs()
        assert (model(x.cuda()).argmax(1).cpu() == y).float().mean() > 0.93
    assert fitted.steps == 72


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stop", [1, 5, 13, 40])
def test_where_it_stops_makes_no_difference(precision, stop, tmp_path):
    expected, whole = trained(precision)
    with pytest.raises(Stop):
        trained(precision, folder=tmp_path, stop=stop)
    model, fitted = trained(precision, folder=tmp_path)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert fitted == whole


def test_what_was_begun_on_a_gpu_can_be_ended_without_one(tmp_path):
    with pytest.raises(Stop):
        trained(folder=tmp_path, stop=40)
    model, fitted = trained(folder=tmp_path, device="cpu")
    assert fitted.steps == 72
    with torch.no_grad():
        x, y = blobs()
        assert (model(x).argmax(1) == y).float().mean() > 0.93


def test_answers_of_a_teacher_on_a_gpu_are_kept_on_disk(tmp_path):
    teacher, task = plain().eval().cuda(), classification(train=blobs(), batch_size=8)

    def answers(network):
        lessons = Teacher(network, task, folder=tmp_path)
        return [lesson.answer for lesson in lessons.epoch(torch.Generator().manual_seed(0))]

    first, again = answers(teacher), answers(teacher)
    assert list(tmp_path.iterdir())
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, again, strict=True))
    student = run(
        plain().eval().cuda(),
        [{"method": "distill.logits", "options": {"epochs": 2}}],
        task,
        original=teacher.cpu(),
    )
    assert next(student.parameters()).device.type == "cuda"


def by_regime(name):
    model, regime = net(seed=world()[0]).cuda(), Averaging(COMPRESSORS[name]())
    fitted(model, regime, sgd)
    return model.cpu().state_dict(), regime.traffic.sent


def by_hook(name):
    model = net().cuda()
    parallel = DistributedDataParallel(model)
    traffic = add_hook(parallel, COMPRESSORS[name]())
    looped(OnGpu(parallel))
    return model.cpu().state_dict(), traffic.sent


def by_torch(name):
    model = net().cuda()
    parallel = DistributedDataParallel(model)
    traffic = add_torch_hook(parallel, name, rank=1)
    looped(OnGpu(parallel))
    return model.cpu().state_dict(), traffic.sent


def by_local_updates():
    model, regime = net(seed=world()[0]).cuda(), LocalUpdates(DiLoCo(every=2, compressor=Int8()))
    fitted(model, regime, adam)
    return model.cpu().state_dict(), regime.traffic.sent


def by_shards():
    model = shard(Blocks().cuda())
    looped(OnGpu(model))
    whole = {key: value.full_tensor().cpu() for key, value in model.state_dict().items()}
    return {key.removeprefix("blocks."): value for key, value in whole.items()}, 0


class OnGpu(nn.Module):
    """Takes inputs from the CPU and gives outputs back there."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.cuda()).cpu()


def fitted(model, regime, optimizer):
    """Two epochs of this process's rows."""
    fit(
        model,
        optimizer(model),
        Portion(lessons(), *world()),
        partial(loss_of, OnGpu(model)),
        epochs=2,
        judge=always_better(),
        generator=torch.Generator().manual_seed(1),
        training=FLAT,
        regimes=[regime],
    )


def ends_of_all():
    """What each way of training together comes to."""
    found = {("regime", name): by_regime(name) for name in COMPRESSORS}
    found |= {("hook", name): by_hook(name) for name in COMPRESSORS}
    found |= {("torch", name): by_torch(name) for name in TORCH_HOOKS}
    found["local"] = by_local_updates()
    if distributed.get_backend() == "nccl":
        # Over gloo torch 2.11 itself breaks down where it gathers shards from a GPU.
        found["shards"] = by_shards()
    return found


def main(rank: int, folder: Path) -> None:
    """Alone over NCCL, which takes no two processes on one GPU, or both over gloo."""
    torch.set_num_threads(1)
    workers = int(os.environ["WORKERS"])
    distributed.init_process_group(
        "nccl" if workers == 1 else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=workers,
        device_id=torch.device("cuda", 0) if workers == 1 else None,
    )
    torch.save(ends_of_all(), folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def ends(workers, folder, monkeypatch):
    """By rank."""
    monkeypatch.setenv("WORKERS", str(workers))
    return results_of(__file__, folder, workers)


@pytest.mark.parametrize("workers", [1, WORKERS])
def test_processes_on_gpus_do_what_is_simulated_without(workers, tmp_path, monkeypatch):
    found = ends(workers, tmp_path, monkeypatch)
    for name in COMPRESSORS:
        model, traffic = simulated(COMPRESSORS[name](), workers=workers)
        for way in ("regime", "hook"):
            state, sent = found[0][way, name]
            assert close(state, model.state_dict(), 1e-3), (way, name)
            assert close(state, found[-1][way, name][0], 0), (way, name)
            assert sent == traffic.sent
    if workers == 1:
        model, _ = simulated(COMPRESSORS["none"](), workers=workers)
        assert close(found[0]["shards"][0], model.state_dict(), 1e-4)
    assert close(found[0]["local"][0], found[-1]["local"][0], 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
