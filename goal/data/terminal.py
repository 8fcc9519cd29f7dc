"""What is shown on a terminal: progress bars, and streams that printing to never ends the work."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar, cast

T = TypeVar("T")


def bar(items: Sequence[T], what: str, done: int = 0) -> Iterable[T]:
    """The items, but for the first `done`, under a progress bar on stderr; without rich, just the items."""
    if importlib.util.find_spec("rich") is None:
        return items[done:]
    from rich.console import Console
    from rich.progress import track

    console = Console(file=cast(TextIO, Unfailing(sys.stderr)))
    return track(items[done:], description=what, total=len(items), completed=done, console=console, transient=True)


class Unfailing:
    """A stream that printing to never ends the work: what cannot be written any more is dropped."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return int(self._tried(self.stream.write, text) or 0)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except UnicodeEncodeError:  # a stream that cannot be told to put ? in the place of a letter
            return self._tried(call, *(text.encode("ascii", "replace").decode() for text in arguments))
        except (OSError, ValueError):  # nobody reads, the disk is full, the stream is closed
            with suppress(OSError, ValueError, AttributeError):  # what it still holds goes nowhere when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            return None


@contextmanager
def unfailing() -> Iterator[None]:
    """Within the block standard output and error take any text: closed, full, or in an encoding without its letters."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace" if stream is before[0] else "backslashreplace")
    out, err = (cast(TextIO, Unfailing(stream)) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        sys.stdout, sys.stderr = before
