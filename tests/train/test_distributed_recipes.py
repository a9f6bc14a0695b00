"""Recipes that processes run as one: each has its rows, and all end with the same weights.

This file is also the program of those processes: `python THIS rank folder`.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from tersor.errors import OptionError
from tersor.methods import run
from tersor.surgery import walk
from tersor.task import Task, classification
from tersor.train import TrainingLog
from tersor.train.distributed import (
    DGC,
    Averaging,
    DiLoCo,
    LocalUpdates,
    PowerSGD,
    TopK,
    Uncompressed,
    world,
)
from train.processes import results_of

WORKERS = 2
RECIPES = {
    "distilled": [
        {"method": "prune.magnitude", "options": {"sparsity": 0.6}},
        {"method": "distill.logits", "options": {"epochs": 2, "rate": 0.01}},
    ],
    "gradual": [{"method": "prune.gradual", "options": {"sparsity": 0.5, "epochs": 2}}],
    "l0": [{"method": "prune.l0", "options": {"sparsity": 0.5, "epochs": 2}}],
    "movement": [{"method": "prune.movement", "options": {"sparsity": 0.5, "epochs": 2}}],
    "lsq": [{"method": "quantize.lsq", "options": {"epochs": 2, "noise": 0.5}}],
    "scales": [
        {"method": "quantize.rtn", "options": {"bits": 3}},
        {"method": "recover.scales", "options": {"epochs": 2, "on": "train"}},
    ],
    "one layer": [
        {"method": "prune.gradual", "options": {"sparsity": 0.5, "epochs": 2, "include": "4"}}
    ],
    "features": [
        {"method": "cut.channels", "options": {"keep": 0.6}},
        {"method": "distill.features", "options": {"epochs": 2, "pairs": {"0": "0"}}},
    ],
}


def blobs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three clouds in the plane."""
    labels = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + noise, labels


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def task() -> Task:
    x, y = blobs(128)
    return classification(train=(x, y), holdout=blobs(32, seed=1)[0], batch_size=32)


def done(name: str, log: TrainingLog | None = None) -> nn.Module:
    return run(net(), RECIPES[name], task(), log=log)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {site.name: site.weight.detach() for site in walk(model)}


def refusals(folder: Path) -> dict[str, str]:
    """What is said of what cannot be."""
    averaged = [{"method": "distill.logits", "options": {"training": {"ema": 0.9}}}]
    pruned = RECIPES["distilled"][:1]
    # The second goes on in the folder of the first.
    ranks = [partial(Averaging, PowerSGD(rank)) for rank in (1, 2)]
    cases = {
        "momentum": (RECIPES["gradual"], lambda: Averaging(DGC())),
        "masks": (RECIPES["gradual"], LocalUpdates),
        "ema": (pruned + averaged, LocalUpdates),
        "first": (RECIPES["distilled"], ranks[0]),
        "other": (RECIPES["distilled"], ranks[1]),
    }
    said = {}
    for why, (recipe, together) in cases.items():
        place = folder if why in ("first", "other") else None
        try:
            run(net(), recipe, task(), log=TrainingLog(place, show=False, together=together))
        except OptionError as error:
            said[why] = str(error)
    return said


def main(rank: int, folder: Path) -> None:
    """All recipes, with results in the folder."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS
    )
    assert world() == (rank, WORKERS)
    plain = {"plain": lambda: Averaging(Uncompressed())}
    ways = {"top": lambda: Averaging(TopK(0.1)), "local": LocalUpdates}
    found = {}
    for name in RECIPES:
        for way, together in (plain | (ways if name == "distilled" else {})).items():
            log = TrainingLog(folder / way / name / str(rank), show=False, together=together)
            model = done(name, log)
            found[name, way] = state(model), model.recipe.steps[-1].outcome
    found |= refusals(folder / "refused" / str(rank))
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Results of both processes, by recipe."""
    return results_of(__file__, tmp_path_factory.mktemp("recipes"), WORKERS)


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_do_what_one_does(ends, name):
    first, second = (end[name, "plain"] for end in ends)
    alone = done(name)
    for key, weight in state(alone).items():
        assert torch.equal(first[0][key], second[0][key]), key
        assert torch.allclose(first[0][key], weight, atol=1e-3), key
    assert first[1] == second[1]
    assert first[1]["bytes_sent"] > 0
    assert "bytes_sent" not in alone.recipe.steps[-1].outcome


def test_what_a_step_does_not_train_is_not_sent(ends):
    sent = ends[0]["one layer", "plain"][1]["bytes_sent"]
    trained = sum(parameter.numel() for parameter in net()[4].parameters())
    # In two epochs of four batches, as float32.
    assert sent == 2 * 4 * 4 * trained


@pytest.mark.parametrize("way", ["top", "local"])
def test_with_compressed_gradients_and_local_steps_they_end_alike_too(ends, way):
    first, second = (end["distilled", way] for end in ends)
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])
    assert first[1]["bytes_sent"] < 0.5 * ends[0]["distilled", "plain"][1]["bytes_sent"]
    assert first[1]["divergence_after"] < first[1]["divergence_before"]


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("masks", "prune.gradual chooses by the weights, and with LocalUpdates"),
        ("momentum", "DGC(feedback=True, share=0.001, momentum=0.9, clip=None, warmup=0) brings"),
        ("ema", "ema=0.9: an average of weights that differ between processes would too"),
        ("other", "holds another training"),
    ],
)
def test_what_cannot_be_is_refused_on_each(ends, why, said):
    assert all(said in end[why] for end in ends)
    assert not any("first" in end for end in ends)


def test_a_checkpoint_knows_compressors_by_their_settings():
    # Made anew by each process that goes on, and used or not.
    used = DGC(0.1)
    used._step = 7
    assert repr(used) == repr(DGC(0.1)) != repr(DGC(0.2))
    settings = [DiLoCo(compressor=TopK(share)) for share in (0.1, 0.1, 0.2)]
    assert repr(settings[0]) == repr(settings[1]) != repr(settings[2])
    with pytest.raises(OptionError, match="brings a momentum, and the outer step"):
        DiLoCo(compressor=DGC())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
