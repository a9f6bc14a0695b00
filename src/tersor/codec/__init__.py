"""Forms as bytes: the .tersor file, and what it takes."""

from tersor.codec.file import load, read_header, save, verify
from tersor.codec.header import Header
from tersor.codec.sizes import coded_bytes
from tersor.codec.source import Ranges

__all__ = ["Header", "Ranges", "coded_bytes", "load", "read_header", "save", "verify"]
