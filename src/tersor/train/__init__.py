"""Training: one short loop, and what it may learn from."""

from tersor.train.lessons import Answers, Labels, Lesson, Lessons, Teacher, answers
from tersor.train.loop import Fitted, fit

__all__ = ["Answers", "Fitted", "Labels", "Lesson", "Lessons", "Teacher", "answers", "fit"]
