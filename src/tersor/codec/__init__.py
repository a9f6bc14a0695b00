"""Forms as bytes: the .tersor file, what it takes, and the stored forward pass."""

from tersor.codec.file import load, read_header, save, verify
from tersor.codec.graph import program_of
from tersor.codec.header import Header
from tersor.codec.pack import coded_bytes

__all__ = ["Header", "coded_bytes", "load", "program_of", "read_header", "save", "verify"]
