"""Checkpoints: safetensors files packed into a .tersor file without their network, and back.

`quantize_folder` needs the network, but never all of its weights at once.
"""

from tersor.checkpoints.folder import Quantized, quantize_folder
from tersor.checkpoints.packing import Packed, free_name, pack
from tersor.checkpoints.tokens import read_tokens
from tersor.checkpoints.unpacking import Unpacked, unpack

__all__ = [
    "Packed",
    "Quantized",
    "Unpacked",
    "free_name",
    "pack",
    "quantize_folder",
    "read_tokens",
    "unpack",
]
