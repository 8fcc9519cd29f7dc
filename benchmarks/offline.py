"""Mining a dataset larger than memory from files, beside the exact index of faiss (pip install faiss-cpu).

The files are generated, unit rows in float16: 10⁴ × 10⁶ by default. With 10⁷ candidates they are a slice of 10⁷ × 10⁷,
1.3 GB on disk, and take 3 GB of memory. Every row is measured in a process of its own: seconds of one call after a
small one, seconds that its threads worked (which other work on the machine disturbs less), and the peak of its memory
beyond what the process held before. What was mined is compared with a float64 search of some rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import goal
from benchmarks.process import apart, measured
from benchmarks.report import conclude, markdown, show

D, K, ROWS = 64, 10, 1 << 16
Row = dict[str, Any]


def write(path: Path, n: int, seed: int) -> None:
    """(n, D) unit rows in float16, a block at a time."""
    rng = np.random.default_rng(seed)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n, D))
    for start in range(0, n, ROWS):
        rows = rng.standard_normal((min(ROWS, n - start), D), dtype=np.float32)
        file[start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    file.flush()


def mine_goal(folder: Path) -> None:
    x, y = (np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("x", "y"))
    y_ids = np.arange(len(y)) + len(x)  # no positives: faiss knows none
    goal.offline.mine(folder / "x.npy", folder / "y.npy", K, y_ids=y_ids, out=folder / "goal.npz", memory=1 << 30)


def mine_faiss(folder: Path) -> None:
    """The flat index, which is exact: each side in an index of its own, the other side as queries."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    found: Row = {}
    for queries, held in (("x", "y"), ("y", "x")):
        rows = np.load(folder / f"{held}.npy", mmap_mode="r")
        index = faiss.IndexFlatIP(D)
        for start in range(0, len(rows), ROWS):
            index.add(rows[start : start + ROWS].astype(np.float32))
        asked = np.load(folder / f"{queries}.npy", mmap_mode="r")
        parts = [index.search(asked[at : at + ROWS].astype(np.float32), K) for at in range(0, len(asked), ROWS)]
        found[f"{queries}_similarity"] = np.concatenate([part[0] for part in parts])
        found[f"{queries}_index"] = np.concatenate([part[1] for part in parts])
    np.savez(folder / "faiss.npz", **found)


MINERS = {"goal": mine_goal, "faiss": mine_faiss}


def mine(folder: str, who: str) -> Row:
    with tempfile.TemporaryDirectory() as warm:
        for seed, side in enumerate(("x", "y")):
            write(Path(warm) / f"{side}.npy", 64, seed)
        MINERS[who](Path(warm))
    return measured(lambda: MINERS[who](Path(folder)))


def recall(folder: Path, who: str) -> float:
    """The share of the true k best that were found, of 50 rows of each side; a tie within rounding is as good."""
    found, shares = np.load(folder / f"{who}.npz"), []
    sides = {side: np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("x", "y")}
    for queries, others in (("x", "y"), ("y", "x")):
        at = np.linspace(0, len(sides[queries]) - 1, 50).astype(int)
        asked, held = sides[queries][at].astype(np.float64), sides[others]
        best = np.empty((50, 0))
        for start in range(0, len(held), ROWS):
            s = asked @ held[start : start + ROWS].astype(np.float64).T
            best = -np.sort(-np.concatenate([best, s], 1), 1)[:, :K]
        index = found[f"{queries}_index"][at]
        taken = np.stack([held[row].astype(np.float64) @ q for row, q in zip(index, asked, strict=True)])
        shares.append((taken >= best[:, -1:] - 1e-6).mean())
    return float(np.mean(shares))


def measure(n: int, m: int, who: list[str], where: str | None) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=where) as folder:
        for seed, (side, size) in enumerate((("x", n), ("y", m))):
            show(f"writing {size} rows")
            write(Path(folder) / f"{side}.npy", size, seed)
        for each in who:
            show(f"{n} × {m}: {each}")
            row = {"n": n, "m": m, "who": each, **apart("benchmarks.offline", folder, each)}
            show(f"{n} × {m}: recall of {each}")
            rows.append({**row, "recall": recall(Path(folder), each)})
    show("")
    return rows


def table(rows: list[Row]) -> str:
    heads = ["x × y", "who", "s", "processor s", "processor ns an entry of S", "peak MB", "recall"]
    lines = [
        [
            f"{row['n']} × {row['m']}", row["who"], f"{row['seconds']:.1f}", f"{row['processor_seconds']:.1f}",
            f"{1e9 * row['processor_seconds'] / row['n'] / row['m']:.2f}", f"{row['mb']:.0f}",
            f"{row['recall']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(heads, lines)


def whole(row: Row) -> str:
    """What all of y × y would take, from a slice of it."""
    n, m = row["n"], row["m"]
    hours = row["processor_seconds"] / n * m / 3600
    return f"{m} × {m} would take {hours:.1f} hours of one core (extrapolated, not run)."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=10_000, help="rows of x")
    parser.add_argument("--candidates", type=int, default=1_000_000, help="rows of y")
    parser.add_argument("--who", nargs="+", choices=list(MINERS), help="by default all that are installed")
    parser.add_argument("--folder", help="where the files are generated; by default with other temporary files")
    parser.add_argument("--save", action="store_true", help="keep the rows as JSON under benchmarks/results/")


def main(options: argparse.Namespace) -> None:
    who = options.who or [each for each in MINERS if importlib.util.find_spec(each)]
    if options.who is None and "faiss" not in who:
        print("without faiss, which is not installed: pip install faiss-cpu", file=sys.stderr)
    n, m = options.queries, options.candidates
    rows = measure(n, m, who, options.folder)
    print(table(rows))
    for row in rows:
        if row["who"] == "goal":
            print(f"\n{whole(row)}")
    save = f"mine-{{date}}-{n}x{m}" if options.save else None
    conclude("benchmarks.scale", rows, f"D = {D}", save, torch.get_num_threads())


if __name__ == "__main__":  # one measurement, for `apart`
    print(json.dumps(mine(sys.argv[1], sys.argv[2])))
