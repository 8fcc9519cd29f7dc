"""A progress bar for work that takes longer than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic


@contextmanager
def progress(label: str, steps: int) -> Iterator[Callable[[int], None]]:
    """What to call with the steps that are done: a bar on a terminal, once two seconds have passed."""
    begun, bar, task = monotonic(), None, None

    def show(done: int) -> None:
        nonlocal bar, task
        if bar is None and monotonic() - begun > 2 and sys.stdout.isatty():
            from rich.progress import Progress

            bar = Progress(transient=True)
            task = bar.add_task(label, total=steps)
            bar.start()
        if bar is not None and task is not None:
            bar.update(task, completed=done)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()
