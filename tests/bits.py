"""A recording of bits: what a covering set of calls returns, to the last bit, before and after a refactoring.

    python -m tests.bits record FILE      digests of every call's gradients, value and stats
    python -m tests.bits check FILE       what differs now, and by how much

Both take names of parts (tabled, large, objectives, ranks, kernels) after the file; the kernels take the longest.

The file belongs to one machine and one build of PyTorch, so none is kept here: record it before you begin. The calls
go through public names only. `check` recomputes what differs and says how far it is off where the recording kept the
numbers (small tensors).
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))

from table import Case, cases, make_inputs

import goal
import goal.candidates

Call = tuple[str, dict[str, Any]]  # a name, and what came out: tensors by name
MININGS = goal.mining.RULES
P_NAMES = ("con", "lin", "sig", "lin-ms", "sig-ms")


def _terms(case: Case) -> dict[str, Any]:
    return {
        "T": goal.T[case.T](**case.T_params),
        "P": goal.P[case.P](**case.P_params),
        "mining": MININGS[case.mining](**case.mining_params),
        "reduction": case.reduction,
    }


def _seen(gx: Tensor, gy: Tensor, stats: goal.Stats, value: Tensor | None = None) -> dict[str, Tensor]:
    rest = {} if value is None else {"value": value.detach()}
    return {"gx": gx, "gy": gy, **rest, **stats._asdict()}


def _random(seed: int, n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)
    y[: min(n, m)] += x[: min(n, m)]
    return normalize(x, dim=1).to(dtype), normalize(y, dim=1).to(dtype)


def _backward(objective: Any, x: Tensor, y: Tensor, *rest: Any, times: float = 1.0) -> dict[str, Tensor]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = objective(x, y, *rest)
    (loss * times).backward()
    stats = getattr(objective, "stats", None)
    shown = {} if stats is None else stats._asdict()
    return {"value": loss.detach(), "gx": x.grad, "gy": y.grad, **shown}


# ── the calls ───────────────────────────────────────────────────────────────────────────────────────────────────────


def tabled() -> Iterator[Call]:
    """The table of the contract tests, in float64, and its dot products in the other dtypes."""
    for number, case in enumerate(cases()):
        x, y, ids, y_ids, weight = (None if one is None else torch.from_numpy(one) for one in make_inputs(case, 0))
        rest = {"ids": ids, "y_ids": y_ids, "weight": weight, "similarity": case.similarity, **_terms(case)}
        dtypes = [torch.float64] + [torch.float32] * (number % 2) + [torch.bfloat16] * (number % 7 == 0)
        for dtype in dtypes:
            a, b = x.to(dtype), y.to(dtype)
            gx, gy, stats = goal.gradients(a, b, **rest)
            value = goal.apply(a, b, **rest)
            yield f"{case.id} {dtype}", _seen(gx, gy, stats, value)
        if case.similarity == "dot" and number % 3 == 0:
            s = (x @ y.T).requires_grad_()
            given = {name: one for name, one in rest.items() if name != "similarity"}
            value = goal.apply_similarity(s, **given)
            value.backward()
            yield f"{case.id} given", {"value": value.detach(), "g": s.grad}


def large() -> Iterator[Call]:
    """Several tiles, large enough for every shortcut of the eager path; N ≠ M and ids among them."""
    for n, m in ((300, 300), (700, 520), (2300, 2300), (2500, 3000)):
        ids, y_ids = torch.arange(n) // 3, torch.arange(m) // 3
        for mining in MININGS:
            for P in P_NAMES if n < 1000 else ("lin-ms", "sig-ms"):
                x, y = _random(n, n, m, 24)
                for some in ({}, {"ids": ids, "y_ids": y_ids}):
                    gx, gy, stats = goal.gradients(x, y, T="cir", P=P, mining=mining, **some)
                    value = goal.apply(x, y, T="cir", P=P, mining=mining, **some)
                    yield f"{n}x{m} {mining} {P} {'ids' if some else ''}", _seen(gx, gy, stats, value)


def objectives() -> Iterator[Call]:
    """Modules: the incoming gradient, banks, made rows, yardsticks, recipes, a cached step."""
    x, y = _random(1, 40, 40, 16)
    ids, weight = torch.arange(40) // 2, torch.rand(2, 40, generator=torch.Generator().manual_seed(2))
    for name in goal.recipes():
        objective = goal.recipe(name)
        yield f"recipe {name}", _backward(objective, x, y, times=0.37)
        yield f"recipe {name} ids", _backward(objective, x, y, ids, times=2.0)
    for mining in MININGS:
        for P in P_NAMES:
            objective = goal.Objective(T="cir", P=P, mining=mining, similarity="cosine")
            yield f"objective {mining} {P} (2, K)", _backward(objective, 3 * x, y, ids, None, weight, times=1.7)
            bank = goal.Bank(size=50, dim=16)
            for step in range(3):
                bank.push(*_random(10 + step, 20, 20, 16), torch.arange(20) * 2 + step)
            yield f"bank {mining} {P}", _backward(goal.Banked(objective, bank), x, y, ids)
            for made in ("interpolate", "mixup"):
                torch.manual_seed(5)
                augmented = goal.candidates.Augmented(objective, made, 2)
                yield f"{made} {mining} {P}", _backward(augmented, x, y, ids)
    model = torch.nn.Linear(16, 8)
    with torch.no_grad():
        model.weight.copy_(_random(3, 8, 8, 16)[0])
        model.bias.zero_()
    objective = goal.Objective(T="nca", P="lin-ms", mining="selective")
    step = goal.cached_step(model, model, (x, y), objective, chunk=7)
    yield "cached step", {"value": step.loss, "weight": model.weight.grad, "bias": model.bias.grad}


def kernels() -> Iterator[Call]:
    """Interpreted kernels."""
    for n, m in ((33, 33), (70, 90)):
        x, y = _random(n, n, m, 20)
        ids, y_ids = torch.arange(n) // 3, torch.arange(m) // 3
        for mining in MININGS:
            for P in P_NAMES:
                for some in ({}, {"ids": ids, "y_ids": y_ids}):
                    precision = "exact" if some and n > 64 else "fast"
                    rest = {"T": "cir", "P": P, "mining": mining, "impl": "triton", "precision": precision}
                    gx, gy, stats = goal.gradients(x, y, **rest, **some)
                    yield f"{n}x{m} {mining} {P} {precision} {'ids' if some else ''}", _seen(gx, gy, stats)


COUNTS = [7, 12, 5]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    import goal.distributed

    x, y = _random(4, sum(COUNTS), sum(COUNTS), 12, torch.float64)
    ids = torch.arange(sum(COUNTS)) // 2
    own = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    calls: dict[str, dict[str, Tensor]] = {}
    with goal.distributed.joined(init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS)):
        for dtype in (torch.float64, torch.float32):
            a, b = x[own].to(dtype), y[own].to(dtype)
            for exchange in ("gather", "ring"):
                for mining in MININGS:
                    for P in P_NAMES:
                        rest = {"T": "cir", "P": P, "mining": mining, "group": "world", "exchange": exchange}
                        for some in ({}, {"ids": ids[own]}):
                            gx, gy, stats = goal.gradients(a, b, **rest, **some)
                            value = goal.apply(a, b, **rest, **some)
                            name = f"rank {rank} {dtype} {exchange} {mining} {P} {'ids' if some else ''}"
                            calls[name] = _seen(gx, gy, stats, value)
        calls[f"rank {rank} infonce"] = _backward(goal.InfoNCE(group="world"), x[own], y[own])
        objective = goal.Objective(P="lin-ms", group="world", averaged=True)
        calls[f"rank {rank} averaged"] = _backward(objective, x[own], y[own], times=0.3)
        bank = goal.Bank(size=30, dim=12, group="world")
        bank.push(*(2 * side[own] for side in _random(9, sum(COUNTS), sum(COUNTS), 12)), ids=ids[own])
        calls[f"rank {rank} bank"] = _backward(goal.Banked(objective, bank), x[own], y[own], ids[own])
    torch.save(calls, f"{folder}/{rank}.pt")


def ranks() -> Iterator[Call]:
    """Three ranks over Gloo."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder,), nprocs=len(COUNTS))
        for rank in range(len(COUNTS)):
            yield from torch.load(f"{folder}/{rank}.pt", weights_only=False).items()


# ── recording and checking ──────────────────────────────────────────────────────────────────────────────────────────

SMALL = 400  # numbers of a tensor that the recording keeps


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    content = tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content, digest_size=12).hexdigest()


def _recorded(parts: tuple[str, ...]) -> dict[str, dict[str, tuple[str, Tensor | None]]]:
    torch.set_num_threads(1)
    found = {}
    for part in (tabled, large, objectives, ranks, kernels):
        if parts and part.__name__ not in parts:
            continue
        for name, tensors in part():
            found[f"{part.__name__}: {name}"] = {
                key: (_digest(one), one.detach().clone() if one.numel() <= SMALL else None)
                for key, one in tensors.items()
            }
        print(f"{part.__name__}: {len(found)} calls", file=sys.stderr, flush=True)
    return found


def main(command: str, file: str, *parts: str) -> int:
    if command == "record":
        torch.save(_recorded(parts), file)
        return 0
    before, now = torch.load(file, weights_only=False), _recorded(parts)
    before = {name: one for name, one in before.items() if not parts or name.split(":")[0] in parts}
    worst: dict[tuple[str, str], tuple[int, float | None, str]] = {}
    for name in sorted(before.keys() | now.keys()):
        if name not in before or name not in now:
            print(f"only {'before' if name in before else 'now'}: {name}")
            worst["calls", "missing"] = (1, 0.0, name)
            continue
        for key in before[name]:
            (old, a), (new, b) = before[name][key], now[name][key]
            if old == new:
                continue
            gap = None  # of tensors that were not kept
            if a is not None and b is not None and a.shape == b.shape:
                gap = (a.double() - b.double()).abs().max().item()
            part = name.split(":")[0], key
            count, largest, where = worst.get(part, (0, None, name))
            if gap is not None and (largest is None or not gap <= largest):
                largest, where = gap, name
            worst[part] = count + 1, largest, where
    for (part, key), (count, largest, where) in worst.items():
        much = "too large to have been kept" if largest is None else f"by up to {largest:.3g}"
        print(f"{part} {key}: {count} differ, {much} ({where})")
    print(f"{len(now)} calls, {'equal to the bit' if not worst else 'NOT equal'}")
    return bool(worst)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
