"""A few worker processes that take jobs, report their progress, and die with their parent."""

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple


class Job(NamedTuple):
    """A call to make in a worker: `function(*arguments, on_evaluation=...)`, importable by name."""

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Begun(NamedTuple):
    """A worker has taken a job."""

    key: str


class Progress(NamedTuple):
    """A job's `on_evaluation` was called."""

    key: str
    row: dict[str, float]


class Done(NamedTuple):
    """A job has ended."""

    key: str
    result: Any


class Failed(NamedTuple):
    """A job has raised."""

    key: str
    message: str


Event = Begun | Progress | Done | Failed


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work(jobs: Sequence[Job], workers: int) -> Iterator[Event]:
    """Run jobs in their order on a few processes and yield what they report; leaving early ends the processes.

    A job fails alone, whatever it raises; one whose process dies, as it does when memory is short, fails too, and
    another process goes on with the next.
    """
    waiting = deque(jobs)
    busy: dict[Any, tuple[Any, Job]] = {}  # our end of a pipe: the process, its job
    processes = []

    def begin() -> None:
        pipe, process = _started()
        processes.append(process)
        busy[pipe] = process, waiting.popleft()
        pipe.send(busy[pipe][1])

    try:
        for _ in range(min(workers, len(jobs))):
            begin()
        while busy:
            ready: list[Any] = connection.wait(list(busy))
            for pipe in ready:
                process, job = busy[pipe]
                try:
                    event: Event = pipe.recv()
                except (EOFError, ConnectionError):
                    del busy[pipe]
                    process.join()
                    cut = process.exitcode == -getattr(signal, "SIGBUS", 0)
                    why = "was a file cut that it read?" if cut else "is memory short?"
                    yield Failed(job.key, f"its process died with exit code {process.exitcode} ({why})")
                    if waiting:
                        begin()
                    continue
                yield event
                if isinstance(event, Done | Failed):
                    if waiting:
                        busy[pipe] = process, waiting.popleft()
                        pipe.send(busy[pipe][1])
                    else:
                        del busy[pipe]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _started() -> tuple[Any, Any]:
    """Our end of a pipe, and the process at its other end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _serve(pipe: Any) -> None:
    """The life of a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.showwarning = lambda message, *place, **more: print(message, file=sys.stderr)  # the place is of no use
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        while True:
            pipe.send(_outcome(pipe.recv(), pipe))
    except (EOFError, BrokenPipeError):  # the parent needs no more
        return


def _outcome(job: Job, pipe: Any) -> Done | Failed:
    pipe.send(Begun(job.key))
    try:
        return Done(job.key, job.function(*job.arguments, on_evaluation=lambda row: pipe.send(Progress(job.key, row))))
    except BrokenPipeError:
        raise
    except Exception as error:  # diverged, refused data, a full disk, what nobody foresaw: the others go on
        return Failed(job.key, str(error) or type(error).__name__)


def _follow_parent() -> None:
    """End this process when its parent ends, killed or not: nobody else may write to the run folders then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
