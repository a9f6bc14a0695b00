"""The version of this package: its front door, files and reports name it."""

VERSION = "0.1.0"
