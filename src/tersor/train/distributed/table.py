"""All compressors by name, for programs that take one on their command line."""

from collections.abc import Callable, Mapping

from tersor.train.distributed.compressor import Compressor, Uncompressed
from tersor.train.distributed.dgc import DGC
from tersor.train.distributed.powersgd import PowerSGD
from tersor.train.distributed.rounded import Int8, Sign
from tersor.train.distributed.sparse import RandomK, TopK

COMPRESSORS: Mapping[str, Callable[..., Compressor]] = {
    "none": Uncompressed,
    "powersgd": PowerSGD,
    "topk": TopK,
    "randomk": RandomK,
    "sign": Sign,
    "int8": Int8,
    "dgc": DGC,
}
