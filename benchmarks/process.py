"""One measurement in a process of its own, and what it holds (Linux)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def apart(module: str, *arguments: object) -> Any:
    """What a module prints last, as JSON, when a fresh process runs it."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def measured(call: Callable[[], object]) -> dict[str, float]:
    """Seconds, seconds of processor time, and megabytes of one call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, start, worked = resident("VmHWM"), time.perf_counter(), time.process_time()
    call()
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    return {"seconds": seconds, "processor_seconds": worked, "mb": resident("VmHWM") - before}


def resident(kind: str) -> float:
    """Megabytes (of 2²⁰ bytes) of this process's memory, from Linux's own account of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(kind)) / 1024
