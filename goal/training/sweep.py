"""Every T × P and every recipe, several seeds each: which objective wins?"""

import functools
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import goal
from goal.training.config import TrainConfig
from goal.training.features import features
from goal.training.loop import Record, train
from goal.training.report import RunRecord, terminal_table, write_report
from goal.training.tune import search
from goal.training.workers import Begun, Done, Event, Failed, Job, Progress, cores, work

if TYPE_CHECKING:
    from rich.console import RenderableType

MARGIN = 0.2  # of T = con in the table
GRID_T, GRID_P = ("con", "nca", "cir"), ("con", "lin", "sig", "lin-ms", "sig-ms")
SEEDS, QUICK_SEEDS = 5, 2
# Smaller heads learn the same order of objectives in a tenth of the time.
QUICK: dict[str, Any] = {"hidden": 256, "dim": 128, "lr": 1e-3, "patience": 5, "max_steps": 1500}
