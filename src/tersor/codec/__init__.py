"""Forms as bytes: the .tersor file, and what it takes."""

from tersor.codec.file import load, read_header, save, verify
from tersor.codec.header import Header
from tersor.codec.pack import coded_bytes

__all__ = ["Header", "coded_bytes", "load", "read_header", "save", "verify"]
