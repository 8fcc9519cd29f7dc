"""How long the scan over S should take, from what its kernels compile to: expected, not measured.

    python -m benchmarks.model                              # N = M = 32768, D = 1024, compiles the scans first
    python -m benchmarks.model --n 4096 --d 512 --report F  # from a report that compile_report --save has kept

A tile's product occupies the tensor cores, what follows it the ordinary pipes of the multiprocessor. With two programs
or more on a multiprocessor one's epilogue runs beside another's product, so the slower of the two counts; with one they
take turns. Loading the tiles and the bare reading of x and y run beside both. Latencies, barriers, the first and the
last wave, clocks below the boost clock and the small kernels around the scan are left out: what is printed is a bound
that a good run approaches, no prediction of one.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import compile_report
from benchmarks.compile_report import Row
from benchmarks.report import markdown


class Chip(NamedTuple):
    """What is published about an accelerator."""

    name: str
    arch: int
    multiprocessors: int
    clock: float  # Hz, boost
    peak: dict[str, float]  # dense FLOP/s with float32 sums, by arithmetic; tensor cores but for ieee
    memory: float  # bytes/s
    l2: float | None  # bytes/s from the L2 cache to the multiprocessors; None where nothing is published


# Peaks, multiprocessors and memory: NVIDIA's data sheets and architecture white papers, without sparsity. Clocks: those
# that these peaks imply. L2: for A100 its white paper, 5120 bytes per clock; for H100 the table of the memory hierarchy
# in the paper on FlashAttention-3 (arXiv 2407.08608); for B200 nothing is published.
_H100 = {"fp16": 989.4e12, "bf16": 989.4e12, "tf32": 494.7e12, "ieee": 66.9e12}
_B200 = {"fp16": 2250e12, "bf16": 2250e12, "tf32": 1125e12, "ieee": 75e12}  # as in HGX B200
CHIPS = (
    Chip(
        "A100 SXM 80 GB", 80, 108, 1.41e9,
        {"fp16": 312e12, "bf16": 312e12, "tf32": 156e12, "ieee": 19.5e12}, 2.039e12, 5120 * 1.41e9,
    ),
    Chip("H100 SXM", 90, 132, 1.83e9, _H100, 3.35e12, 12e12),
    Chip("H200", 90, 132, 1.83e9, _H100, 4.8e12, 12e12),
    Chip("B200", 100, 148, 1.98e9, _B200, 8e12, None),
)  # fmt: skip

# lanes that start an instruction each clock, per multiprocessor: CUDA C++ Programming Guide, throughput of native
# arithmetic instructions, the same for 8.0, 9.0 and 10.0; four schedulers issue to 32 lanes each
LANES = {"float": 128, "integer": 64, "shuffle": 32, "special": 16, "memory": 32}
ISSUE = 128
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # per multiprocessor, on all three
RESERVED = 1024  # bytes of shared memory that the system keeps of each program


class Expected(NamedTuple):
    """One scan on one chip, in seconds."""

    floor: float  # the bare product at the published peak
    product: float  # with whole tiles
    epilogue: float
    fill: float | None  # tiles out of the L2 cache, where its bandwidth is published
    memory: float
    programs: int  # on a multiprocessor
    total: float
    fraction: float  # of the bare product's rate
    demand: float  # bytes/s that the L2 cache has to deliver for it


def programs(row: Row) -> int:
    """How many programs a multiprocessor holds: by registers (in units of 8 a thread), shared memory and threads."""
    by_registers = REGISTERS // (-(-row.registers // 8) * 8 * row.threads)
    by_shared = (compile_report.SHARED[row.arch] + RESERVED) // (row.shared + RESERVED)
    return max(0, min(by_registers, by_shared, THREADS // row.threads, PROGRAMS))


def cycles(pipes: dict[str, float]) -> float:
    """Cycles of a multiprocessor for an element: max over the pipes of instructions / lanes, and of all / issue."""
    each = [count / LANES[pipe] for pipe, count in pipes.items() if pipe in LANES]
    return max([*each, sum(pipes.values()) / ISSUE])


def expected(row: Row, chip: Chip, n: int, m: int, d: int, arithmetic: str) -> Expected:
    """What a scan of S (n, m) with d features costs at best.

    floor    = 2 n m d / peak                                  s
    product  = 2 n' m' d' / peak                               s; n', m', d': whole tiles
    epilogue = n' m' · cycles / (multiprocessors · clock)      s
    fill     = n' m' (1/height + 1/width) d' · bytes / l2      s
    memory   = ((n + m) d · bytes + partials) / memory         s; 4 bytes written and read for a row and a column
    total    = max(product, epilogue, fill, memory) if programs ≥ 2, else max(product + epilogue, fill, memory)
    """
    if row.tile is None:
        raise ValueError(f"{row.variant} makes no tile of S")
    height, width, depth = row.tile
    size = 2 if arithmetic in ("fp16", "bf16") else 4
    rows, cols, deep = (math.ceil(one / by) * by for one, by in ((n, height), (m, width), (d, depth)))
    floor = 2 * n * m * d / chip.peak[arithmetic]
    product = 2 * rows * cols * deep / chip.peak[arithmetic]
    epilogue = rows * cols * cycles(row.pipes) / (chip.multiprocessors * chip.clock)
    moved = rows * cols * (1 / height + 1 / width) * deep * size
    fill = None if chip.l2 is None else moved / chip.l2
    partials = 2 * 4 * rows * cols * (1 / height + 1 / width)
    memory = ((n + m) * d * size + partials) / chip.memory
    fitting = programs(row)
    on_chip = max(product, epilogue) if fitting >= 2 else product + epilogue
    total = max(on_chip, fill or 0.0, memory)
    return Expected(floor, product, epilogue, fill, memory, fitting, total, floor / total, moved / total)


def arithmetic_of(row: Row) -> str:
    """fp16, bf16, tf32 or ieee, as the variant's name has it."""
    return next(word for word in row.variant.split() if word in ("fp16", "bf16", "tf32", "ieee"))


def scans(rows: Sequence[Row], arch: int) -> list[Row]:
    """Those of a report that the model can speak of."""
    return [row for row in rows if row.arch == arch and row.variant.startswith("scan ") and row.pipes and row.tile]


def table(chip: Chip, rows: Sequence[Row], n: int, d: int) -> str:
    """One chip's scans as Markdown."""
    heads = ["scan", "tile", "programs", "bare product ms", "tensor cores ms", "epilogue ms", "L2 ms", "memory ms"]
    heads += ["beside each other", "expected ms", "of the product's rate", "L2 → multiprocessors TB/s"]
    lines = []
    for row in rows:
        found = expected(row, chip, n, n, d, arithmetic_of(row))
        fill = "not published" if found.fill is None else f"{found.fill * 1e3:.2f}"
        times = [f"{second * 1e3:.2f}" for second in (found.floor, found.product, found.epilogue)]
        cells = [row.variant, "×".join(map(str, row.tile or ())), str(found.programs), *times, fill]
        cells += [f"{found.memory * 1e3:.2f}", "yes" if found.programs >= 2 else "no", f"{found.total * 1e3:.2f}"]
        lines.append([*cells, f"{found.fraction:.2f}", f"{found.demand / 1e12:.1f}"])
    return markdown(heads, lines)


def read(path: Path) -> list[Row]:
    """The rows of a report that `compile_report --save` has kept."""
    rows = json.loads(path.read_text())["rows"]
    return [Row(**{**row, "tile": None if row["tile"] is None else tuple(row["tile"])}) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32768, help="rows of x and of y")
    parser.add_argument("--d", type=int, default=1024, help="features")
    parser.add_argument("--report", type=Path, help="JSON of compile_report; without it the scans are compiled now")
    options = parser.parse_args()
    if options.report:
        rows = read(options.report)
    else:
        names = ["scan argmax", "scan lin", "scan exp", "scan semi"]
        tasks = compile_report.chosen(compile_report.ARCHS, names, subset=False)
        wanted = {arch: "fp16" if arch == 80 else "tma fp16" for arch in compile_report.ARCHS}
        tasks = [(a, name) for a, name in tasks if wanted[a] in name or "tf32" in name]
        rows = compile_report.run(tasks)
    for row in rows:
        if row.error:
            print(f"{row.variant}, sm_{row.arch}: {row.error}", file=sys.stderr)
    print(f"Expected, not measured: N = M = {options.n}, D = {options.d}.")
    for chip in CHIPS:
        print(f"\n{chip.name}\n\n{table(chip, scans(rows, chip.arch), options.n, options.d)}")


if __name__ == "__main__":
    main()
