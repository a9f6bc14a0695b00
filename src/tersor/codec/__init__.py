"""Forms as bytes: the .tersor file, and what it takes."""

from tersor.codec.file import load, read_header, save, save_tensors, verify
from tersor.codec.header import Header
from tersor.codec.header_reader import is_name
from tersor.codec.partial import read_tensor
from tersor.codec.remote import Http
from tersor.codec.runs import check_profile
from tersor.codec.sizes import coded_bytes
from tersor.codec.source import Ranges, check_apart
from tersor.codec.streaming import read_parts, stream

__all__ = [
    "Header",
    "Http",
    "Ranges",
    "check_apart",
    "check_profile",
    "coded_bytes",
    "is_name",
    "load",
    "read_header",
    "read_parts",
    "read_tensor",
    "save",
    "save_tensors",
    "stream",
    "verify",
]
