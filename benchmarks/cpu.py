"""Forward and backward on the CPU against the bare product x yᵀ and the dense autograd losses.

    python -m benchmarks.cpu                 # every size up to 8192, a few minutes
    python -m benchmarks.cpu --sizes 16384   # minutes and 4 GB more
    python -m benchmarks.cpu --d 512 --only soft

Each size first passes a correctness gate against a dense float64 gradient; then everything is timed in one process,
interleaved, and the median is printed with its ratio to the bare product and to the dense loss of the same size: the
max-of-hinges loss, or InfoNCE for soft mining.
Peak memory is that of a fresh process, less that of the same process after making the inputs.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

import goal
from benchmarks.process import apart, resident
from benchmarks.report import conclude, markdown, show

COMBINATIONS = [f"{T} × {P}" for T in ("con", "nca", "cir") for P in ("con", "lin", "sig", "lin-ms", "sig-ms")]
SOFT = {
    "infonce": "infonce",
    "con × con, soft": "con(margin=0.2) × con | soft",
    "cir × sig, soft": "cir × sig | soft",
}


def inputs(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Pairs of unit vectors early in training: s⁺ about 0.15, the hardest negatives about 0.1, most hinges active."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator)
    y = 0.15 * x + torch.randn(n, d, generator=generator)
    return normalize(x).requires_grad_(), normalize(y).requires_grad_()


def dense(x: Tensor, y: Tensor, margin: float = 0.2) -> Tensor:
    """The max-of-hinges loss as it is usually written: the whole matrix, differentiated by autograd."""
    s = x @ y.T
    positive = s.diagonal()
    pairs = torch.eye(len(s), dtype=torch.bool, device=s.device)
    rows = (margin + s - positive[:, None]).clamp(min=0).masked_fill(pairs, 0)
    cols = (margin + s - positive).clamp(min=0).masked_fill(pairs, 0)
    return (rows.amax(1).sum() + cols.amax(0).sum()) / len(s)


def dense_infonce(x: Tensor, y: Tensor, tau: float = 20.0) -> Tensor:
    """InfoNCE as it is usually written."""
    s, pairs = tau * (x @ y.T), torch.arange(len(x), device=x.device)
    return (cross_entropy(s, pairs) + cross_entropy(s.T, pairs)) / 2


DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dense loss": dense, "dense InfoNCE": dense_infonce}
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


def loss_of(what: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a row of the table: `con` alone for T is the hinge with margin 0.2."""
    if what in DENSE:
        return DENSE[what]
    if what in SOFT:
        return goal.objective(SOFT[what])
    T, P = what.split(" × ")
    return lambda x, y: goal.apply(x, y, T=goal.T.con(margin=0.2) if T == "con" else T, P=P)


def gate(n: int, d: int) -> float:
    """The largest error against autograd in float64 of four objectives that are a loss's gradient; raises.

    Relative to the gradient's largest entry; one row in a hundred may take another negative at a tie within rounding.
    """
    x, y = inputs(n, d)
    x64, y64 = (side.detach().double().requires_grad_() for side in (x, y))
    worst = 0.0
    true_of: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"infonce": dense_infonce}
    true_of |= {f"{T} × {P}": functools.partial(truth, loss=loss) for (T, P), loss in LOSSES.items()}
    for what, true in true_of.items():
        step(loss_of(what), x, y)()
        step(true, x64, y64)()
        for single, double in ((x.grad, x64.grad), (y.grad, y64.grad)):
            assert single is not None
            assert double is not None
            error = ((single - double).abs().amax(1) / double.abs().max()).quantile(0.99).item()
            if not error < 1e-5:  # NaN included
                raise SystemExit(f"gate: N = {n}, {what}: relative error {error:.1e}; a wrong gradient is not timed")
            worst = max(worst, error)
    return worst


def step(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Callable[[], None]:
    def both() -> None:
        x.grad = y.grad = None
        loss(x, y).backward()

    return both


def time_of(run: Callable[[], object], calls: int) -> float:
    """Milliseconds of one call, over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e3


def measure(n: int, d: int, rounds: int, only: str | None) -> list[dict[str, object]]:
    """Median times at one size, everything interleaved round by round."""
    x, y = inputs(n, d)
    bare_x, bare_y = x.detach(), y.detach()
    soft, mined = ["dense InfoNCE", *SOFT], ["dense loss", *COMBINATIONS]
    asked = {None: [*mined, *soft], "soft": soft, "mined": mined}
    runs: dict[str, Callable[[], object]] = {"bare product": lambda: bare_x @ bare_y.T}
    runs |= {what: step(loss_of(what), x, y) for what in asked[only]}
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
            "gflops": 2 * n * n * d / ms / 1e6 * (3 if name in DENSE else 4 if name in SOFT else 1),
            "of_product": ms / median["bare product"],
            "of_dense": ms / median["dense InfoNCE" if name in SOFT or only == "soft" else "dense loss"],
            "peak_mb": peak(n, d, name) if n >= 4096 and sys.platform == "linux" else None,
        }
        for name, ms in median.items()
    ]


def peak(n: int, d: int, what: str) -> float:
    """Megabytes that one call needs beyond its inputs, in a fresh process."""
    return float(apart("benchmarks.cpu", "--peak", n, d, what))


def peak_here(n: int, d: int, what: str) -> float:
    x, y = inputs(n, d)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmHWM")
    if what == "bare product":
        _ = x.detach() @ y.detach().T
    else:
        loss_of(what)(x, y).backward()
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
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--only", choices=["mined", "soft"], help="the objectives that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the rows as JSON under benchmarks/results/")
    parser.add_argument("--peak", nargs=3, metavar=("N", "D", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_here(int(options.peak[0]), int(options.peak[1]), options.peak[2]))
        return
    rows: list[dict[str, object]] = []
    for n in options.sizes:
        print(f"gate: N = {n}, relative error {gate(min(n, 2048), options.d):.1e}", file=sys.stderr)
        rows += measure(n, options.d, options.rounds, options.only)
    print(table(rows))
    save = f"cpu-{{date}}-{'-'.join(map(str, options.sizes))}" if options.save else None
    conclude("benchmarks.cpu", rows, f"float32, D = {options.d}", save, torch.get_num_threads())


if __name__ == "__main__":
    main()
