"""What a model costs and how well it does: size, MACs, latency, memory, quality, comparison."""

from tersor.measure.compare import Change, ClassChange, Comparison, Flip, Flips, compare
from tersor.measure.latency import (
    Latency,
    LatencyPair,
    latency,
    latency_ab,
    time_call,
    time_pair,
)
from tersor.measure.macs import Macs, macs
from tersor.measure.memory import Memory, peak_memory, process_peak_rss
from tersor.measure.quality import Estimate, quality
from tersor.measure.running import batch_of, evaluating
from tersor.measure.sensitivity import (
    Sensitivity,
    divergence_of,
    probing,
    reference_outputs,
    sensitivity,
    swapped,
)
from tersor.measure.size import Size, TensorSize, safetensors_bytes, size

__all__ = [
    "Change",
    "ClassChange",
    "Comparison",
    "Estimate",
    "Flip",
    "Flips",
    "Latency",
    "LatencyPair",
    "Macs",
    "Memory",
    "Sensitivity",
    "Size",
    "TensorSize",
    "batch_of",
    "compare",
    "divergence_of",
    "evaluating",
    "latency",
    "latency_ab",
    "macs",
    "peak_memory",
    "probing",
    "process_peak_rss",
    "quality",
    "reference_outputs",
    "safetensors_bytes",
    "sensitivity",
    "size",
    "swapped",
    "time_call",
    "time_pair",
]
