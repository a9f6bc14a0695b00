"""Techniques, one file each; `TABLE` lists them, `run` applies a recipe of them to a copy."""

from tersor.methods.run import read_recipe, replay, run
from tersor.methods.table import TABLE

__all__ = ["TABLE", "read_recipe", "replay", "run"]
