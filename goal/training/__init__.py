"""Training small heads on frozen features: single runs, sweeps over all objectives, searches for parameters."""

from goal.training.config import TrainConfig
from goal.training.loop import Diverged, TrainingError, train
from goal.training.schedule import Curriculum, FewSemiHard, Plateau, Scheduled, cosine, linear, piecewise, varying
from goal.training.sweep import Incomplete, Sweep, entries
from goal.training.tune import search

__all__ = [
    "Curriculum",
    "Diverged",
    "FewSemiHard",
    "Incomplete",
    "Plateau",
    "Scheduled",
    "Sweep",
    "TrainConfig",
    "TrainingError",
    "cosine",
    "entries",
    "linear",
    "piecewise",
    "search",
    "train",
    "varying",
]
