"""What each of the processes of test_distributed.py does: it runs jobs together with the others and says what is wrong.

A job is plain data: which group, the global batch, how it is cut, the arguments, and what one process makes of it.
"""

import copy
import datetime
import importlib
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
import goal.distributed
from goal.candidates import Augmented
from goal.candidates.two_way import TwoWay
from goal.distributed.exchange import Coming, Ranks, Wire
from goal.distributed.rows import shared_seed
from goal.engine import eager
from goal.similarity import Dot

WORLD = 4
MEMBERS = {1: [1], 2: [1, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3]}  # ranks of the world in the group of each size
MININGS = goal.mining.RULES


class Job(NamedTuple):
    """One thing that the ranks of a group do together."""

    name: str
    size: int  # of the group
    what: str  # a function of this file
    arguments: dict[str, Any]


class Expected(NamedTuple):
    """What one process makes of the global batch."""

    value: Tensor | None  # 0-d
    gx: Tensor  # (N, D)
    gy: Tensor  # (N, D)
    index: Tensor | None  # (2, N)
    stats: goal.Stats | None


def gap(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """The largest error, in units of the largest entry, or of `scale`."""
    if actual.shape != expected.shape:
        return torch.inf
    scale = expected.abs().max().item() if scale is None else scale
    error = (actual.double() - expected.double()).abs().max().item()
    return error / max(scale, 1e-4) if error == error else torch.inf


def chosen(T: Any, P: Any, mining: Any, **rest: Any) -> dict[str, Any]:
    """Arguments of `goal.apply` from names and parameters, which travel between processes."""
    (t, t_params), (p, p_params), (m, m_params) = T, P, mining
    if "positives" in rest:
        name, params = rest["positives"]
        rest["positives"] = goal.positives.RULES[name](**params)
    return {"T": goal.T[t](**t_params), "P": goal.P[p](**p_params), "mining": MININGS[m](**m_params), **rest}


def place(group: Any) -> tuple[int, int]:
    """This process's rank in a group, and the group's size."""
    wire = Wire(group)
    return wire.rank, wire.size


def own(counts: Sequence[int], rank: int) -> slice:
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


# ── jobs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def objective(
    group: Any,
    x: Tensor,
    y: Tensor,
    ids: Tensor | None,
    y_ids: Tensor | None,
    weight: Tensor | None,
    counts: Sequence[int],
    arguments: dict[str, Any],
    expected: Expected,
    tolerance: float,
    averaged: bool = False,
    exchange: str = "gather",
    by_gradients: bool = False,
) -> list[str]:
    """The own rows' gradient, the value and the statistics against those of one process."""
    rank, size = place(group)
    here = own(counts, rank)
    cut = {name: None if one is None else one[here] for name, one in (("ids", ids), ("y_ids", y_ids))}
    cut["weight"] = None if weight is None else weight[..., here]
    rest = {**chosen(**arguments), "group": group, "averaged": averaged, "exchange": exchange}
    x, y = x[here].clone().requires_grad_(), y[here].clone().requires_grad_()
    value, stats = None, None
    if by_gradients:
        gx, gy, stats = goal.gradients(x.detach(), y.detach(), **cut, **rest)
    else:
        module = goal.Objective(**rest)
        value = module(x, y, **cut)
        value.backward()
        gx, gy = x.grad, y.grad
        mining, P = arguments["mining"][0], arguments["P"][0]
        if exchange != "ring" or (mining != "soft" and (mining != "all" or P.endswith("-ms"))):
            stats = module.stats
    by = size if averaged else 1
    gaps = {
        name: gap(actual.double() / by, true[here], true.abs().max().item())
        for name, actual, true in (("gx", gx, expected.gx), ("gy", gy, expected.gy))
    }
    if value is not None and expected.value is not None:
        gaps["value"] = gap(value.detach(), expected.value)
    wrong = [f"{name} is {error:.1e} off" for name, error in gaps.items() if not error <= tolerance]
    if stats is not None and expected.index is not None and not torch.equal(stats.index, expected.index[:, here]):
        wrong.append(f"index {stats.index.tolist()} is not {expected.index[:, here].tolist()}")
    if stats is not None and expected.stats is not None:
        names = ["s_pos", "s_neg", "T", "P_pos", "P_neg"] + ["effective"] * (expected.stats.effective is not None)
        for name in names:
            actual, true = getattr(stats, name), getattr(expected.stats, name)[..., here]
            if not torch.allclose(actual, true, rtol=tolerance, atol=tolerance):
                wrong.append(f"stats.{name}")
    return wrong


def in_small_tiles(group: Any, **arguments: Any) -> list[str]:
    """The same where every block is several tiles."""
    with mock.patch.object(eager, "TILE", 1), mock.patch.object(eager, "SMALL", 0):
        return objective(group, **arguments)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What happens, in order: blocks of S that are made, rows that are sent, and waited for."""
    events: list[str] = []

    def saying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def said(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return call(*args, **kwargs)

        return said

    with (
        mock.patch.object(eager, "mine", saying("mine", eager.mine)),
        mock.patch.object(Wire, "gather", saying("gather", Wire.gather)),
        mock.patch.object(Wire, "swap", saying("swap", Wire.swap)),
        mock.patch.object(Wire, "shift", saying("shift", Wire.shift)),
        mock.patch.object(Coming, "wait", saying("wait", Coming.wait)),
    ):
        yield events


def unit(n: int, d: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(drawn, dim=1).to(dtype)


def overlap(group: Any) -> list[str]:
    """The own block is mined while the others' rows are on their way; in a ring, each block while the next is."""
    wrong, (rank, size) = [], place(group)
    x, y = unit(8, 4, rank), unit(8, 4, 10 + rank)
    with watched() as events:  # the line, s⁺, y; x is not sent, since nobody needs a gradient
        goal.apply(x, y, group=group)
    if events[:8] != [
        "gather",
        "wait",
        "gather",
        "wait",
        "gather",
        "mine",
        "wait",
        "mine",
    ]:
        wrong.append(f"gather: {events}")
    with watched() as events:
        goal.apply(x, y, group=group, exchange="ring")
    if size > 2 and events[4:12] != ["shift", "mine", "shift", "wait", "shift", "mine", "wait", "shift"]:
        wrong.append(f"ring: {events}")
    return wrong


def backward(group: Any) -> list[str]:
    """Nothing is sent in backward; ranks may need different gradients; the incoming gradient multiplies."""
    wrong, (rank, _) = [], place(group)
    for exchange in ("gather", "ring"):
        for mining in ("hardest", "all", "selective"):
            x, y = unit(6 + rank, 4, rank), unit(6 + rank, 4, 10 + rank)
            rest: dict[str, Any] = {"mining": mining, "group": group, "exchange": exchange}
            gx, gy, _ = goal.gradients(x, y, **rest)
            x.requires_grad_(rank % 2 == 0), y.requires_grad_(rank != 0)
            loss = goal.apply(x, y, **rest)
            with mock.patch.object(Wire, "_count", side_effect=AssertionError("something was sent")):
                if x.requires_grad or y.requires_grad:
                    (2.5 * loss).backward(retain_graph=True)
                    loss.backward()
            for name, side, expected in (("x", x, gx), ("y", y, gy)):
                if side.requires_grad != (side.grad is not None):
                    wrong.append(f"{exchange} {mining}: {name}.grad is {side.grad}")
                elif side.grad is not None and not gap(side.grad, 3.5 * expected) <= 1e-12:
                    wrong.append(f"{exchange} {mining}: {name}.grad")
            try:
                if x.requires_grad:
                    (first,) = torch.autograd.grad(goal.apply(x, y.detach(), **rest), x, create_graph=True)
                    first.sum().backward()
                    wrong.append("a second derivative")
                else:
                    goal.apply(x, y.detach(), **rest)
            except RuntimeError as error:
                if "no second derivative" not in str(error):
                    raise
    return wrong


def tiles_once(group: Any) -> list[str]:
    """Mining makes every entry of S once, over all ranks; `explain` knows how often dense objectives make it."""
    wrong, (rank, size) = [], place(group)
    n, made = 6, [0]
    whole = Dot.tile

    def tile(self: Dot, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        made[0] += len(x) * len(y)
        return whole(self, x, y, out)

    x, y = unit(n, 4, rank).requires_grad_(), unit(n, 4, 10 + rank).requires_grad_()
    for exchange in ("gather", "ring"):
        for mining in MININGS:
            made[0] = 0
            with mock.patch.object(Dot, "tile", tile):
                goal.apply(x, y, mining=mining, group=group, exchange=exchange).backward()
            passes = goal.explain(x, y, mining=mining, group=group, exchange=exchange).passes
            if made[0] != passes * n * n * size:
                wrong.append(f"{exchange} {mining}: {made[0]} entries, {passes} passes")
    return wrong


def traffic(group: Any) -> list[str]:
    """The bytes that are sent are those of `goal.explain`."""
    wrong, (rank, size) = [], place(group)
    n, d = 16, 24
    ids = torch.arange(n)
    for dtype, number in ((torch.float32, 0), (torch.float64, 1), (torch.bfloat16, 2)):
        x, y = (unit(n, d, seed + rank, dtype).requires_grad_() for seed in (0, 10))
        for P in ("con", "lin-ms", "sig-ms") if number == 0 else ("sig-ms",):
            for mining in MININGS:
                plan = goal.explain(x, y, P=P, mining=mining, group=group)
                extra = [{}, {"ids": ids}, {"ids": ids, "weight": torch.ones(2, n)}][number]
                more = (size - 1) * n * [0, 8, 8 + 2 * 4][number]
                for exchange in ("gather", "ring"):
                    with goal.distributed.counting() as sent:
                        goal.apply(x, y, P=P, mining=mining, group=group, exchange=exchange, **extra).backward()
                    most = getattr(plan, exchange) + more
                    least = most
                    if exchange == "ring" and mining not in ("all", "soft"):
                        width = max(4, dtype.itemsize)
                        least -= n * d * (dtype.itemsize + 2 * width)
                        mean = torch.tensor(float(sent.bytes))
                        torch.distributed.all_reduce(mean, group=Wire(group).group)
                        if not least < mean.item() / size <= most:
                            wrong.append(f"{dtype} {P} {mining} ring: {least} < {mean.item() / size} <= {most}")
                    elif sent.bytes != most:
                        wrong.append(f"{dtype} {P} {mining} {exchange}: {sent.bytes} is not {most}")
    with goal.distributed.counting() as sent:
        goal.apply(x.detach(), y.detach(), group=group)
    if sent.bytes != goal.explain(x, y, group=group).gather - n * d * dtype.itemsize * (size - 1):
        wrong.append(f"{sent.bytes} bytes where nobody needs a gradient: x was sent")
    return wrong


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def disagreement(group: Any) -> list[str]:
    """What differs on the last rank is named on all of them, and the next call works."""
    rank, size = place(group)
    last = rank == size - 1
    x, y = unit(6, 4, rank), unit(6, 4, 10 + rank)
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "D": ({"x": x[:, :3], "y": y[:, :3]}, "D is"),
        "dtype": ({"x": x.float(), "y": y.float()}, "x.dtype is"),
        "tau": ({"T": goal.T.cir(tau=3.0)}, "T is"),
        "P": ({"P": "lin"}, "P is"),
        "mining": ({"mining": "all"}, "mining is"),
        "reduction": ({"reduction": "sum"}, "reduction is"),
        "similarity": ({"similarity": "cosine"}, "similarity is"),
        "ids": ({"ids": torch.arange(6)}, "ids is none"),
        "weight": ({"weight": torch.ones(6)}, "weight is"),
        "averaged": ({"averaged": True}, "averaged is"),
        "exchange": ({"exchange": "ring"}, "exchange is"),
    }
    wrong = []
    for name, (change, text) in changes.items():
        arguments = {"x": x, "y": y, "group": group, **(change if last else {})}
        said = raised(lambda arguments=arguments: goal.apply(**arguments))
        first = ", ".join(map(str, range(size - 1)))
        if not (said.startswith("ValueError") and text in said and f"on rank {size - 1}" in said and first in said):
            wrong.append(f"{name}: {said}")
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "rows": ({"x": x[:3]}, "same number of rows"),
        "nothing": ({"x": x[:0], "y": y[:0]}, "at least one row"),
        "NaN": ({"y": y.clone().fill_(torch.nan)}, "y has a non-finite value"),
        "weight": ({"weight": -torch.ones(6)}, "weight must be finite"),
        "type": ({"x": x.int()}, "TypeError: x must have one of the dtypes"),
        "impl": ({"impl": "triton"}, "impl='triton' cannot be used here"),
    }
    for name, (change, text) in refused.items():
        arguments = {"x": x, "y": y, "group": group, **(change if last else {})}
        said = raised(lambda arguments=arguments: goal.apply(**arguments))
        if not (text in said and f"rank {size - 1}: " in said and "rank 0" not in said):
            wrong.append(f"{name}: {said}")
        if said.startswith("TypeError") != (name == "type" and last):
            wrong.append(f"{name}: {said}")
    goal.apply(x, y, group=group)
    return wrong


def nan_passes(group: Any) -> list[str]:
    """Without the check a NaN on one rank shows in the gradients of all."""
    wrong, (rank, _) = [], place(group)
    for exchange in ("gather", "ring"):
        for mining in ("hardest", "all"):
            x, y = unit(6, 4, rank), unit(6, 4, 10 + rank)
            if rank == 0:
                y[2, 1] = torch.nan
            gx, _, _ = goal.gradients(x, y, mining=mining, group=group, exchange=exchange, check_finite=False)
            if not gx.isnan().all(1).any():
                wrong.append(f"{exchange} {mining}")
    return wrong


def shown(group: Any) -> list[str]:
    """Statistics come where they can, with an error where they cannot; a graph breaks and goes on."""
    rank, _ = place(group)
    x, y = unit(6, 4, rank), unit(6, 4, 10 + rank)
    ring = goal.Objective(P="con", mining="all", group=group, exchange="ring")
    ring(x, y)
    gather = goal.Objective(P="con", mining="all", group=group)
    with torch.no_grad():  # as in validation
        gather(x, y)
    _, _, stats = goal.gradients(x, y, P="con", mining="all", group=group, exchange="ring")
    wrong = []
    alone = goal.Objective(P="con", mining="all", group="world")
    alone._seen = gather._seen
    if copy.deepcopy(alone)._seen is not None:  # it would hold the group
        wrong.append("a copy has the last call")
    try:
        _ = ring.stats
        wrong.append("a ring's stats of all negatives")
    except RuntimeError as error:
        if "exchange='gather'" not in str(error):
            raise
    if rank == 0 and not torch.equal(gather.stats.index, stats.index):  # nothing is sent for it: rank 0 asks alone
        wrong.append(f"{gather.stats.index} is not {stats.index}")
    return wrong


def compiled(group: Any) -> list[str]:
    """A graph ends at the objective and goes on after it."""
    x, y = unit(6, 4, 0).requires_grad_(), unit(6, 4, 1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return goal.apply(2 * x, y, group=group) + 1

    expected = loss(x, y)
    (true,) = torch.autograd.grad(expected, x)
    found = torch.compile(loss, backend="aot_eager")(x, y)
    (gx,) = torch.autograd.grad(found, x)
    return [] if torch.equal(found, expected) and torch.equal(gx, true) else [f"{found} is not {expected}"]


# ── losses of all rows ──────────────────────────────────────────────────────────────────────────────────────────────

WHOLE: dict[str, Callable[..., nn.Module]] = {
    "infonce": lambda **of: goal.recipe("infonce", tau=7.0, **of),
    "siglip": lambda **of: goal.recipe("siglip", **of).double(),
    "interpolated": lambda **of: Augmented(goal.Objective("nca", "lin-ms", **of), "interpolate"),
    "mixed": lambda **of: Augmented(goal.Objective(similarity="cosine", mining="all", **of), "mixup"),
    "banked": lambda **of: goal.Banked(goal.Objective(**of), goal.Bank(20, 4, torch.float64, group=of.get("group"))),
}


def whole_losses(group: Any) -> list[str]:
    """Losses that need all rows have one value on all ranks, and each rank's rows have theirs of its gradient."""
    wrong, (rank, size) = [], place(group)
    counts = [5 + one for one in range(size)]
    n, here = sum(counts), own(counts, rank)
    ids = torch.arange(n) % (n - 2)  # the last rank's last rows have ids of the first one's
    for name, make in WHOLE.items():
        alone, spread = make(), make(group=group, averaged=True)
        extra = {"weight": torch.linspace(0.5, 2, n)} if isinstance(alone, TwoWay) else {}
        for turn in range(2):  # in the second one the bank is full
            x, y = unit(n, 4, turn).requires_grad_(), unit(n, 4, 10 + turn).requires_grad_()
            torch.manual_seed(3)
            expected = alone(x, y, ids, **extra)
            true = torch.autograd.grad(expected, [x, y, *alone.parameters()])
            with mock.patch("goal.candidates.augment.shared_seed", return_value=3):
                found = spread(x[here], y[here], ids[here], **{key: one[here] for key, one in extra.items()})
            x_grad, y_grad, *grads = torch.autograd.grad(found, [x, y, *spread.parameters()])
            pairs = [(found.detach(), expected.detach()), *zip(grads, true[2:], strict=True)]
            pairs += [(x_grad[here] / size, true[0][here]), (y_grad[here] / size, true[1][here])]
            gaps = [gap(*both) for both in pairs]
            if not max(gaps) <= 1e-12:
                wrong.append(f"{name}, turn {turn}: {gaps}")
            if isinstance(alone, goal.Banked):
                spread.bank.push(x[here], y[here], ids[here])
                alone.bank.push(x, y, ids)
                if bool((alone.stats.index >= n).any()) != (turn == 1):
                    wrong.append(f"{name}: the bank is not met")
            if isinstance(alone, TwoWay) and not torch.equal(spread.stats.index, alone.stats.index):
                wrong.append(f"{name}: {spread.stats.index} is not {alone.stats.index}")
    torch.manual_seed(rank)
    drawn = shared_seed(Ranks(group, False, "gather"), torch.device("cpu"))
    torch.manual_seed(0)
    if drawn != int(torch.randint(2**62, (1, 1))):
        wrong.append(f"{drawn} is not the random number of rank 0")
    x = unit(3, 4, rank)
    last = rank == size - 1
    losses = {"banked": WHOLE["banked"](group=group), "augmented": WHOLE["interpolated"](group=group)}
    said = raised(lambda: goal.InfoNCE(tau=3.0 if last else 2.0, group=group)(x, x))
    if not ("T is T.nca(tau=2.0) on rank" in said and "T.nca(tau=3.0) on rank" in said and "scale is 1.0" in said):
        wrong.append(said)
    rows = x.double() if last else x.float()
    said = raised(lambda: losses["banked"](rows, rows, torch.arange(3)))
    if "x.dtype is torch.float32 on rank 0" not in said:
        wrong.append(f"banked: {said}")
    rows = torch.full_like(x, torch.nan) if last else x
    said = raised(lambda: losses["augmented"](rows, rows, torch.arange(3)))
    if f"rank {size - 1}: ValueError: x has a non-finite value" not in said:
        wrong.append(f"augmented: {said}")
    losses["banked"].bank.x.pushed += int(last)
    said = raised(lambda: losses["banked"](x, x, torch.arange(3)))
    if "0 of x, 0 of y pushed on rank 0" not in said or "1 of x, 0 of y pushed" not in said:
        wrong.append(said)
    for name, parameter in (("log_tau", "log_tau=2.5"), ("bias", "bias=-9.0")):
        siglip = goal.SigLIP(group=group)
        with torch.no_grad():
            getattr(siglip, name).fill_(float(parameter.partition("=")[2]) if last else getattr(siglip, name).item())
        said = raised(lambda siglip=siglip: siglip(x, x))
        if not ("what is SigLIP(" in said and parameter in said and f"on rank {size - 1}" in said):
            wrong.append(f"{name}: {said}")
    for name in ("infonce", "siglip"):
        rows = torch.full_like(x, torch.nan) if last else x
        said = raised(lambda name=name, rows=rows: goal.recipe(name, group=group)(x, rows))
        if f"rank {size - 1}: ValueError: y has a non-finite value" not in said:
            wrong.append(f"{name}: {said}")
        half = goal.recipe(name, group=group)(x.half(), x.half())
        gap_of_halves = abs(half.item() - goal.recipe(name, group=group)(x.half().float(), x.half().float()).item())
        if half.dtype != torch.float32 or gap_of_halves > 0:
            wrong.append(f"{name}: {half} of 16-bit rows")
    bank, rows = goal.Bank(20, 4, group=group), x.clone()
    rows[1] = torch.nan if last else rows[1]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            bank.push(rows, x, torch.arange(3) + 3 * rank)
    counts_of = bank.x.pushed, bank.y.pushed
    if counts_of != (2 * (3 * size - 1), 6 * size) or len(warned) != 1 or not bank.x.rows.isfinite().all():
        wrong.append(f"the bank of rank {rank} has {counts_of} rows, {[str(one.message) for one in warned]}")
    goal.Banked(goal.Objective(group=group), bank)(x, x, torch.arange(3) + 3 * rank)  # ranks agree on it
    said = raised(lambda: goal.InfoNCE(group=group)(x, x[:2] if last else x))
    if f"rank {size - 1}: ValueError: x and y must have the same number of rows" not in said:
        wrong.append(said)
    return wrong


def cached(group: Any) -> list[str]:
    """A cached step over ranks, each with chunks of its own number, has the gradient of the whole batch."""
    wrong, (rank, size) = [], place(group)
    counts = {2: [9, 4], 3: [1, 9, 3], 4: [3, 5, 1, 4]}[size]
    here = own(counts, rank)
    a, b = (unit(sum(counts), width, width) for width in (7, 6))
    for exchange, mining, reduction in (("gather", "selective", "mean"), ("ring", "hardest", "sum")):
        alone, spread = Encoders(), Encoders()
        goal.Objective(mining=mining, reduction=reduction, similarity="cosine")(alone.x(a), alone.y(b)).backward()
        towers = (
            nn.parallel.DistributedDataParallel(one, process_group=Wire(group).group) for one in spread.children()
        )
        rest: dict[str, Any] = {"group": group, "averaged": True, "exchange": exchange, "similarity": "cosine"}
        objective = goal.Objective(mining=mining, reduction=reduction, **rest)
        loss, stats = goal.cached_step(*towers, (a[here], b[here]), objective, chunk=2)
        both = zip(spread.parameters(), alone.parameters(), strict=True)
        gaps = [gap(*(torch.as_tensor(one.grad) for one in pair)) for pair in both]
        if not max(gaps) <= 1e-12 or stats.s_pos.shape != (counts[rank],) or not loss.isfinite():
            wrong.append(f"{exchange} {mining}: {gaps}")
    objective = goal.Objective("con", "con", mining="all", group=group, exchange="ring")
    if goal.cached_step(alone.x, alone.y, (a[here], b[here]), objective, chunk=2).stats is not None:
        wrong.append("a ring has statistics that it did not mine")
    return wrong


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Encoders(nn.Module):
    """Two small towers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5)).double()
        self.y = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5)).double()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.x(a), dim=1), normalize(self.y(b), dim=1)


def batches(n: int = 24) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The global batches of 20 steps: the inputs of both towers, and ids."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        a = torch.randn(n, 7, generator=draw, dtype=torch.float64)
        b = a[:, :6] + 0.5 * torch.randn(n, 6, generator=draw, dtype=torch.float64)
        yield a, b, torch.randint(0, 16, (n,), generator=draw)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def steps(model: nn.Module, objective: nn.Module, here: slice, after: Callable[[], None] = lambda: None) -> nn.Module:
    """20 steps on some rows of each step's global batch."""
    optimiser = sgd(model)
    for a, b, ids in batches():
        optimiser.zero_grad()
        objective(*model(a[here], b[here]), ids[here]).backward()
        after()
        optimiser.step()
    return model


def apart(model: nn.Module, expected: nn.Module) -> float:
    """The largest difference of two models' parameters."""
    whole = [getattr(one, "full_tensor", lambda one=one: one)().detach() for one in model.parameters()]
    return max(gap(*both) for both in zip(whole, (one.detach() for one in expected.parameters()), strict=True))


def torchrun(rank: int, size: int, port: int = 0) -> dict[str, str]:
    """What torchrun tells its processes; their store, where they need one, is its own, at `port`."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    told |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(one) for name, one in told.items()}


def wrapped(model: Encoders, wrapper: str, group: Any) -> nn.Module:
    """The model under what spreads its gradients over the ranks."""
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model, process_group=group)
    if wrapper == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
        for tower in (model.x, model.y):
            fully_shard(tower, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    size = dist.get_world_size(group)
    with mock.patch.dict(os.environ, torchrun(dist.get_rank(group), size)):
        if wrapper == "accelerate":
            from accelerate import Accelerator

            prepared = Accelerator(cpu=True).prepare(model)
            assert isinstance(prepared, nn.parallel.DistributedDataParallel)
            return prepared
        if wrapper == "lightning":
            from lightning.fabric import Fabric

            fabric = Fabric(accelerator="cpu", devices=size, strategy="ddp")
            fabric.launch()
            return fabric.setup(model)
    return model


COUNTS = {1: [24], 2: [5, 19], 3: [1, 13, 10], 4: [6, 1, 9, 8]}  # rows of each rank in a batch


def training(
    group: Any, wrapper: str, trainings: Sequence[tuple[str, str, str]], trained: Sequence[nn.Module]
) -> list[str]:
    """A model trained under a wrapper has the parameters of the large batch in one process."""
    wrong, (rank, size) = [], place(group)
    here, members = own(COUNTS[size], rank), Wire(group).group
    for (reduction, exchange, mining), expected in zip(trainings, trained, strict=True):
        model = wrapped(Encoders(), wrapper, members)

        def added(model: nn.Module = model) -> None:
            if wrapper == "plain":  # nobody averages: the ranks' parts are added
                for one in model.parameters():
                    dist.all_reduce(one.grad, group=members)

        averaged = wrapper != "plain"
        objective = goal.Objective(
            mining=mining, reduction=reduction, group=group, averaged=averaged, exchange=exchange
        )
        error = apart(steps(model, objective, here, added), expected)
        if not error <= 1e-10:
            wrong.append(f"{wrapper} {reduction} {exchange} {mining}: {error:.1e} apart")
    return wrong


# ── the processes ───────────────────────────────────────────────────────────────────────────────────────────────────


def joined(rank: int, size: int, folder: str, seconds: int) -> AbstractContextManager[None]:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=seconds)
    return goal.distributed.joined(init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)


def work(rank: int, folder: str) -> None:
    """One process."""
    with joined(rank, WORLD, folder, seconds=300):  # of a machine that is busy with other things
        jobs_of(rank, folder)


def jobs_of(rank: int, folder: str) -> None:
    """All jobs of the groups that this rank is in, in the same order as everybody else."""
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    groups = {size: dist.new_group(members) if size < WORLD else "world" for size, members in MEMBERS.items()}
    found: dict[str, list[str]] = {}
    jobs: list[Job] = torch.load(Path(folder) / "jobs.pt", weights_only=False)
    for job in jobs:
        if rank not in MEMBERS[job.size]:
            continue
        try:
            found[job.name] = globals()[job.what](groups[job.size], **job.arguments)
        except Exception:
            found[job.name] = [traceback.format_exc()]
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    dist.barrier()


def trainer(rank: int, size: int, port: int, folder: str, trainings: Sequence[tuple[str, str, str]]) -> None:
    """One process of torchrun, in which Lightning's Trainer makes the group, wraps the model and takes the steps."""
    importlib.import_module("torch._dynamo")  # see goal.distributed.joined
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, objective: nn.Module) -> None:
            super().__init__()
            self.encoders, self.objective = Encoders(), objective

        def training_step(self, batch: Sequence[Tensor]) -> Tensor:
            a, b, ids = batch
            return self.objective(*self.encoders(a, b), ids)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

    torch.set_num_threads(1)
    os.environ.update(torchrun(rank, size, port))
    here = own(COUNTS[size], rank)
    rows = [[one[here] for one in batch] for batch in batches()]
    loader = torch.utils.data.DataLoader(rows, batch_size=None)
    how: dict[str, Any] = {"accelerator": "cpu", "devices": size, "strategy": "ddp", "max_epochs": 1}
    how |= {"use_distributed_sampler": False}  # the rows are cut already, and Lightning's own sampler shuffles them
    how |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    wrong = []
    for reduction, exchange, mining in trainings:
        terms = {"mining": mining, "reduction": reduction}
        model = Module(goal.Objective(**terms, group="world", averaged=True, exchange=exchange))
        Trainer(deterministic=True, **how).fit(model, loader)
        assert dist.get_world_size() == size
        error = apart(model.encoders, steps(Encoders(), goal.Objective(**terms), slice(0, 24)))
        if not error <= 1e-10:
            wrong.append(f"{reduction} {exchange} {mining}: {error:.1e} apart")
    torch.save(wrong, Path(folder) / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def fail(rank: int, folder: str, how: str, at: int, exchange: str) -> None:
    """One of two ranks, in a group that waits for 3 seconds; what it says of the call that rank 1 spoils is kept."""
    with joined(rank, 2, folder, seconds=60):  # of waiting for the other's start
        group = dist.new_group(timeout=datetime.timedelta(seconds=3))
        Path(folder, f"said-{rank}").write_text(spoilt(group, rank, how, at, exchange))
        os._exit(0)


def spoilt(group: Any, rank: int, how: str, at: int, exchange: str) -> str:
    """Two good calls, then rank 1 dies or hangs before exchange `at` of the third: how long that took, what came."""
    x, y = unit(6, 4, rank).requires_grad_(), unit(6, 4, 10 + rank)
    for _ in range(2):
        goal.apply(x, y, group=group, exchange=exchange).backward()
    calls = [0]

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == at and how == "dies":
                os._exit(1)
            if calls[0] == at:
                time.sleep(60)
            return call(*args)

        return counted

    if rank == 1:
        for name in ("gather", "swap", "shift"):
            setattr(Wire, name, failing(getattr(Wire, name)))
    start = time.monotonic()
    try:
        said = f"nothing was raised: {goal.apply(x, y, group=group, exchange=exchange).item()}"
    except RuntimeError as error:
        said = f"RuntimeError: {error}"
    return f"{time.monotonic() - start:.2f} {said}"
