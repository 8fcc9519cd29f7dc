"""How all benchmarks tell what they found: progress, tables, the conditions of a measurement, and kept results."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from goal.data.files import write_atomically

RESULTS = Path(__file__).parent / "results"
PROCESSOR = torch.backends.cpu.get_cpu_capability()


def show(text: str) -> None:
    """Progress, in one line of the terminal; an empty text takes it away."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers with three figures, None as nothing.

    >>> print(markdown(["N", "ms", "MB"], [[32, 0.12345, None], [64, 2.5, "1.0"]]))
    | N | ms | MB |
    |---|---|---|
    | 32 | 0.123 |  |
    | 64 | 2.5 | 1.0 |
    """

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ("| " + " | ".join(map(cell, row)) + " |" for row in rows)
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines])


def commit() -> str:
    asked, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    found = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=here)
    return found.stdout.strip() or "unknown"


def command(module: str, argv: Sequence[str] | None = None) -> str:
    """The command that runs a module, as it would be typed.

    Args:
        module: its name, with dots.
        argv: its arguments; by default those of this process.

    >>> command("benchmarks.cpu", ["--sizes", "32"])
    'python -m benchmarks.cpu --sizes 32'
    """
    return " ".join([f"python -m {module}", *(sys.argv[1:] if argv is None else argv)])


def conditions(module: str, argv: Sequence[str] | None = None, **more: object) -> dict[str, Any]:
    """Date, commit, versions, `more` and the command, by name."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **more,
        "command": command(module, argv),
    }


def facts(known: Mapping[str, object]) -> str:
    """Conditions in one line, as they stand below a table."""
    return ", ".join(f"{name} {value}" for name, value in known.items())


def conclude(module: str, rows: Sequence[Mapping[str, object]], note: str, save: str | None, threads: int) -> None:
    """The line below a CPU benchmark's table; conditions and rows are kept too where there is a name to `save` under.

    Args:
        note: what else the rows hold for, such as dtype and D.
        save: the file's name; {date} in it is today's.
    """
    known = conditions(module, processor=PROCESSOR, threads=threads)
    print(f"\n{facts(known)}, {note}")
    if save is not None:
        keep(save.format(date=known["date"]), known, rows)


def keep(name: str, known: Mapping[str, object], rows: Sequence[Mapping[str, object]]) -> Path:
    """Write conditions and rows as JSON under benchmarks/results/; the file is there whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps({**known, "rows": rows}, indent=1, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())
    return path
