"""Batches and datasets larger than memory on one device: the cached step, and mining from files beside faiss.

    python -m benchmarks.caching cached                       # 10³ … 10⁵ pairs, a few minutes
    python -m benchmarks.caching mine                         # 10⁴ × 10⁶ against faiss (pip install faiss-cpu)
    python -m benchmarks.caching mine --candidates 10000000   # a slice of 10⁷ × 10⁷; 1.3 GB on disk, 3 GB of memory

Every row is measured in a process of its own: seconds of one call after a small one, seconds that its threads worked
(which other work on the machine disturbs less), and the peak of its memory beyond what the process held before. Before
anything is timed, a gate: the cached step's gradient is that of the plain step in float64; what was mined is compared
with a float64 search of some rows. Data are generated, not read from anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
from benchmarks.process import apart, measured
from benchmarks.report import PROCESSOR, conditions, facts, keep, markdown, show

D, WIDTH, HIDDEN, CHUNK = 64, 256, 512, 1024
K, ROWS = 10, 1 << 16
Row = dict[str, Any]


class Encoder(nn.Module):
    """Features to unit rows; its activations take 12 kB a row."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [nn.Linear(HIDDEN, HIDDEN), nn.GELU()] * 2
        self.body = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), *hidden, nn.Linear(HIDDEN, D))

    def forward(self, values: Tensor) -> Tensor:
        return normalize(self.body(values), dim=1)


def encoders() -> tuple[Encoder, Encoder]:
    torch.manual_seed(0)
    return Encoder(), Encoder()


def features(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=generator)
    return x, 0.5 * x + torch.randn(n, WIDTH, generator=generator)


# ---- the cached step -------------------------------------------------------------------------------------


def plain_step(x: nn.Module, y: nn.Module, batch: tuple[Tensor, Tensor], objective: nn.Module) -> None:
    objective(x(batch[0]), y(batch[1])).backward()


def cached_step(x: nn.Module, y: nn.Module, batch: tuple[Tensor, Tensor], objective: nn.Module) -> None:
    goal.cached_step(x, y, batch, objective, chunk=CHUNK)


def emission(x: nn.Module, y: nn.Module, batch: tuple[Tensor, Tensor], objective: nn.Module) -> None:
    """The objective alone, on embeddings that are there."""
    rows = [normalize(side[:, :D], dim=1).requires_grad_() for side in batch]
    objective(*rows).backward()


WAYS = {"plain": plain_step, "cached": cached_step, "objective alone": emission}


def step(n: int, way: str) -> Row:
    x, y = encoders()
    objective = goal.Objective()
    WAYS[way](x, y, features(64, 1), objective)
    batch = features(n)
    return measured(lambda: WAYS[way](x, y, batch, objective))


def gate_step() -> float:
    """The largest difference between the steps in float64, relative to the gradient's largest entry; raises."""
    found = []
    for way in (plain_step, cached_step):
        x, y = (each.double() for each in encoders())
        batch = tuple(side.double() for side in features(2500))
        way(x, y, (batch[0], batch[1]), goal.Objective())
        found.append(torch.cat([p.grad.flatten() for p in (*x.parameters(), *y.parameters()) if p.grad is not None]))
    error = ((found[0] - found[1]).abs().max() / found[0].abs().max()).item()
    if not error <= 1e-12:
        raise SystemExit(f"gate: the gradients differ by {error:.1e}: not timed")
    return error


def cached(sizes: list[int]) -> list[Row]:
    print(f"gate: float64, relative difference {gate_step():.1e}", file=sys.stderr)
    rows: list[Row] = []
    for n in sizes:
        for way in WAYS:
            show(f"{n} pairs: {way}")
            rows.append({"n": n, "way": way, **apart("benchmarks.caching", "step", n, way)})
    show("")
    return rows


def table_of_steps(rows: list[Row]) -> str:
    heads = ["pairs", "step", "s", "processor s", "× plain", "peak MB", "kB a pair"]
    plain = {row["n"]: row["processor_seconds"] for row in rows if row["way"] == "plain"}
    lines = [
        [
            row["n"], row["way"], f"{row['seconds']:.2f}", f"{row['processor_seconds']:.2f}",
            f"{row['processor_seconds'] / plain[row['n']]:.2f}", f"{row['mb']:.0f}",
            f"{1024 * row['mb'] / row['n']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(heads, lines)


def grown(rows: list[Row]) -> str:
    """How memory grows from the fewest to the most pairs."""
    sizes = [row["n"] for row in rows]
    low, high = min(sizes), max(sizes)
    first, last = ({row["way"]: row["mb"] for row in rows if row["n"] == n} for n in (low, high))
    each = ", ".join(f"{way} {(last[way] - first[way]) / (high - low) * 1024:.2f} kB" for way in WAYS)
    return f"Grown from {low} to {high} pairs, a pair: {each}."


# ---- mining from files -----------------------------------------------------------------------------------


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


def mining(folder: str, who: str) -> Row:
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


def mine(n: int, m: int, who: list[str], where: str | None) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=where) as folder:
        for seed, (side, size) in enumerate((("x", n), ("y", m))):
            show(f"writing {size} rows")
            write(Path(folder) / f"{side}.npy", size, seed)
        for each in who:
            show(f"{n} × {m}: {each}")
            row = {"n": n, "m": m, "who": each, **apart("benchmarks.caching", "mining", folder, each)}
            show(f"{n} × {m}: recall of {each}")
            rows.append({**row, "recall": recall(Path(folder), each)})
    show("")
    return rows


def table_of_miners(rows: list[Row]) -> str:
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


# ---- the command -----------------------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:2] in (["step"], ["mining"]):  # one measurement
        what, first, second = sys.argv[1:]
        print(json.dumps(step(int(first), second) if what == "step" else mining(first, second)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cached", "mine"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000], help="pairs")
    parser.add_argument("--queries", type=int, default=10_000, help="rows of x")
    parser.add_argument("--candidates", type=int, default=1_000_000, help="rows of y")
    parser.add_argument("--who", nargs="+", choices=list(MINERS), default=list(MINERS))
    parser.add_argument("--folder", help="where the files are generated; by default with other temporary files")
    parser.add_argument("--save", action="store_true", help="keep the rows as JSON under benchmarks/results/")
    options = parser.parse_args()
    if options.part == "cached":
        rows = cached(options.sizes)
        print(table_of_steps(rows))
        if len(set(options.sizes)) > 1:
            print(f"\n{grown(rows)}")
    else:
        rows = mine(options.queries, options.candidates, options.who, options.folder)
        print(table_of_miners(rows))
        for row in rows:
            if row["who"] == "goal":
                print(f"\n{whole(row)}")
    known = conditions("benchmarks.caching", processor=PROCESSOR, threads=torch.get_num_threads())
    print(f"\n{facts(known)}, D = {D}")
    if options.save:
        size = "" if options.part == "cached" else f"-{options.queries}-{options.candidates}"
        keep(f"caching-{options.part}-{known['date']}{size}", known, rows)


if __name__ == "__main__":
    main()
