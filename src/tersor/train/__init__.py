"""Training: one loop, what it may learn from, and what may happen beside it."""

from tersor.train.lessons import Answers, Labels, Lesson, Lessons, Teacher, answers
from tersor.train.log import Curve, TrainingLog
from tersor.train.loop import Fitted, fit
from tersor.train.regime import Regime
from tersor.train.training import Training

__all__ = [
    "Answers",
    "Curve",
    "Fitted",
    "Labels",
    "Lesson",
    "Lessons",
    "Regime",
    "Teacher",
    "Training",
    "TrainingLog",
    "answers",
    "fit",
]
