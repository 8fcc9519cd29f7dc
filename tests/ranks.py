"""What each of the processes of test_distributed.py does: it runs jobs together with the others and says what is wrong.

A job is plain data: which group, the global batch, how it is cut, the arguments, and what one process makes of it.
"""

import datetime
import functools
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize

import goal
import goal.distributed
from goal import reference
from goal.distributed import Coming, Wire
from goal.similarity import Dot

WORLD = 4
MEMBERS = {1: [1], 2: [1, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3]}  # ranks of the world in the group of each size
MININGS: dict[str, Callable[..., Any]] = {
    "hardest": goal.mining.hardest,
    "semi-hard": goal.mining.semi_hard,
    "all": goal.mining.all_negatives,
    "selective": goal.mining.selective,
}


class Job(NamedTuple):
    """One thing that the ranks of a group do together."""

    name: str
    size: int  # of the group
    what: str  # a function of this file
    arguments: dict[str, Any]


class Expected(NamedTuple):
    """What one process makes of the global batch."""

    value: Tensor  # 0-d
    gx: Tensor  # (N, D)
    gy: Tensor  # (N, D)
    index: Tensor | None  # (2, N)
    stats: goal.Stats | None


def gap(actual: Tensor, expected: Tensor) -> float:
    """The largest error, in units of the largest entry."""
    if actual.shape != expected.shape:
        return torch.inf
    scale = expected.abs().max().item()
    error = (actual.double() - expected.double()).abs().max().item()
    return error / max(scale, 1e-4) if error == error else torch.inf


def chosen(T: Any, P: Any, mining: Any, **rest: Any) -> dict[str, Any]:
    """Arguments of `goal.apply` from names and parameters, which travel between processes."""
    (t, t_params), (p, p_params), (m, m_params) = T, P, mining
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
        if not (exchange == "ring" and arguments["mining"][0] == "all" and not arguments["P"][0].endswith("-ms")):
            stats = module.stats
    by = size if averaged else 1
    gaps = {"gx": gap(gx, by * expected.gx[here]), "gy": gap(gy, by * expected.gy[here])}
    if value is not None:
        gaps["value"] = gap(value.detach(), expected.value)
    wrong = [f"{name} is {error:.1e} off" for name, error in gaps.items() if not error <= tolerance]
    if stats is not None and expected.index is not None and not torch.equal(stats.index, expected.index[:, here]):
        wrong.append(f"index {stats.index.tolist()} is not {expected.index[:, here].tolist()}")
    if stats is not None and expected.stats is not None:
        for name in ("s_pos", "s_neg", "T", "P_pos", "P_neg"):
            actual, true = getattr(stats, name), getattr(expected.stats, name)[..., here]
            if not torch.allclose(actual, true, rtol=tolerance, atol=tolerance):
                wrong.append(f"stats.{name}")
    return wrong


# ── the processes ───────────────────────────────────────────────────────────────────────────────────────────────────


def work(rank: int, folder: str) -> None:
    """One process: all jobs of the groups that it is in, in the same order as everybody else."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    groups = {size: dist.new_group(members) if size < WORLD else "world" for size, members in MEMBERS.items()}
    found: dict[str, list[str]] = {}
    jobs: list[Job] = torch.load(Path(folder) / "jobs.pt", weights_only=False)
    for job in jobs:
        if rank not in MEMBERS[job.size]:
            continue
        group = groups[job.size]
        try:
            found[job.name] = globals()[job.what](group, **job.arguments)
        except Exception:
            found[job.name] = [traceback.format_exc()]
    torch.save(found, Path(folder) / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
