"""The objective of many ranks against that of one process: Gloo on the CPU, one set of four processes for the file."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from ranks import MEMBERS, WORLD, Expected, Job
from table import Case, cases, make_inputs
from test_contract import EPS, close_calls, dense, embeddings, gap, negatives_of, question, similarities, tensors
from torch import Tensor

import goal
from oracle import oracle

pytestmark = pytest.mark.usefixtures("one_thread")

SQUARE = ((12, 12, 8), (16, 16, 12), (9, 9, 5))
EXCHANGES = ("gather", "ring")


def counts_of(n: int, size: int, number: int) -> list[int]:
    """Rows of each rank: even where that is possible in every third case; else uneven, one rank with a single row."""
    if size == 1 or (n % size == 0 and number % 3 == 0):
        return [n // size] * size
    choose = random.Random(f"{n} {size} {number}")
    cuts = sorted(choose.sample(range(1, n - 1), size - 2)) if size > 2 else []
    rest = [b - a for a, b in itertools.pairwise((0, *cuts, n - 1))]
    rest.insert(number % size, 1)
    return rest


def terms_of(case: Case) -> dict[str, Any]:
    return {
        "T": (case.T, dict(case.T_params)),
        "P": (case.P, dict(case.P_params)),
        "mining": (case.mining, dict(case.mining_params)),
        "reduction": case.reduction,
        "similarity": case.similarity,
    }


def alone(x: Tensor, y: Tensor, arguments: dict[str, Any], **data: Any) -> Expected:
    """What one process makes of the global batch."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    objective = goal.Objective(**ranks.chosen(**arguments))
    loss = objective(x, y, **data)
    loss.backward()
    stats = objective.stats
    return Expected(loss.detach(), x.grad, y.grad, stats.index, stats)


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def square_cases() -> Iterator[Case]:
    """Every T × P × mining × similarity × reduction × ids of the table with as many rows of x as of y."""
    for number, case in enumerate(case for case in cases() if case.ids_case != "extra"):
        yield case._replace(shape=SQUARE[number % len(SQUARE)])


def table_jobs() -> Iterator[Job]:
    """Every combination with two of the four sizes, one by gather and one by ring."""
    for number, case in enumerate(square_cases()):
        x, y, ids, y_ids, weight = tensors(*make_inputs(case, 0))
        data = {"ids": ids, "y_ids": y_ids, "weight": weight}
        if weight is not None and number % 2:
            data["weight"] = torch.stack((weight, weight.flip(0)))
        expected = alone(x, y, terms_of(case), **data)
        if number % 16 == 0 and (weight is None or number % 2 == 0):
            numpy = {name: None if one is None else one.numpy() for name, one in data.items()}
            true = oracle(x.numpy(), y.numpy(), similarity=case.similarity, **numpy, **question(case))
            index = None if case.mining == "semi-hard" else torch.from_numpy(true.index)
            as_tensors = torch.tensor(true.value), torch.from_numpy(true.gx), torch.from_numpy(true.gy)
            expected = Expected(*as_tensors, index, None)
        for size, exchange in zip(SIZES_OF[number % len(SIZES_OF)], EXCHANGES, strict=True):
            what = {
                "x": x,
                "y": y,
                **data,
                "counts": counts_of(len(x), size, number),
                "arguments": terms_of(case),
                "expected": expected,
                "tolerance": 1e-12,
                "exchange": exchange,
                "averaged": number % 5 == 0,
                "by_gradients": number % 7 == 0,
            }
            yield Job(f"{size} {exchange} {case.id}", size, "objective", what)


SIZES_OF = ((2, 3), (3, 4), (4, 2), (3, 2), (1, 3), (2, 4), (4, 3), (2, 1))  # by gather, by ring


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────

JOBS = {"table": table_jobs}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong, by the name of the job: all jobs are run once, by the same four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = sorted((job for make in JOBS.values() for job in make()), key=lambda job: (1, 3, 2, 4).index(job.size))
    torch.save(jobs, folder / "jobs.pt")
    torch.multiprocessing.spawn(ranks.work, (str(folder),), nprocs=WORLD)
    each = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {
        job.name: [f"rank {rank}: {what}" for rank in MEMBERS[job.size] for what in each[rank][job.name]]
        for job in jobs
    }


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", MEMBERS)
def test_the_table_in_float64(found: dict[str, list[str]], size: int, exchange: str) -> None:
    mine = {name: wrong for name, wrong in found.items() if name.startswith(f"{size} {exchange} ")}
    assert len(mine) > 100
    assert {name: wrong for name, wrong in mine.items() if wrong} == {}
