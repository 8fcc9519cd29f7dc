"""Forward and backward on the CPU against the bare product x yᵀ and the dense autograd loss.

    python -m benchmarks.cpu                 # every size up to 8192, a few minutes
    python -m benchmarks.cpu --sizes 16384   # minutes and 4 GB more

Each size first passes a correctness gate against a dense float64 gradient; then everything is timed in one process,
interleaved, and the median is printed with its ratio to the bare product and to the dense loss of the same size.
Peak memory is that of a fresh process, less that of the same process after making the inputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

import goal
from benchmarks.process import apart, resident
from benchmarks.report import conclude, markdown, show

D = 1024
COMBINATIONS = [(T, P) for T in ("con", "nca", "cir") for P in ("con", "lin", "sig", "lin-ms", "sig-ms")]


def inputs(n: int) -> tuple[Tensor, Tensor]:
    """Pairs of unit vectors early in training: s⁺ about 0.15, the hardest negatives about 0.1, most hinges active."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, D, generator=generator)
    y = 0.15 * x + torch.randn(n, D, generator=generator)
    return normalize(x).requires_grad_(), normalize(y).requires_grad_()


def dense(x: Tensor, y: Tensor, margin: float = 0.2) -> Tensor:
    """The max-of-hinges loss as it is usually written: the whole matrix, differentiated by autograd."""
    s = x @ y.T
    positive = s.diagonal()
    pairs = torch.eye(len(s), dtype=torch.bool, device=s.device)
    rows = (margin + s - positive[:, None]).clamp(min=0).masked_fill(pairs, 0)
    cols = (margin + s - positive).clamp(min=0).masked_fill(pairs, 0)
    return (rows.amax(1).sum() + cols.amax(0).sum()) / len(s)


LOSSES: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
    ("con", "con"): lambda positive, negative: (0.2 + negative - positive).clamp(min=0),
    ("nca", "con"): lambda positive, negative: softplus(10 * (negative - positive)) / 10,
    ("cir", "lin"): lambda positive, negative: softplus(10 * ((1 - positive) ** 2 + negative**2 - 0.5)) / 20,
}


def truth(x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A hardest-negative loss l(s⁺, s⁻) on the whole matrix, for the gate."""
    s = x @ y.T
    positive, negatives = s.diagonal(), s - torch.diag(torch.full((len(s),), torch.inf, dtype=s.dtype))
    return (loss(positive, negatives.amax(1)) + loss(positive, negatives.amax(0))).mean()


def ours(x: Tensor, y: Tensor, T: str, P: str) -> Tensor:
    """The objective as the tables name it: `con` for T is the hinge with margin 0.2."""
    return goal.apply(x, y, T=goal.T.con(margin=0.2) if T == "con" else T, P=P)


def gate(n: int) -> float:
    """The largest error against autograd in float64 of the three combinations that are a loss's gradient; raises.

    Relative to the gradient's largest entry; one row in a hundred may take another negative at a tie within rounding.
    """
    x, y = inputs(n)
    x64, y64 = (side.detach().double().requires_grad_() for side in (x, y))
    worst = 0.0
    for T, P in (("con", "con"), ("nca", "con"), ("cir", "lin")):
        step(lambda T=T, P=P: ours(x, y, T, P), x, y)()  # type: ignore[misc]
        step(lambda T=T, P=P: truth(x64, y64, LOSSES[T, P]), x64, y64)()  # type: ignore[misc]
        for single, double in ((x.grad, x64.grad), (y.grad, y64.grad)):
            assert single is not None
            assert double is not None
            error = ((single - double).abs().amax(1) / double.abs().max()).quantile(0.99).item()
            if not error < 1e-5:  # NaN included
                raise SystemExit(f"gate: N = {n}, {T} × {P}: relative error {error:.1e}; a wrong gradient is not timed")
            worst = max(worst, error)
    return worst


def step(loss: Callable[[], Tensor], *sides: Tensor) -> Callable[[], None]:
    def both() -> None:
        for side in sides:
            side.grad = None
        loss().backward()

    return both


def time_of(run: Callable[[], object], calls: int) -> float:
    """Milliseconds of one call, over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e3


def measure(n: int, rounds: int) -> list[dict[str, object]]:
    """Median times at one size, everything interleaved round by round."""
    x, y = inputs(n)
    bare_x, bare_y = x.detach(), y.detach()
    runs: dict[str, Callable[[], object]] = {
        "bare product": lambda: bare_x @ bare_y.T,
        "dense loss": step(lambda: dense(x, y), x, y),
    }
    for T, P in COMBINATIONS:
        runs[f"{T} × {P}"] = step(lambda T=T, P=P: ours(x, y, T, P), x, y)  # type: ignore[misc]
    calls = max(1, 4096 // n)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        time_of(run, 1)  # warm
    for done in range(rounds):
        show(f"N = {n}: round {done + 1} of {rounds}")
        for name, run in runs.items():
            times[name].append(time_of(run, calls))
    show("")
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "n": n,
            "what": name,
            "ms": ms,
            "least_ms": min(times[name]),
            "gflops": 2 * n * n * D / ms / 1e6 * (3 if name == "dense loss" else 1),
            "of_product": ms / median["bare product"],
            "of_dense": ms / median["dense loss"],
            "peak_mb": peak(n, name) if n >= 4096 and sys.platform == "linux" else None,
        }
        for name, ms in median.items()
    ]


def peak(n: int, what: str) -> float:
    """Megabytes that one call needs beyond its inputs, in a fresh process."""
    return float(apart("benchmarks.cpu", "--peak", n, what))


def peak_here(n: int, what: str) -> float:
    x, y = inputs(n)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmHWM")
    if what == "bare product":
        _ = x.detach() @ y.detach().T
    elif what == "dense loss":
        dense(x, y).backward()
    else:
        T, P = what.split(" × ")
        ours(x, y, T, P).backward()
    return resident("VmHWM") - before


def table(rows: list[dict[str, object]]) -> str:
    heads = ["N", "what", "ms", "× bare product", "× dense loss", "GFLOP/s", "MB beyond inputs"]
    lines = [
        [
            row["n"], row["what"], row["ms"], f"{row['of_product']:.2f}", f"{row['of_dense']:.2f}",
            f"{row['gflops']:.0f}", None if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the rows as JSON under benchmarks/results/")
    parser.add_argument("--peak", nargs=2, metavar=("N", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_here(int(options.peak[0]), options.peak[1]))
        return
    rows: list[dict[str, object]] = []
    for n in options.sizes:
        print(f"gate: N = {n}, relative error {gate(min(n, 2048)):.1e}", file=sys.stderr)
        rows += measure(n, options.rounds)
    print(table(rows))
    save = f"cpu-{{date}}-{'-'.join(map(str, options.sizes))}" if options.save else None
    conclude("benchmarks.cpu", rows, f"float32, D = {D}", save, torch.get_num_threads())


if __name__ == "__main__":
    main()
