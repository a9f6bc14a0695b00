"""Two real processes over gloo. They run once, all scenarios in a row; tests read what came of it.

This file is also the program of those processes: `python THIS rank folder`.
"""

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tersor.errors import OptionError
from tersor.train import TrainingLog, fit
from tersor.train.distributed import (
    TORCH_HOOKS,
    Averaging,
    DiLoCo,
    Int8,
    LocalUpdates,
    Portion,
    TopK,
    Uncompressed,
    add_hook,
    add_torch_hook,
    agreed,
    in_processes,
    shard,
    simulate_local,
    together,
    world,
)
from train.processes import results_of
from train.toys import (
    COMPRESSORS,
    EPOCHS,
    FLAT,
    WORKERS,
    Blocks,
    adam,
    always_better,
    close,
    lessons,
    looped,
    loss_of,
    net,
    sgd,
    simulated,
)

LOCAL = DiLoCo(every=2, compressor=Int8())


def fitted(model, regime, optimizer, *, first=99, log=None) -> None:
    """Two epochs of this process's rows."""
    fit(
        model,
        optimizer(model),
        Portion(lessons(), *world()),
        partial(loss_of, model),
        epochs=EPOCHS,
        judge=always_better(first),
        generator=torch.Generator().manual_seed(1),
        training=FLAT,
        regimes=[regime],
        log=log,
    )


def end_of(model, sent=0) -> dict:
    return {"state": {k: v.clone() for k, v in model.state_dict().items()}, "sent": sent}


def by_regime(name: str) -> dict:
    # Processes start apart, and `begin` brings them together.
    model, regime = net(seed=world()[0]), Averaging(COMPRESSORS[name]())
    fitted(model, regime, sgd)
    return end_of(model, regime.traffic.sent)


def by_hook(name: str) -> dict:
    model = net()
    parallel = DistributedDataParallel(model)
    traffic = add_hook(parallel, COMPRESSORS[name]())
    looped(parallel)
    return end_of(model, traffic.sent)


def by_torch(name: str, start: int = 1000) -> dict:
    model = net()
    parallel = DistributedDataParallel(model)
    traffic = add_torch_hook(parallel, name, rank=1, start=start)
    looped(parallel)
    return end_of(model, traffic.sent)


def by_local_updates() -> dict:
    model, regime = net(seed=world()[0]), LocalUpdates(LOCAL)
    fitted(model, regime, adam)
    return end_of(model, regime.traffic.sent)


def by_shards() -> dict:
    model = shard(Blocks())
    looped(model)
    return {"state": {k: v.full_tensor() for k, v in model.state_dict().items()}, "sent": 0}


def with_batch_norm() -> dict:
    model = net(norm=True).train()
    fitted(model, Averaging(Uncompressed()), sgd)
    return end_of(model)


def killed_and_resumed(folder: Path) -> dict:
    """A training that stops after four of six steps, and goes on from what both had kept."""
    folder = folder / f"log{world()[0]}"

    class Stop(Averaging):
        def after(self, step):
            if step == 3:
                raise KeyboardInterrupt

    together._ASKING = 1
    log = TrainingLog(folder, minutes=0, show=False)
    with suppress(KeyboardInterrupt):
        fitted(net(), Stop(TopK(0.1)), sgd, log=log)
    if world()[0] == 1:
        # As if it had been killed before it kept the last one.
        log.spare.replace(log.path)
    model, regime = net(), Averaging(TopK(0.1))
    fitted(model, regime, sgd, first=9, log=log)
    return end_of(model, regime.traffic.sent)


def refusals() -> dict:
    """What processes say about networks and gradients that differ."""
    found = {}
    rank = world()[0]
    try:
        Averaging(TopK()).begin(nn.Linear(2, 3 + rank), 1)
    except OptionError as error:
        found["networks"] = str(error)
    log = TrainingLog(f"{rank}", show=False) if rank else None
    try:
        fitted(net(), Averaging(TopK()), sgd, log=log)
    except OptionError as error:
        found["logs"] = str(error)
    own = agreed(lambda: float(rank))()
    return {"said": found, "agreed": own}


def main(rank: int, folder: Path) -> None:
    """All scenarios, with results in the folder."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS
    )
    results = {("regime", name): by_regime(name) for name in COMPRESSORS}
    results |= {("hook", name): by_hook(name) for name in COMPRESSORS}
    results |= {("torch", name): by_torch(name) for name in TORCH_HOOKS}
    results["early"] = by_torch("powerSGD", 2)
    results["local"] = by_local_updates()
    results["shards"] = by_shards()
    results["norm"] = with_batch_norm()
    results["resumed"] = killed_and_resumed(folder)
    results["refusals"] = refusals()
    torch.save(results, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Results of both processes, by scenario."""
    return results_of(__file__, tmp_path_factory.mktemp("processes"), WORKERS)


@pytest.mark.parametrize("way", ["regime", "hook"])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_rank_ends_with_the_same_weights_as_in_the_simulation(ends, way, name):
    first, second = (end[way, name] for end in ends)
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    model, traffic = simulated(COMPRESSORS[name]())
    assert close(first["state"], model.state_dict(), 1e-4)
    assert first["sent"] == second["sent"] == traffic.sent


def test_torchs_own_hooks_are_reached_by_name(ends):
    model, _ = simulated(Uncompressed())
    for name in TORCH_HOOKS:
        # Its PowerSGD averages plainly at first.
        tolerance = 1e-2 if "16" in name else 1e-5
        assert close(ends[0]["torch", name]["state"], model.state_dict(), tolerance)
        assert close(ends[0]["torch", name]["state"], ends[1]["torch", name]["state"], 0)


def test_what_they_send_is_counted(ends):
    # Six steps of 16 x 2, 16, 3 x 16 and 3 numbers, which are 99.
    sent = {name: ends[0]["torch", name]["sent"] for name in TORCH_HOOKS}
    half, whole = 6 * 2 * 99, 6 * 4 * 99
    assert sent == dict(zip(TORCH_HOOKS, (whole, half, half, whole), strict=True))
    # Of rank 1 the larger matrix takes 3 + 16 numbers, and the smaller one would save too little.
    assert ends[0]["early"]["sent"] == 4 * (2 * 99 + 4 * (32 + 16 + 19 + 3))


def test_local_updates_are_those_of_the_simulation(ends):
    first, second = (end["local"] for end in ends)
    assert close(first["state"], second["state"], 0)
    model = net()
    done = simulate_local(
        model,
        partial(adam, model),
        lessons(),
        partial(loss_of, model),
        LOCAL,
        workers=WORKERS,
        epochs=EPOCHS,
        generator=torch.Generator().manual_seed(1),
        training=FLAT,
    )
    assert close(first["state"], model.state_dict())
    # 3 outer steps of 99 bytes and 4 scales.
    assert first["sent"] == done.traffic.sent == 3 * (99 + 16)


def test_shards_learn_what_whole_networks_do(ends):
    model, _ = simulated(Uncompressed())
    for end in ends:
        found = {
            key.removeprefix("blocks."): value for key, value in end["shards"]["state"].items()
        }
        assert close(found, model.state_dict())


def test_running_statistics_are_the_same_on_every_rank(ends):
    first, second = (end["norm"]["state"] for end in ends)
    assert close(first, second, 0)
    assert first["1.num_batches_tracked"] == 6


def test_a_training_that_was_killed_ends_as_one_that_was_not(ends):
    for end in ends:
        assert close(end["resumed"]["state"], end["regime", "topk"]["state"], 0)
        assert end["resumed"]["sent"] == end["regime", "topk"]["sent"]


def test_networks_that_differ_are_refused_on_every_rank(ends):
    for end in ends:
        assert "processes have networks that differ" in end["refusals"]["said"]["networks"]


def test_checkpoints_of_some_ranks_alone_are_refused_on_all(ends):
    for end in ends:
        assert "log: 1 of 2 processes keep checkpoints" in end["refusals"]["said"]["logs"]


def test_ranks_agree_on_the_mean_of_their_verdicts(ends):
    assert [end["refusals"]["agreed"] for end in ends] == [0.5, 0.5]


@pytest.mark.parametrize(
    "use",
    [
        world,
        lambda: Averaging(TopK()).begin(net(), 1),
        lambda: LocalUpdates().begin(net(), 1),
        lambda: shard(net()),
        lambda: agreed(lambda: 0.0)(),
        lambda: in_processes(TopK().average([torch.ones(3)])),
    ],
)
def test_without_a_process_group_the_way_out_is_named(use):
    with pytest.raises(OptionError, match=r"no process group .*init_process_group.* torchrun"):
        use()


def test_a_compressor_does_not_go_with_shards():
    with pytest.raises(OptionError, match="compressor=TopK does not go with a sharded model"):
        shard(net(), compressor=TopK())


def test_an_unknown_hook_is_refused():
    with pytest.raises(OptionError, match="name='zip' is no hook of torch; the names are"):
        add_torch_hook(None, "zip")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
