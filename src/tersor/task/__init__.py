"""Tasks: data in splits, and what a model's outputs on it mean."""

from tersor.task.audio import audio_classification
from tersor.task.data import Inputs
from tersor.task.files import Table, npz_splits, read_npz, read_table
from tersor.task.images import image_classification, image_folder
from tersor.task.kinds import call, device_of, evaluation_mode, placed
from tersor.task.language import language_model, sentence_pairs
from tersor.task.makers import classification, regression
from tersor.task.metrics import Metric
from tersor.task.tabular import tabular
from tersor.task.task import Task
from tersor.task.text import read_pairs, text_classification

__all__ = [
    "Inputs",
    "Metric",
    "Table",
    "Task",
    "audio_classification",
    "call",
    "classification",
    "device_of",
    "evaluation_mode",
    "image_classification",
    "image_folder",
    "language_model",
    "npz_splits",
    "placed",
    "read_npz",
    "read_pairs",
    "read_table",
    "regression",
    "sentence_pairs",
    "tabular",
    "text_classification",
]
