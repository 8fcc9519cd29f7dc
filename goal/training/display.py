"""The display of a running sweep: a live table on a terminal, elsewhere a line for each job."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from goal.data.terminal import unfailing
from goal.training.config import TrainConfig
from goal.training.folder import Record, best
from goal.training.report import RunRecord, terminal_table
from goal.training.workers import Begun, Done, Event, Failed

if TYPE_CHECKING:
    from rich.live import Live


class Lines:
    """A line for each job that ends."""

    def __init__(self) -> None:
        self.expected = self.ended = 0

    def expect(self, jobs: int, finished: int) -> None:
        """There are so many more jobs, some of which need nothing any more."""
        self.expected += jobs
        self.ended += finished

    def show(self, event: Event, records: Callable[[], Sequence[Record]]) -> None:
        """Something happened; `records` gives the runs that are finished."""
        if isinstance(event, Done | Failed):
            self.ended += 1
            count = f"[{self.ended:{len(str(self.expected))}}/{self.expected}]"
            print(count, outcome(event.result) if isinstance(event, Done) else event.message, flush=True)


class Table(Lines):
    """The table of the finished runs, what is running, and a bar."""

    def __init__(self, live: "Live") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        super().__init__()
        self.live = live
        self.running: dict[str, str] = {}
        self.bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.task = self.bar.add_task("", total=None)

    def show(self, event: Event, records: Callable[[], Sequence[Record]]) -> None:
        from rich.console import Group
        from rich.text import Text

        if isinstance(event, Done | Failed):
            self.ended += 1
            self.running.pop(event.key, None)
        elif isinstance(event, Begun):
            self.running[event.key] = ""
        else:
            self.running[event.key] = " ".join(f"{name} {value:.4g}" for name, value in event.row.items())
        self.bar.update(self.task, completed=self.ended, total=self.expected)
        finished = records()
        table = Text.from_ansi(terminal_table(cast(Sequence[RunRecord], finished), color=True)) if finished else Text()
        lines = [Text(f"{key}  {text}", overflow="ellipsis", no_wrap=True) for key, text in self.running.items()]
        self.live.update(Group(self.bar, *lines, Text(), table), refresh=True)  # a low terminal cuts at the foot


@contextmanager
def display() -> Iterator[Lines]:
    """The display that fits standard output; what cannot be printed does not end the work."""
    with unfailing():
        if not sys.stdout.isatty():
            yield Lines()
            return
        from rich.live import Live

        with Live(auto_refresh=False, transient=True) as live:
            yield Table(live)


def outcome(result: Any) -> str:
    """A finished job in one line."""
    if isinstance(result, TrainConfig):  # of a search
        found = {"lr": result.optimiser.lr} | result.params
        return f"{result.objective.spec.names}: found " + ", ".join(
            f"{name} {value:.3g}" for name, value in found.items()
        )
    metric, of = ("MAP@all", "mean") if "best_val_map" in result else ("RSUM", "rsum")
    test = f", test {metric} {result['test'][of]:.1f}" if "test" in result else ""
    return (
        f"{result['label']}, seed {result['seed']}: validation {metric} {best(result):.1f} at step "
        f"{result['best_step']} of {result['steps']}{test}"
    )
