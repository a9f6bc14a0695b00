"""Where models and data come from, as they are named on the command line."""

from tersor.sources.data import open_task
from tersor.sources.models import Opened, open_model

__all__ = ["Opened", "open_model", "open_task"]
