"""Training on many workers: compressed gradients, local updates, and a simulation of both."""

from tersor.train.distributed.compressor import Compressor, Uncompressed
from tersor.train.distributed.dgc import DGC
from tersor.train.distributed.diloco import DiLoCo, LocalUpdates
from tersor.train.distributed.exchange import in_one_process, in_processes, world
from tersor.train.distributed.parallel import TORCH_HOOKS, add_hook, add_torch_hook, shard
from tersor.train.distributed.portion import Portion
from tersor.train.distributed.powersgd import PowerSGD
from tersor.train.distributed.rounded import Int8, Sign
from tersor.train.distributed.simulation import Simulated, simulate, simulate_local
from tersor.train.distributed.sparse import RandomK, TopK
from tersor.train.distributed.table import COMPRESSORS
from tersor.train.distributed.together import Averaging, agreed
from tersor.train.distributed.traffic import Traffic

__all__ = [
    "COMPRESSORS",
    "DGC",
    "TORCH_HOOKS",
    "Averaging",
    "Compressor",
    "DiLoCo",
    "Int8",
    "LocalUpdates",
    "Portion",
    "PowerSGD",
    "RandomK",
    "Sign",
    "Simulated",
    "TopK",
    "Traffic",
    "Uncompressed",
    "add_hook",
    "add_torch_hook",
    "agreed",
    "in_one_process",
    "in_processes",
    "shard",
    "simulate",
    "simulate_local",
    "world",
]
