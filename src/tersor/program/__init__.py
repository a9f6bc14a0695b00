"""The forward pass of a network as plain data: traced, checked, and run without its code."""

from tersor.program.example import example_of
from tersor.program.interpreter import Interpreted
from tersor.program.of_model import program_of
from tersor.program.program import Program

__all__ = ["Interpreted", "Program", "example_of", "program_of"]
