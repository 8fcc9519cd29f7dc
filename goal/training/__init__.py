"""Training small heads on frozen features: one run, a sweep over all objectives, a search of their parameters."""

from goal.training.config import TrainConfig
from goal.training.loop import Diverged, TrainingError, train
from goal.training.sweep import Incomplete, Sweep, entries
from goal.training.tune import search

__all__ = ["Diverged", "Incomplete", "Sweep", "TrainConfig", "TrainingError", "entries", "search", "train"]
