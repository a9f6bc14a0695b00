"""Forms as bytes: the .tersor file, and what it takes."""

from tersor.codec.file import load, read_header, save, verify
from tersor.codec.header import Header
from tersor.codec.partial import read_tensor
from tersor.codec.remote import Http
from tersor.codec.runs import check_profile
from tersor.codec.sizes import coded_bytes
from tersor.codec.source import Ranges

__all__ = [
    "Header",
    "Http",
    "Ranges",
    "check_profile",
    "coded_bytes",
    "load",
    "read_header",
    "read_tensor",
    "save",
    "verify",
]
