"""Checkpoints: safetensors files packed into a .tersor file without their network, and back."""

from tersor.checkpoints.packing import Packed, free_name, pack
from tersor.checkpoints.unpacking import Unpacked, unpack

__all__ = ["Packed", "Unpacked", "free_name", "pack", "unpack"]
