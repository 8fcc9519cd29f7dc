"""Trainings without processes of their own, processes that begin quickly, and an end that nothing may catch.

Most of a process's time in a test is the import of PyTorch. So a test that is not about processes makes its runs in
its own (`inline`), and a test that is about processes forks them with everything imported (`forking`).
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from typing import Any

import pytest
import torch.multiprocessing

from goal.training import loop
from goal.training.workers import Done, Event, Failed, Job


class Killed(BaseException):
    """Stands in for a signal: nothing may catch it."""


def killed_after(evaluations: int) -> Callable[[loop.Row], None]:
    """What a training calls after each evaluation; it raises at the one after so many."""
    left = iter(range(evaluations))

    def on_evaluation(row: loop.Row) -> None:
        if next(left, None) is None:
            raise Killed

    return on_evaluation


def inline(kill_at: int | None = None) -> Callable[[Sequence[Job], int], Iterator[Event]]:
    """`goal.training.workers.work` in this process; it is killed at an evaluation, counted over all jobs."""
    on_evaluation = (lambda row: None) if kill_at is None else killed_after(kill_at - 1)

    def work(jobs: Sequence[Job], workers: int) -> Iterator[Event]:
        for job in jobs:
            try:
                yield Done(job.key, job.function(*job.arguments, on_evaluation=on_evaluation))
            except Exception as error:  # as a worker does
                yield Failed(job.key, str(error))

    return work


def forking() -> Any:
    """A context of multiprocessing whose processes begin with everything imported, where the system can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    goal = ["interpreter", "goal.cli", "goal.kernels.launch"]  # the first is how kernels run
    context.set_forkserver_preload([*goal, "torch._dynamo", "matplotlib.pyplot"])
    with pytest.MonkeyPatch.context() as patch:  # the server imports what is tested here, not what is installed
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def run_ranks(function: Callable[..., None], size: int, *arguments: Any) -> None:
    """Processes that call ``function(rank, *arguments)``; waits for all of them, and raises what one raised."""
    method = forking().get_start_method()
    torch.multiprocessing.start_processes(function, arguments, nprocs=size, start_method=method)
