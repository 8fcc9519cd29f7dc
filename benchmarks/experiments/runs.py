"""Training runs of an experiment: on all cores, each in a folder of its own, so that a killed experiment continues."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from goal.training import TrainConfig, TrainingError, train
from goal.training.display import display
from goal.training.workers import Done, Failed, Job, cores, work

Record = dict[str, Any]


def trained(configs: Sequence[TrainConfig], seeds: int, folder: Path, workers: int | None = None) -> list[list[Record]]:
    """The records of every configuration with so many seeds, in order.

    Raises:
        TrainingError: a run failed; the others have ended by then, and the same call tries it again.
    """
    runs = [[replace(config, seed=seed) for config in configs] for seed in range(seeds)]
    jobs = {run.run_name: Job(run.run_name, train, (run, folder / run.run_name)) for run in itertools.chain(*runs)}
    records = {name: train(*job.arguments) for name, job in jobs.items() if (job.arguments[1] / "record.json").exists()}
    failures = []
    with display() as shown:
        shown.expect(len(jobs), finished=len(records))
        for event in work([job for name, job in jobs.items() if name not in records], workers or cores()):
            if isinstance(event, Done):
                records[event.key] = event.result
            elif isinstance(event, Failed):
                failures.append(f"{event.key}: {event.message}")
            shown.show(event, list)
    if failures:
        raise TrainingError("\n".join(failures))
    return [[records[run.run_name] for run in runs_of] for runs_of in zip(*runs, strict=True)]


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def sign_flip(differences: Sequence[float]) -> float:
    """Exact p of paired differences with mean 0, two-sided: the share of all 2ⁿ choices of signs that reach |mean|.

    >>> sign_flip([1.0, 2.0, 3.0, 4.0, 5.0])
    0.0625
    """
    reached = abs(sum(differences)) * (1 - 1e-12)
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(some, differences, strict=True))) for some in signs]
    return sum(total >= reached for total in sums) / len(sums)
