"""Ranks 1 to 4 on this machine, Gloo: time of a step, bytes sent, peak memory, against the number of ranks and pairs.

First the gate: the gradient of every rank against that of one process on the whole batch, before any number. A step is
forward and backward. Bytes are those that a rank hands to torch.distributed, counted; beside them those that crossed
the loopback device meanwhile, per rank, to which Gloo's headers add and other programs on the machine may: the least of
the rounds. Memory is what a rank needs beyond its own rows at the peak. "all-gather + grad" is the usual loss, the
maximum over masked hinges of gathered embeddings, differentiated by autograd through the gather.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import normalize

import goal
import goal.distributed
from benchmarks.process import resident
from benchmarks.report import conclude, markdown, show

D = 256
OURS: dict[str, dict[str, Any]] = {
    "cir × sig-ms, hardest": {"T": "cir", "P": "sig-ms"},
    "con(0.2) × con, all": {"T": goal.T.con(margin=0.2), "P": "con", "mining": "all"},
}
USUAL = "all-gather + grad"


def usual(x: Tensor, y: Tensor) -> Tensor:
    """Both maxima over masked hinges of own anchors, of gathered rows; the mean over the global batch."""
    n, rank, size = len(x), dist.get_rank(), dist.get_world_size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated in 2.13; its successor is private
        every_x, every_y = (torch.cat(all_gather(side)) if size > 1 else side for side in (x, y))
    own = torch.arange(n) + rank * n
    pair = (x * y).sum(1, keepdim=True)
    total = x.new_zeros(())
    for anchors, candidates in ((x, every_y), (y, every_x)):
        hinges = (0.2 + anchors @ candidates.T - pair).relu()
        total = total + hinges.scatter(1, own[:, None], 0.0).amax(1).sum()
    return total / (n * size)


def inputs(n: int) -> tuple[Tensor, Tensor]:
    """Unit rows whose pairs are alike; the same on every rank."""
    draw = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(n, D, generator=draw) for _ in range(2))
    return normalize(x, dim=1), normalize(x + noise, dim=1)


def runs(size: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What is measured, by name."""

    def ours(**arguments: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: goal.apply(x, y, **arguments)

    found = {
        f"{name}, {exchange}": ours(group="world", exchange=exchange, **arguments)
        for name, arguments in OURS.items()
        for exchange in (("gather", "ring") if size > 1 else ("gather",))
    }
    return {**found, USUAL: usual}


def gate(name: str, run: Callable[[Tensor, Tensor], Tensor], n: int) -> float:
    """The largest relative error of the own rows' gradient in float64."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, y = (side.double() for side in inputs(n * size))
    expected: list[Tensor]
    if name == USUAL:
        leaves = [side.clone().requires_grad_() for side in (x, y)]
        s = leaves[0] @ leaves[1].T
        pair, off = s.diagonal(), ~torch.eye(n * size, dtype=torch.bool)
        hinges = [torch.where(off, (0.2 + s - p).relu(), 0) for p in (pair[:, None], pair)]
        ((hinges[0].amax(1).sum() + hinges[1].amax(0).sum()) / (n * size)).backward()
        expected = [leaf.grad for leaf in leaves if leaf.grad is not None]
    else:
        expected = list(goal.gradients(x, y, **OURS[name.rsplit(", ", 1)[0]])[:2])
    here = slice(rank * n, (rank + 1) * n)
    own = [side[here].clone().requires_grad_() for side in (x, y)]
    run(own[0], own[1]).backward()
    errors = [
        ((leaf.grad - true[here]).abs().max() / true.abs().max()).item()
        for leaf, true in zip(own, expected, strict=True)
        if leaf.grad is not None
    ]
    worst = torch.tensor(max(errors))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if worst.item() > 1e-9:
        raise SystemExit(f"{name}: relative error {worst.item():.1e} on {size} ranks; nothing is measured")
    return worst.item()


def crossed() -> int:
    """Bytes that the loopback device has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def work(rank: int, size: int, folder: str, sizes: list[int], rounds: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(minutes=10)
    with goal.distributed.joined(init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=limit):
        rows = measured(rank, size, sizes, rounds)
        dist.barrier()
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))


def measured(rank: int, size: int, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """All that is measured with this many ranks."""
    rows: list[dict[str, Any]] = []
    for n in (each // size for each in sizes):
        for name, run in runs(size).items():
            error = gate(name, run, 256 // size)
            x, y = (side[rank * n : (rank + 1) * n].clone().requires_grad_() for side in inputs(n * size))

            def step(run: Any = run, x: Tensor = x, y: Tensor = y) -> None:
                x.grad = y.grad = None
                run(x, y).backward()

            step()
            ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, so that the peak does not start from it
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before = resident("VmHWM")
            step()
            peak = torch.tensor(resident("VmHWM") - before)
            dist.all_reduce(peak, dist.ReduceOp.MAX)
            times, loopback = [], []
            with goal.distributed.counting() as sent:
                for _ in range(rounds):
                    dist.barrier()
                    bytes_before, start = crossed(), time.perf_counter()
                    step()
                    dist.barrier()
                    times.append((time.perf_counter() - start) * 1e3)
                    loopback.append((crossed() - bytes_before) / size)
            if rank == 0:
                show(f"{size} ranks, {n * size} pairs, {name}: relative error {error:.1e}")
            rows.append(
                {
                    "ranks": size,
                    "pairs": n * size,
                    "what": name,
                    "ms": statistics.median(times),
                    "least_ms": min(times),
                    "sent": None if name == USUAL else sent.bytes // rounds,
                    "loopback": min(loopback),
                    "peak_mb": peak.item(),
                    "error": error,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["ranks", "pairs", "what", "ms", "MB sent a rank", "MB over loopback", "MB beyond own rows"]
    lines = [
        [
            row["ranks"], row["pairs"], row["what"], row["ms"],
            None if row["sent"] is None else f"{row['sent'] / 1e6:.2f}",
            f"{row['loopback'] / 1e6:.2f}", f"{row['peak_mb']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(heads, lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--pairs", type=int, nargs="+", default=[1536, 6144], help="of the global batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep the rows as JSON under benchmarks/results/")


def main(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for size in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            spawn: Any = processes.spawn  # type: ignore[attr-defined]
            spawn(work, (size, folder, options.pairs, options.rounds), nprocs=size)
            rows += json.loads(Path(folder, "rows.json").read_text())
    show("")
    worst = max(row["error"] for row in rows)
    print(f"gate: relative error {worst:.1e} at most\n", file=sys.stderr)
    rows.sort(key=lambda row: (row["pairs"], row["what"], row["ranks"]))
    print(table(rows))
    conclude("benchmarks.scale", rows, f"float32, D = {D}", "ranks-{date}" if options.save else None, threads=1)
