"""Tasks: data in splits, and what a model's outputs on it mean."""

from tersor.task.data import Inputs
from tersor.task.kinds import evaluating
from tersor.task.language import language_model, sentence_pairs
from tersor.task.makers import classification, regression
from tersor.task.metrics import Metric
from tersor.task.task import Task

__all__ = [
    "Inputs",
    "Metric",
    "Task",
    "classification",
    "evaluating",
    "language_model",
    "regression",
    "sentence_pairs",
]
