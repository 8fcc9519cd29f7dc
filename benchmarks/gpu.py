"""Forward and backward on a GPU against the bare product x yᵀ, the dense autograd loss and other libraries.

    python -m benchmarks.gpu --save              # one call of at most 8 minutes; JSON and a picture under results/
    python -m benchmarks.gpu --largest           # and N = 1,048,576, or the largest that fits
    python -m benchmarks.gpu --sizes 32768 --dims 1024 --dtypes bf16

A correctness gate comes first, on fresh random inputs; where it is red there are no timings and the exit status is not
zero. What is timed is interleaved, with the L2 cache flushed before every call, as medians with 10 and 90 % quantiles.
A call's time is the device's: like a training step, the host runs ahead; what it needs itself is in a column of its
own. Work is done in the order of its importance until the minutes are spent; what was left out is listed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import goal
from benchmarks.cpu import dense
from benchmarks.report import conditions, facts, keep, markdown

SIZES = [128, 512, 2048, 8192, 32768, 131072]
DIMS = [256, 512, 1024]
LARGEST = 1 << 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARITHMETICS = {  # name: dtype of the inputs, precision; those that are timed first
    "bf16": ("bf16", "fast"),
    "fp32 fast": ("fp32", "fast"),
    "fp16": ("fp16", "fast"),
    "fp32 tf32": ("fp32", "tf32"),
    "fp32 exact": ("fp32", "exact"),
}
TIMED = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32 fast"}
_HINGE = goal.T.con(margin=0.2)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "con(0.2) × con": {"T": _HINGE, "P": "con"},
    "nca × con, semi-hard": {"T": "nca", "P": "con", "mining": "semi-hard"},
    "cir × lin-ms": {"T": "cir", "P": "lin-ms"},
    "cir × sig-ms": {"T": "cir", "P": "sig-ms"},
    "vse0": {"T": _HINGE, "P": "con", "mining": goal.mining.all_negatives(average=False), "reduction": "sum"},
    "t-selhn": {"T": _HINGE, "P": "con", "mining": "selective"},
}
HARDEST, LIN, EXP = "con(0.2) × con", "cir × lin-ms", "cir × sig-ms"
MINED = (HARDEST, "nca × con, semi-hard", LIN, EXP)
BARE, DENSE, COMPILED, INF_CL, KEOPS = (
    "bare product",
    "dense loss",
    "dense loss, torch.compile",
    "Inf-CL (InfoNCE)",
    "KeOps (hardest, no gradient)",
)
OUTSIDERS_AT = (8192, 32768)  # sizes at which torch.compile and other libraries are timed: they compile for each
ANCHORS = 1 << 15  # of a size that is timed, whose negatives the gate looks at
COLD = 1 << 28  # bytes written before each call: several times the L2 cache
MB = 2**20


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"{time.monotonic() - _START:5.0f} s  {text}", file=sys.stderr, flush=True)


_START = time.monotonic()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


# ── samples, time, verdicts: nothing here needs a GPU ───────────────────────────────────────────────────────────────


class Budget:
    """Seconds to spend."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def fits(self, seconds: float) -> bool:
        return seconds <= self.left()


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10 % and 90 % quantiles."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), tenths[0], tenths[-1]


def rounds_in(allowance: float, one: float, least: int = 5, most: int = 50) -> int:
    """How many rounds of `one` second each an allowance gives."""
    return max(least, min(most, int(allowance / one))) if one > 0 else most


class Group(NamedTuple):
    """What is timed together, round by round."""

    n: int
    d: int
    dtype: str

    @property
    def flops(self) -> float:
        return 2.0 * self.n * self.n * self.d

    @property
    def huge(self) -> bool:
        """Whether only little of it is timed: the bare product, and two objectives forward and backward together."""
        return self.n > max(SIZES)

    @property
    def seconds(self) -> float:
        """A guess at the time of warming and of the fewest rounds, to decide what still fits."""
        products = 4 * 3 if self.huge else 7 * 40
        return 2 + products * self.flops / (200e12 if self.dtype == "fp32" else 400e12)

    @property
    def gate_seconds(self) -> float:
        """A guess at the time of `examine_size`, mostly in float64."""
        return 2 + self.flops / 100e12 + 4 * min(self.n, ANCHORS) * self.n * self.d / 30e12

    def __str__(self) -> str:
        return f"N = {self.n}, D = {self.d}, {self.dtype}"


TARGET = Group(32768, 1024, "bf16")


def by_importance(sizes: Iterable[int], dims: Iterable[int], dtypes: Iterable[str]) -> list[Group]:
    """Every combination: that of the targets first, then whatever differs from it the least, then the cheapest."""

    def rank(group: Group) -> tuple[float, float]:
        other = {"bf16": 0.0, "fp32": 1.0, "fp16": 1.5}[group.dtype]
        return (group.n != TARGET.n) + 1.25 * (group.d != TARGET.d) + other, group.flops

    groups = sorted((Group(n, d, dtype) for n in sizes for d in dims for dtype in dtypes), key=rank)
    needed = [group for group in (TARGET, TARGET._replace(dtype="fp32")) if group in groups]
    return needed + [group for group in groups if group not in needed]


class Finding(NamedTuple):
    """What the gate has measured of one case in one arithmetic, None where it has not looked.

    Errors in units of the truth's largest, or rms, entry.
    """

    case: str
    arithmetic: str
    worst: float | None = None
    worst_of_eager: float = 0.0
    typical: float | None = None
    typical_of_eager: float = 0.0
    rounding: float = 0.0  # one rounding of the gradients' dtype
    left_out: float | None = None  # share of anchors with a decision within the arithmetic's rounding
    regret: float | None = None  # the largest: true best − true similarity of the mined negative
    regret_allowed: float = 0.0
    differing: int = 0  # backward passes whose bits are not those of the first call
    reached: bool = True  # the inputs are what the case is about
    raised: str = ""


LEFT_OUT = 0.02


def faults(found: Finding) -> list[str]:
    """What is wrong with it; a NaN is. Errors: twice the eager objective's and two roundings of the output."""
    if found.raised:
        return [found.raised]
    rules = (
        ("largest error", found.worst, 2 * found.worst_of_eager + 2 * found.rounding),
        ("rms error", found.typical, 2 * found.typical_of_eager + 2 * found.rounding),
        ("share of anchors left out", found.left_out, LEFT_OUT),
        ("regret", found.regret, found.regret_allowed),
    )
    wrong = [
        f"{name} {value:.2g} > {limit:.2g}" for name, value, limit in rules if value is not None and not value <= limit
    ]
    if found.differing:
        wrong.append(f"{found.differing} runs differ in bits from the first")
    if not found.reached:
        wrong.append("the inputs are not what the case is about")
    return wrong


def is_red(findings: Sequence[Finding]) -> bool:
    """A gate that has found nothing has not been passed."""
    return not findings or any(faults(each) for each in findings)


Row = dict[str, Any]


def row_of(
    group: Group, what: str, part: str, samples: Sequence[float], host: Sequence[float], memory: float | None
) -> Row:
    """Milliseconds of one thing in one group; ratios come with `compare`."""
    ms, low, high = summary(samples)
    products = {"vse0": {"forward": 1, "backward": 3, "both": 4}, DENSE: {"both": 3}, COMPILED: {"both": 3}}
    count = products.get(what, {}).get(part, 0 if part == "backward" else 1)
    known = what not in ("t-selhn", INF_CL)  # the former's products depend on the data
    return {
        **group._asdict(),
        "what": what,
        "part": part,
        "ms": ms,
        "p10": low,
        "p90": high,
        "host_ms": statistics.median(host),
        "tflops": count * group.flops / ms / 1e9 if count and known else None,
        "of_product": None,
        "memory_mb": memory,
        "samples": list(samples),
    }


def compare(rows: list[Row]) -> None:
    """Fill in what each row takes of the bare product of its group."""
    for row in rows:
        bare = find(rows, Group(row["n"], row["d"], row["dtype"]), BARE, "forward")
        row["of_product"] = row["ms"] / bare["ms"] if bare else None


def find(rows: Iterable[Row], group: Group, what: str, part: str) -> Row | None:
    key = (*group, what, part)
    return next((row for row in rows if (row["n"], row["d"], row["dtype"], row["what"], row["part"]) == key), None)


class Verdict(NamedTuple):
    """A target and what became of it."""

    name: str
    value: float | None  # None: not measured
    limit: float
    at_most: bool
    unit: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or math.isnan(self.value):
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        if self.value is None or self.met is None:
            return "not measured"
        by = abs(self.value - self.limit) / self.limit
        return f"{'met' if self.met else 'missed'} by {100 * by:.3g} %"


def verdicts(rows: Sequence[Row], launches: Mapping[str, int], regret_share: float | None) -> list[Verdict]:
    """The targets, in the order of the table."""

    def ms(what: str, part: str, dtype: str = "bf16") -> float | None:
        row = find(rows, TARGET._replace(dtype=dtype), what, part)
        return None if row is None else float(row["ms"])

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    def largest(values: Iterable[float | None]) -> float | None:
        known = list(values)
        return None if None in known or not known else max(value for value in known if value is not None)

    used = [find(rows, TARGET, name, "both") for name in OBJECTIVES]
    counts = [launches.get(name) or None for name in MINED]
    bare = ms(BARE, "forward")
    return [
        Verdict("forward, rate of the bare product", ratio(bare, ms(HARDEST, "forward")), 0.80, False),
        Verdict("forward with hinge sums (lin-ms)", ratio(bare, ms(LIN, "forward")), 0.75, False),
        Verdict("forward with exp sums (sig-ms)", ratio(bare, ms(EXP, "forward")), 0.70, False),
        Verdict("backward of mined objectives", largest(ms(name, "backward") for name in MINED), 0.3, True, "ms"),
        Verdict("forward + backward, faster than dense", ratio(ms(DENSE, "both"), ms(HARDEST, "both")), 6, False, "×"),
        Verdict(
            "memory beyond inputs and gradients",
            largest(None if row is None else row["memory_mb"] for row in used),
            150,
            True,
            "MB",
        ),
        Verdict(
            "fp32 inputs, time of bf16's",
            largest(ratio(ms(name, "both", "fp32"), ms(name, "both")) for name in MINED),
            1.15,
            True,
            "×",
        ),
        Verdict("fp32 inputs, rows with regret ≤ 1e-6", regret_share, 0.999, False),
        Verdict("launches at N = 128, forward + backward", largest(counts), 6, True),
    ]


def kernels(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the kernels in a trace of torch.profiler, as they started; copying and filling memory is none."""
    return [str(e["name"]) for e in sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])]


def gate_table(findings: Iterable[Finding]) -> str:
    head = ["gate", "inputs", "error", "eager's", "rms", "eager's", "left out, %", "regret", "differing runs", ""]
    return markdown(
        head,
        (
            [
                f.case, f.arithmetic, f.worst, f.worst_of_eager or None, f.typical, f.typical_of_eager or None,
                None if f.left_out is None else 100 * f.left_out, f.regret, f.differing,
                "; ".join(faults(f)) or "green",
            ]
            for f in findings
        ),
    )  # fmt: skip


def timing_table(rows: Iterable[Row]) -> str:
    head = ["N", "D", "inputs", "what", "part", "ms", "10–90 %", "host ms", "× bare product", "TFLOP/s", "MB beyond"]
    return markdown(
        head,
        (
            [
                r["n"], r["d"], r["dtype"], r["what"], r["part"], r["ms"], f"{r['p10']:.3g}–{r['p90']:.3g}",
                r["host_ms"], r["of_product"], r["tflops"], r["memory_mb"],
            ]
            for r in rows
        ),
    )  # fmt: skip


def target_table(found: Iterable[Verdict]) -> str:
    head = ["target at N = 32768, D = 1024, bf16 (H200)", "measured", "target", ""]
    return markdown(
        head,
        (
            [v.name, v.value if v.value is None else f"{v.value:.4g} {v.unit}", f"{'≤≥'[not v.at_most]} {v.limit}", v]
            for v in found
        ),
    )


# ── the gate ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Case(NamedTuple):
    name: str
    objective: str
    data: str = "spread"  # what `batch` makes
    shape: str = "square"
    ids: bool = False


CASES = (
    Case(HARDEST, HARDEST),
    Case(EXP, EXP),
    Case(LIN, LIN),
    Case("semi-hard", "nca × con, semi-hard", data="close"),
    Case("vse0", "vse0", data="apart"),
    Case("t-selhn, half the batch collapsed", "t-selhn", data="collapsed"),
    Case("one item the negative of all", HARDEST, data="hub"),
    Case("with ids", EXP, ids=True),
    Case("N > M", EXP, shape="tall"),
    Case("N < M, odd D", LIN, shape="wide"),
    Case("small batch", EXP, shape="small"),
)


class Scale(NamedTuple):
    """How large the gate's batches are and how often each call is repeated."""

    n: int = 1104  # whole 16s, as the sizes timed, but not whole tiles; and beyond 2²⁰ elements of S
    d: int = 256
    repeats: int = 100

    def shape(self, name: str) -> tuple[int, int, int]:
        n, d = self.n, self.d
        return {
            "square": (n, n, d),
            "tall": (3 * n // 2, 2 * n // 3, d),
            "wide": (2 * n // 3, 3 * n // 2, d - 3),
            "small": (n // 5, n // 5, d),
        }[name]


_LIKENESS = {  # data: how much y is like its partner, from and to, and about how much like another item
    "spread": (0.4, 0.95, 0.5),
    "close": (0.8, 0.95, 0.5),
    "apart": (-0.7, -0.5, 0.0),
    "collapsed": (0.2, 0.4, 1.0),
    "hub": (0.4, 0.95, 0.0),
}


def batch(data: str, n: int, m: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit rows (n, d), (m, d) in float64, random, with few similarities near the thresholds that decide.

    All items lie on two opposite sides, so most similarities are near 1/2 or −1/2; thresholds fall between.
    spread: s⁺ between 0.6 and 0.9, one in a hundred 0.1; for each anchor a hard negative somewhere. close: s⁺ above
    0.8, and above most of these. apart: s⁺ about 0.2, for hinges over all negatives. collapsed: every other row equals
    all such rows to a thousandth; s⁺ of the others is far below their hardest negative. hub: row 0 of either side is
    the hardest negative of all other rows.
    """
    new: dict[str, Any] = {"generator": generator, "device": generator.device, "dtype": torch.float64}

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, **new)

    k, hub = min(n, m), data == "hub"
    common, other = torch.linalg.qr(torch.randn(d, 2, **new)).Q.T
    x_side, y_side = uniform(-1, 1, n, 1).sign(), uniform(-1, 1, m, 1).sign()
    if hub:
        x_side, y_side = x_side.abs(), y_side.abs()
    y_side[:k] = x_side[:k]
    a, b = torch.randn(n, d, **new), torch.randn(m, d, **new)
    a, b = (normalize(own - (own @ common)[:, None] * common) for own in (a, b))
    low, high, planted = _LIKENESS[data]
    alike = uniform(low, high, k, 1)
    if data == "spread":
        alike[: max(1, k // 100)] = -0.8
    # each is like its own partner, and like the next one of its kind, in a random order
    order = (8 * x_side[:k, 0] + 3 * (torch.arange(k, device=a.device) % 2) + uniform(-1, 1, k)).argsort()
    mixed = alike * a[:k] + (1 - alike**2).sqrt() * b[:k]
    mixed[order] += planted * uniform(0.6, 1.4, k, 1) * a[order.roll(1)]
    b[:k] = normalize(mixed)
    x, y = (normalize(side * common + own) for side, own in ((x_side, a), (y_side, b)))
    if data == "collapsed":
        x[::2], y[::2] = normalize(other + 0.02 * a[::2]), normalize(other + 0.02 * b[::2])
    if hub:
        x[0], y[0] = common, common
    return x, y


@contextmanager
def matrix_products(arithmetic: str, device: str) -> Iterator[None]:
    """PyTorch's own float32 products in tf32 where the arithmetic is, else exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "fp32 tf32" and device == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def coarse(x: Tensor, arithmetic: str) -> Tensor:
    """What the arithmetic sees of the inputs; tf32 is `matrix_products`' affair."""
    return x.half().float() if arithmetic == "fp32 fast" else x


class Rounding(NamedTuple):
    """How far similarities may be off."""

    scan: float  # those of the scan
    pair: float  # those of pairs, in float32
    choice: float  # the difference from which one negative is surely preferred to another


def rounding(x: Tensor, y: Tensor, s: Tensor, arithmetic: str) -> Rounding:
    """From PyTorch's products in the same arithmetic; s is x yᵀ in float64, or its upper left part."""
    (n, m), reach = s.shape, float(x.double().norm(dim=1).max() * y.double().norm(dim=1).max())
    with matrix_products(arithmetic, x.device.type):
        product = coarse(x[:n], arithmetic).float() @ coarse(y[:m], arithmetic).float().T
    k = min(n, m)
    pair = (x[:k].float() * y[:k].float()).sum(1)
    # twice what is seen; tensor cores truncate while they add, and keys keep 20 bits
    scan = 2 * float((product.double() - s).abs().max()) + 2**-21 * reach
    alike = 2 * x.shape[1] ** 0.5 * torch.finfo(torch.float32).eps * reach  # such differences count as ties
    return Rounding(scan, 2 * float((pair.double() - s.diagonal()).abs().max()), scan + alike + 2**-19 * reach)


def doubtful(objective: str, s: Tensor, live: Tensor, s_pos: Tensor, within: Rounding) -> Tensor:
    """(K,) anchors of one direction some decision of which lies within the rounding.

    Args:
        s, live: (K, M) float64, and where it is a negative.
    """
    chosen = OBJECTIVES[objective]
    hidden = torch.where(live, s, -torch.inf)
    own, best = s_pos[:, None], hidden.amax(1)
    found = torch.zeros_like(s_pos, dtype=torch.bool)

    def near(value: Tensor, limit: float) -> Tensor:
        found: Tensor = (value.abs() < limit).flatten(1).any(1)
        return found

    def lead(among: Tensor) -> Tensor:
        top = among.topk(2).values
        return top[:, :1] - top[:, 1:]

    hinge, mean = chosen["T"] is _HINGE, torch.zeros_like(found)
    if objective == "t-selhn":
        gap = (s_pos - best).abs()
        mean = gap < 0.01
        found |= near((gap - 0.01)[:, None], within.choice)
    if objective == "vse0":
        mean |= True
    if hinge:
        found |= torch.where(
            mean, near(hidden - own + 0.2, within.scan), near((best - s_pos + 0.2)[:, None], within.choice)
        )
    if chosen.get("mining") == "semi-hard":
        inside = torch.where((s > own - 0.2) & (s < own), hidden, -torch.inf)
        just_below = torch.where(s < own, hidden, -torch.inf).amax(1)
        found |= near(hidden - own, within.choice) | near((just_below - s_pos + 0.2)[:, None], within.choice)
        found |= near(lead(inside), within.choice)
    elif objective != "vse0":
        found |= near(lead(hidden), within.choice) & ~mean
    if chosen["P"].endswith("-ms"):
        found |= near(hidden - (s_pos.min() - 0.1), within.scan) | near(s_pos - best[:, None] - 0.1, within.pair)
    if chosen["P"] == "lin-ms":  # entries that are 0 are left out of its means
        found |= near((own - s_pos).fill_diagonal_(1.0), within.pair)
    return found


def window(objective: str, s: Tensor, live: Tensor, s_pos: Tensor) -> Tensor:
    """Where the mined negative may be."""
    if OBJECTIVES[objective].get("mining") != "semi-hard":
        return live
    own = s_pos[:, None]
    return live & (s > own - 0.2) & (s < own)


def regret(s: Tensor, live: Tensor, index: Tensor) -> Tensor:
    """(A,) true best − true value at the chosen index; inf where what was chosen is no negative, 0 without any."""
    hidden = torch.where(live, s, -torch.inf)
    best = hidden.amax(1)
    chosen = hidden.gather(1, index.clamp(min=0)[:, None])[:, 0]
    none = best == -torch.inf
    return torch.where(none, 0.0, best - chosen).masked_fill(none != (index < 0), torch.inf)


def errors(found: Sequence[Tensor], true: Sequence[Tensor]) -> tuple[float, float]:
    """The largest and the rms error of both gradients, in units of the true largest and rms entry; a NaN stays one."""
    worst, typical = [], []
    for actual, of in zip(found, true, strict=True):
        gap = (actual.double() - of).abs()
        worst.append(float(gap.max() / of.abs().max()))
        typical.append(float(gap.square().mean().sqrt() / of.square().mean().sqrt()))
    return float(torch.tensor(worst).max()), float(torch.tensor(typical).max())


def examine(case: Case, arithmetic: str, scale: Scale, device: str, seed: int) -> Finding:
    """One case of the gate in one arithmetic."""
    dtype, precision = ARITHMETICS[arithmetic]
    n, m, d = scale.shape(case.shape)
    generator = torch.Generator(device).manual_seed(seed)
    x, y = (side.to(DTYPES[dtype]) for side in batch(case.data, n, m, d, generator))
    k, chosen = min(n, m), OBJECTIVES[case.objective]
    live = torch.ones(n, m, dtype=torch.bool, device=device)
    live.diagonal().fill_(False)
    more: dict[str, Any] = {}
    if case.ids:
        more["ids"] = ids = torch.randint(max(2, n // 4), (n,), generator=generator, device=device)
        live &= ids[:, None] != ids
    s = x.double() @ y.double().T
    s_pos, within = s.diagonal(), rounding(x, y, s, arithmetic)
    directions = ((s[:k], live[:k]), (s.T[:k], live.T[:k]))
    left_out = torch.stack([doubtful(case.objective, a, on, s_pos, within) for a, on in directions]).any(0)
    more["weight"] = (~left_out).float()  # their decision is open: they emit nothing, here and there

    gx, gy, stats = goal.gradients(x, y, **chosen, **more, impl="triton", precision=precision)
    true = goal.gradients(x.double(), y.double(), **chosen, **more, impl="torch")
    with matrix_products(arithmetic, device):
        eager = goal.gradients(coarse(x, arithmetic), coarse(y, arithmetic), **chosen, **more, impl="torch")
    worst, typical = errors((gx, gy), true[:2])
    worst_of_eager, typical_of_eager = errors(eager[:2], true[:2])
    lost = [
        regret(a, window(case.objective, a, on, s_pos), at) for (a, on), at in zip(directions, stats.index, strict=True)
    ]
    if chosen.get("mining") == "semi-hard":
        lost = [each[~left_out] for each in lost]
    differing = 0
    for _ in range(scale.repeats):
        torch.full((4 * gx.numel(),), torch.nan, device=device)  # what the next call's fresh memory holds
        a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
        again = torch.autograd.grad(goal.apply(a, b, **chosen, **more, impl="triton", precision=precision), (a, b))
        differing += not (torch.equal(gx, again[0]) and torch.equal(gy, again[1]))
    reached = True
    if case.data == "hub":
        reached = float((stats.index[:, 1:] == 0).double().mean()) > 0.9
    if case.data == "collapsed":
        reached = 0.3 < float(true[2].fallback) < 0.7
    return Finding(
        case.name, arithmetic, worst, worst_of_eager, typical, typical_of_eager,
        torch.finfo(gx.dtype).eps / 2, float(left_out.double().mean()), float(torch.cat(lost).max()),
        within.choice, differing, reached,
    )  # fmt: skip


def inputs(group: Group, device: str) -> tuple[Tensor, Tensor]:
    """As in benchmarks.cpu, pairs of unit vectors early in training, made where they are needed."""
    generator = torch.Generator(device).manual_seed(group.n)
    x = torch.randn(group.n, group.d, generator=generator, device=device)
    y = torch.randn(group.n, group.d, generator=generator, device=device).add_(x, alpha=0.15)
    x, y = (normalize(side).to(DTYPES[group.dtype]).requires_grad_() for side in (x, y))
    return x, y


def examine_size(group: Group, device: str, rows: int = ANCHORS, held: int = 1 << 26) -> tuple[Finding, float]:
    """What the hardest are worth at a size that is timed, and the share of anchors with regret ≤ 1e-6.

    All anchors up to `rows`, then as many at random; `held` elements of S at once.
    """
    x, y = (side.detach() for side in inputs(group, device))
    arithmetic = TIMED[group.dtype]
    index = goal.gradients(x, y, **OBJECTIVES[HARDEST], impl="triton")[2].index
    corner = min(group.n, 1024)
    within = rounding(x, y, x[:corner].double() @ y[:corner].double().T, arithmetic)
    sample = torch.randperm(group.n, device=device)[:rows]
    lost = []
    for own, other, at in ((x, y, index[0]), (y, x, index[1])):
        wide = other.double()
        for anchors in sample.split(max(1, held // group.n)):
            s = own[anchors].double() @ wide.T
            live = torch.ones_like(s, dtype=torch.bool).scatter_(1, anchors[:, None], False)
            lost.append(regret(s, live, at[anchors]))
    each = torch.cat(lost)
    finding = Finding(str(group), arithmetic, regret=float(each.max()), regret_allowed=within.choice)
    return finding, float((each <= 1e-6).double().mean())


# ── the timings ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Run(NamedTuple):
    """Something that is timed: `call` with what `prepare` has made."""

    prepare: Callable[[], Any]
    call: Callable[[Any], object]


def of_loss(loss: Callable[[], Tensor], x: Tensor, y: Tensor, parts: Sequence[str]) -> dict[str, Run]:
    """Its forward pass, its backward pass, and both."""

    def clear() -> None:
        x.grad = y.grad = None

    def forward() -> Tensor:
        clear()
        return loss()

    runs = {
        "forward": Run(clear, lambda _: loss()),
        "backward": Run(forward, lambda made: made.backward()),
        "both": Run(clear, lambda _: torch.autograd.backward(loss())),
    }
    return {part: runs[part] for part in parts}


def blockwise(x: Tensor, y: Tensor, held: int = 1 << 32) -> Run:
    """x yᵀ by the vendor's library, into memory that is there already; in blocks of rows where it would not fit."""
    x, y = x.detach(), y.detach()
    rows = min(len(x), max(1, held // len(y)))
    out = torch.empty(rows, len(y), dtype=x.dtype, device=x.device)

    def product(_: object) -> Tensor:
        part = x
        for part in x.split(rows):
            torch.mm(part, y.T, out=out[: len(part)])
        return out[: len(part)]  # the last block

    return Run(lambda: None, product)


def contrastive(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """InfoNCE in both directions by Inf-CL, which computes in float32."""
    loss: Callable[..., Tensor] = importlib.import_module("inf_cl").cal_flash_loss
    return lambda: (loss(x, y, scale=20.0) + loss(y, x, scale=20.0)).mean() / 2


def two_best(x: Tensor, y: Tensor) -> Callable[[], object]:
    """Of every row and of every column the two largest entries of S, by KeOps: one of them is no pair."""
    lazy: Callable[..., Any] = importlib.import_module("pykeops.torch").LazyTensor
    a, b = x.detach().float()[:, None], y.detach().float()[None]

    def mine() -> object:
        s = -(lazy(a) | lazy(b))
        return s.argKmin(2, dim=1), s.argKmin(2, dim=0)

    return mine


def missing_peers() -> list[str]:
    return [
        f"{name}: the package {package} is not installed"
        for name, package in ((INF_CL, "inf_cl"), (KEOPS, "pykeops"))
        if importlib.util.find_spec(package) is None
    ]


def runs_of(group: Group, x: Tensor, y: Tensor, objectives: Iterable[str]) -> dict[tuple[str, str], Run]:
    """All that is timed in a group, by what and part; ours first, what may fail last."""
    every = ("both",) if group.huge else ("forward", "backward", "both")
    runs = {(BARE, "forward"): blockwise(x, y)}
    losses: dict[str, tuple[Callable[[], Tensor], Sequence[str]]] = {}
    for name in objectives:
        losses[name] = (lambda chosen=OBJECTIVES[name]: goal.apply(x, y, **chosen, impl="triton"), every)  # type: ignore[misc]
    if not group.huge:
        losses[DENSE] = (lambda: dense(x, y), ("both",))
    if group.n in OUTSIDERS_AT and group.d == TARGET.d:
        if group.dtype == "bf16":
            compiled: Callable[..., Tensor] = torch.compile(dense, dynamic=False)
            losses[COMPILED] = (lambda: compiled(x, y), ("both",))
            if importlib.util.find_spec("inf_cl") is not None:
                losses[INF_CL] = (contrastive(x, y), ("both",))
        if group.dtype == "fp32" and group.n == OUTSIDERS_AT[0] and importlib.util.find_spec("pykeops") is not None:
            mine = two_best(x, y)
            runs[KEOPS, "forward"] = Run(lambda: None, lambda _: mine())
    for name, (loss, parts) in losses.items():
        runs |= {(name, part): run for part, run in of_loss(loss, x, y, parts).items()}
    return runs


def warmed(runs: dict[tuple[str, str], Run], left_out: list[str], group: Group) -> dict[tuple[str, str], Run]:
    """Those that run, after a call or two; why the others do not is noted. Ours has to, unless memory is lacking."""
    kept = {}
    for (what, part), run in runs.items():
        try:
            for _ in range(1 if group.huge else 2):
                run.call(run.prepare())
            torch.cuda.synchronize()
            kept[what, part] = run
        except torch.OutOfMemoryError:
            left_out.append(f"{group}: {what}, {part}: out of memory")
        except Exception as error:
            if what == BARE or what in OBJECTIVES:
                raise
            left_out.append(f"{group}: {what}: {first_line(error)}")
        torch.cuda.empty_cache()
    return kept


def once(run: Run, cold: Tensor) -> tuple[Any, Any, float]:
    """The events around one call, and the milliseconds that the host needed; `cold` is written first, for the L2."""
    made = run.prepare()
    cold.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    start = time.perf_counter()
    run.call(made)
    host = 1e3 * (time.perf_counter() - start)
    end.record()
    return begin, end, host


def peak(run: Run, x: Tensor, y: Tensor) -> float:
    """Megabytes that a call needs at its peak, beyond what there was and the gradients that it leaves."""
    made = run.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run.call(made)
    torch.cuda.synchronize()
    left = sum(side.grad.numel() * side.grad.element_size() for side in (x, y) if side.grad is not None)
    return float(torch.cuda.max_memory_allocated() - before - left) / MB


def measure(
    group: Group, budget: Budget, allowance: float, left_out: list[str], device: str, objectives: Iterable[str]
) -> list[Row]:
    """The rows of a group."""
    x, y = inputs(group, device)
    runs = warmed(runs_of(group, x, y, objectives), left_out, group)
    memory = {key: peak(run, x, y) for key, run in runs.items() if key[1] == "both"}
    cold = torch.empty(COLD, dtype=torch.uint8, device=device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    host: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    rounds, done = 1, 0
    while done < rounds:
        start = time.monotonic()
        found = {key: once(run, cold) for key, run in runs.items()}
        torch.cuda.synchronize()
        for key, (begin, end, own) in found.items():
            times[key].append(begin.elapsed_time(end))
            host[key].append(own)
        done += 1
        if done == 1:
            rounds = rounds_in(allowance, time.monotonic() - start, least=2 if group.huge else 5)
        if done < rounds and not budget.fits(time.monotonic() - start):
            left_out.append(f"{group}: {rounds - done} of {rounds} rounds")
            break
    return [row_of(group, *key, times[key], host[key], memory.get(key)) for key in runs]


def count_launches(n: int, d: int, device: str, objectives: Sequence[str]) -> dict[str, list[str]]:
    """The kernels of one forward and backward pass of each objective, by name; none where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    x, y = inputs(Group(n, d, "bf16"), device)
    found: dict[str, list[str]] = {}
    for name in (*objectives[:1], *objectives):  # the first twice: the profiler's own start may lose events
        run = of_loss(lambda name=name: goal.apply(x, y, **OBJECTIVES[name], impl="triton"), x, y, ["both"])["both"]  # type: ignore[misc]
        run.call(run.prepare())
        run.prepare()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run.call(None)
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(path))
            found[name] = kernels(json.loads(path.read_text())["traceEvents"])
    return found


# ── one call ────────────────────────────────────────────────────────────────────────────────────────────────────────


def compile_share(index: int, of: int, options: argparse.Namespace, scale: Scale, device: str) -> None:
    """Run a share of the kernels once, so that Triton's cache on disk holds them: compiling in turn takes minutes."""
    work = [(objective, arithmetic) for arithmetic in chosen_arithmetics(options.dtypes) for objective in OBJECTIVES]
    for objective, arithmetic in work[index::of]:
        dtype, precision = ARITHMETICS[arithmetic]
        for case in CASES:
            if case.objective == objective:
                examine(case, arithmetic, scale._replace(repeats=0), device, seed=0)
        for n in (n for n in options.sizes if n <= TARGET.n and TIMED[dtype] == arithmetic):
            x, y = inputs(Group(n, max(options.dims), dtype), device)
            goal.apply(x, y, **OBJECTIVES[objective], impl="triton", precision=precision).backward()
    torch.cuda.synchronize()


def compile_all(options: argparse.Namespace, seconds: float) -> None:
    """Every share in a process of its own; one that fails leaves its work to whoever needs it."""
    of = max(1, min(12, (os.cpu_count() or 2) - 2))
    asked = [*map(str, ("--sizes", *options.sizes, "--dims", *options.dims, "--dtypes", *options.dtypes))]
    command = [sys.executable, "-m", "benchmarks.gpu", *asked, "--compile"]
    shares = [
        subprocess.Popen([*command, str(i), str(of)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for i in range(of)
    ]
    budget, failed = Budget(seconds), []
    for share in shares:
        try:
            _, said = share.communicate(timeout=max(0.0, budget.left()))
            failed += [said.strip().splitlines()[-1:]] if share.returncode else []
        except subprocess.TimeoutExpired:
            share.kill()
            share.communicate()
            failed.append(["out of time"])
    say(f"compiled in {of} processes; {len(failed)} of them did not finish {failed[:1] or ''}")


def chosen_arithmetics(dtypes: Iterable[str]) -> list[str]:
    wanted = set(dtypes)
    return [name for name, (dtype, _) in ARITHMETICS.items() if dtype in wanted]


def gate(
    arithmetics: Iterable[str],
    device: str,
    scale: Scale,
    seed: int,
    budget: Budget | None = None,
    cases: Iterable[Case] = CASES,
) -> tuple[list[Finding], list[str]]:
    """Every case in every arithmetic, and what there was no time for."""
    findings, left_out = [], []
    for arithmetic in arithmetics:
        for case in cases:
            if budget is not None and not budget.fits(5):
                left_out.append(f"gate: {case.name}, {arithmetic}")
                continue
            try:
                found = examine(case, arithmetic, scale, device, seed)
            except Exception as error:
                found = Finding(case.name, arithmetic, raised=first_line(error))
            findings.append(found)
            say(f"gate: {case.name}, {arithmetic}: {'; '.join(faults(found)) or 'green'}")
    return findings, left_out


def passed(findings: Iterable[Finding], arithmetic: str) -> list[str]:
    """The objectives all of whose cases have been examined in an arithmetic: only these are timed."""
    seen = {found.case for found in findings if found.arithmetic == arithmetic}
    return [name for name in OBJECTIVES if all(case.name in seen for case in CASES if case.objective == name)]


def obstacle() -> str | None:
    """Why nothing can be measured here, or None."""
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False. Kernels are timed on an NVIDIA GPU or not at all."
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, so that kernels would run in Python. Unset it."
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed."
    return None


def machine(seed: int) -> dict[str, Any]:
    """What the benchmarks of a CPU have not: the device, and the seed of the gate."""
    triton: Any = importlib.import_module("triton")
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "seed": seed,
    }


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time and memory against N on logarithmic axes, forward and backward; the floor is the bare product."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    for what in (BARE, *OBJECTIVES, DENSE, COMPILED, INF_CL):
        part, style = ("forward", "k--") if what == BARE else ("both", "o-" if what in OBJECTIVES else "s:")
        mine = [row for row in rows if (row["d"], row["dtype"], row["what"], row["part"]) == (*TARGET[1:], what, part)]
        mine.sort(key=lambda row: int(row["n"]))
        if not mine:
            continue
        label = f"{what} (the floor)" if what == BARE else what
        (line,) = time_axes.plot([r["n"] for r in mine], [r["ms"] for r in mine], style, label=label, markersize=4)
        known = [row for row in mine if row["memory_mb"] is not None]
        size = [max(row["memory_mb"], 0.01) for row in known]
        if known:
            memory_axes.plot([row["n"] for row in known], size, style, color=line.get_color(), markersize=4)
    matrix = sorted({row["n"] for row in rows if (row["d"], row["dtype"]) == TARGET[1:]})
    memory_axes.plot(matrix, [2 * n * n / MB for n in matrix], "k--", label="one matrix S in 16 bit")
    for axes, name in ((time_axes, "ms"), (memory_axes, "MB beyond inputs and gradients")):
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel=name)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


class Report:
    """What one call has found, as it grows."""

    def __init__(self, known: dict[str, Any], save: bool, findings: list[Finding], left_out: list[str]) -> None:
        self.known, self.save, self.findings, self.left_out = known, save, findings, left_out
        self.rows: list[Row] = []
        self.launches: dict[str, list[str]] = {}
        self.regret_share: float | None = None
        self.path: Path | None = None  # once it is written

    @property
    def verdicts(self) -> list[Verdict]:
        return verdicts(self.rows, {name: len(found) for name, found in self.launches.items()}, self.regret_share)

    def write(self) -> None:
        """JSON after every step: a call that is cut off leaves what it has."""
        if not self.save:
            return
        compare(self.rows)
        device = "-".join(str(self.known["device"]).lower().split())
        found = {
            **self.known,
            "gate": [{**each._asdict(), "faults": faults(each)} for each in self.findings],
            "targets": [{**each._asdict(), "verdict": str(each)} for each in self.verdicts],
            "launches": self.launches,
            "left_out": self.left_out,
        }
        self.path = keep(f"gpu-{self.known['date']}-{device}", found, self.rows)

    def draw(self) -> None:
        if self.path is None or not self.rows:
            return
        try:
            plot(self.rows, self.path.with_suffix(".png"), f"{self.known['device']}, D = {TARGET.d}, {TARGET.dtype}")
        except ImportError:
            say("no picture: matplotlib is not installed")

    def __str__(self) -> str:
        compare(self.rows)
        counts = markdown(
            ["launches at N = 128, forward + backward", "kernels"],
            ([name, len(found) or "not measured"] for name, found in self.launches.items()),
        )
        spent = "\n".join(f"* {each}" for each in self.left_out) or "* nothing"
        parts = (
            gate_table(self.findings),
            timing_table(sorted(self.rows, key=lambda r: (r["dtype"], r["d"], r["n"]))),
            counts,
            target_table(self.verdicts),
        )
        return "\n\n".join((*parts, f"Left out:\n\n{spent}", facts(self.known)))


def sizes_gate(groups: Iterable[Group], report: Report, budget: Budget, device: str) -> list[Group]:
    """The groups whose mined negatives have been looked at, at their own size."""
    ready = []
    for group in groups:
        if not budget.fits(group.gate_seconds) or not passed(report.findings, TIMED[group.dtype]):
            report.left_out.append(f"gate and timings: {group}")
            continue
        try:
            found, share = examine_size(group, device)
        except torch.OutOfMemoryError:
            report.left_out.append(f"{group}: out of memory")
            torch.cuda.empty_cache()
            continue
        report.findings.append(found)
        if group == TARGET._replace(dtype="fp32"):
            report.regret_share = share
        ready.append(group)
    say(f"gate: mined negatives at {len(ready)} sizes")
    return ready


def fill(report: Report, groups: list[Group], budget: Budget, device: str, largest: bool) -> None:
    """Launches and timings, the most important first."""
    report.launches = count_launches(128, 1024, device, passed(report.findings, "bf16"))
    report.write()
    needed = [group for group in groups if (group.n, group.d) == TARGET[:2]]
    rest = [group for group in groups if group not in needed]
    if largest:
        n = LARGEST
        while n > max((group.n for group in groups), default=0):
            found = sizes_gate([Group(n, 1024, "bf16")], report, budget, device)
            if is_red(report.findings):
                return
            if found or not budget.fits(30):
                rest = found + rest
                break
            n //= 2
    queue = needed + rest
    for position, group in enumerate(queue):
        objectives = passed(report.findings, TIMED[group.dtype])
        if group.huge:
            objectives = [name for name in (HARDEST, EXP) if name in objectives]
        if not budget.fits(group.seconds):
            report.left_out.append(f"timings: {group}")
            continue
        allowance = max(1.0, min(20.0, 3 * budget.left() / (len(queue) - position + 2)))
        report.rows += measure(group, budget, allowance, report.left_out, device, objectives)
        torch.cuda.empty_cache()
        report.write()
        say(f"timed: {group}; {budget.left():.0f} s left")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    made.add_argument("--dims", type=int, nargs="+", default=DIMS)
    made.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    made.add_argument("--minutes", type=float, default=8.0)
    made.add_argument("--save", action="store_true", help="keep the rows and a picture under benchmarks/results/")
    made.add_argument("--largest", action="store_true", help=f"N = {LARGEST} too, or the largest half of it that fits")
    made.add_argument("--compile", type=int, nargs=2, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None, device: str = "cuda", scale: Scale | None = None) -> None:
    options, scale = parser().parse_args(arguments), scale or Scale()
    reason = obstacle()
    if reason is not None:
        raise SystemExit(f"benchmarks.gpu: {reason}")
    if options.compile:
        index, of = options.compile
        compile_share(index, of, options, scale, device)
        return
    seconds = 60 * options.minutes
    budget, seed = Budget(seconds), int(time.time())
    compile_all(options, 0.35 * seconds)
    findings, left_out = gate(
        chosen_arithmetics(options.dtypes), device, scale, seed, Budget(budget.left() - 0.5 * seconds)
    )
    known = conditions("benchmarks.gpu", arguments, **machine(seed))
    report = Report(known, options.save, findings, [*missing_peers(), *left_out])
    if not is_red(findings):
        groups = by_importance(options.sizes, options.dims, options.dtypes)
        ready = sizes_gate(groups, report, Budget(budget.left() - 0.4 * seconds), device)
        if not is_red(report.findings):
            fill(report, ready, budget, device, options.largest)
    if is_red(report.findings):
        report.write()
        print(gate_table(report.findings))
        raise SystemExit("benchmarks.gpu: the gate is red; a wrong gradient is not timed")
    report.write()
    print(report)
    report.draw()


if __name__ == "__main__":
    main()
