"""What all benchmarks tell beside their figures: progress, and the commit that they measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def show(text: str) -> None:
    """Progress, in one line of the terminal; an empty text takes it away."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def commit() -> str:
    asked, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    found = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=here)
    return found.stdout.strip() or "unknown"
