"""The step of a batch larger than memory: cached beside plain, and the objective alone.

First the gate: the cached step's gradient is that of the plain step in float64. Then every row is measured in a process
of its own: seconds of one step after a small one, seconds that its threads worked (which other work on the machine
disturbs less), and the peak of its memory beyond what the process held before.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
from benchmarks.process import apart, measured
from benchmarks.report import conclude, markdown, show

D, WIDTH, HIDDEN, CHUNK = 64, 256, 512, 1024
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


def gate() -> float:
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


def measure(sizes: list[int]) -> list[Row]:
    print(f"gate: float64, relative difference {gate():.1e}", file=sys.stderr)
    rows: list[Row] = []
    for n in sizes:
        for way in WAYS:
            show(f"{n} pairs: {way}")
            rows.append({"n": n, "way": way, **apart("benchmarks.cached", n, way)})
    show("")
    return rows


def table(rows: list[Row]) -> str:
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


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000], help="pairs")
    parser.add_argument("--save", action="store_true", help="keep the rows as JSON under benchmarks/results/")


def main(options: argparse.Namespace) -> None:
    rows = measure(options.sizes)
    print(table(rows))
    if len(set(options.sizes)) > 1:
        print(f"\n{grown(rows)}")
    save = "cached-{date}" if options.save else None
    conclude("benchmarks.scale", rows, f"D = {D}", save, torch.get_num_threads())


if __name__ == "__main__":  # one measurement, for `apart`
    print(json.dumps(step(int(sys.argv[1]), sys.argv[2])))
