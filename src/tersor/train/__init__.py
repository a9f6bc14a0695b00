"""Training: one short loop, and what it may learn from."""

from tersor.train.lessons import Answers, Labels, Lessons, answers
from tersor.train.loop import Fitted, fit

__all__ = ["Answers", "Fitted", "Labels", "Lessons", "answers", "fit"]
