"""Terminal output: progress bars, and output streams whose failure never ends the work."""

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
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
        return int(self._tried("write", text) or 0)

    def flush(self) -> None:
        if hasattr(self.stream, "flush"):
            self._tried("flush")

    def _tried(self, method: str, *arguments: str) -> Any:
        try:
            return getattr(self.stream, method)(*arguments)
        except UnicodeEncodeError:  # a stream that cannot be told to put ? in the place of a letter
            return self._tried(method, *(text.encode("ascii", "replace").decode() for text in arguments))
        except (OSError, ValueError, AttributeError):  # nobody reads, the disk is full, it is closed or no stream
            broken, self.stream = self.stream, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            with suppress(OSError, ValueError, AttributeError):  # what it still holds goes nowhere when Python ends
                os.dup2(self.stream.fileno(), broken.fileno())
            return None


@contextmanager
def unfailing() -> Iterator[None]:
    """Within the block standard output and error take any text: closed, full, or in an encoding without its letters."""
    before = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in before]
    for stream, lenient in zip(before, ("replace", "backslashreplace"), strict=True):
        _reconfigure(stream, lenient)
    out, err = (cast(TextIO, Unfailing(stream)) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        for stream, own in zip(before, errors, strict=True):
            _reconfigure(stream, own)


def _reconfigure(stream: object, errors: str | None) -> None:
    """What a stream does with letters that its encoding lacks, where it has a say in that and is open."""
    with suppress(OSError, ValueError, AttributeError, TypeError):  # io.UnsupportedOperation is two of them
        if errors is not None:
            stream.reconfigure(errors=errors)  # type: ignore[attr-defined]
