"""The objective of many ranks against that of one process: Gloo on the CPU, one set of four processes for the file."""

import importlib.util
import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import ranks
import torch
from oracle import oracle
from ranks import MEMBERS, WORLD, Expected, Job
from table import Case, cases, covering, make_inputs
from test_contract import (
    EPS,
    GROUPS,
    close_calls,
    dense,
    embeddings,
    gap,
    negatives_of,
    on_a_grid,
    paired,
    question,
    similarities,
    tensors,
)
from torch import Tensor

import goal
from benchmarks import network

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
        "scale": case.scale,
        "directions": case.directions,
        "positives": (case.positives, dict(case.positives_params)),
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


def square(some: Iterable[Case]) -> Iterator[Case]:
    """Those that have as many rows of x as of y, in sizes that are cut into four."""
    dense = "all", "selective"  # which take pairs alone over ranks
    for number, case in enumerate(case for case in some if case.ids_case != "extra"):
        if case.positives != "pair" and case.mining in dense:
            case = paired(case)._replace(ids_case="fives" if case.ids_case == "unrelated" else case.ids_case)
        yield case._replace(shape=SQUARE[number % len(SQUARE)])


def every_combination() -> Iterator[Case]:
    """Every T × P × mining × reduction × ids of the full product, each with one similarity."""
    combinations: dict[tuple[str, ...], list[Case]] = {}
    for case in cases():
        terms = case.T + "+margin" * ("margin" in case.T_params), case.P, case.mining
        combinations.setdefault((*terms, case.reduction, case.ids_case), []).append(case)
    for number, alike in enumerate(combinations.values()):  # number // 8 turns with T × P × mining
        yield alike[(number + number // 8) % 3]


def full_jobs() -> Iterator[Job]:
    yield from (job._replace(name=f"full {job.name}") for job in table_jobs(every_combination()))


def table_jobs(some: Iterable[Case] | None = None) -> Iterator[Job]:
    """Each case by gather or by ring, in one of the four sizes."""
    for number, case in enumerate(square(covering() if some is None else some)):
        x, y, ids, y_ids, weight = tensors(*make_inputs(case, 0))
        data = {"ids": ids, "y_ids": y_ids, "weight": weight}
        if weight is not None and number % 3:
            data["weight"] = torch.stack((weight, weight.flip(0)))
        expected = alone(x, y, terms_of(case), **data)
        tolerance = 1e-10 if case.mining == "soft" else 1e-12  # pull and push of a lone positive cancel
        if number % 9 == 0:  # whose weights are one for a pair
            numpy = {name: None if one is None else one.numpy() for name, one in data.items()}
            true = oracle(x.numpy(), y.numpy(), similarity=case.similarity, **numpy, **question(case))
            index = None if case.mining == "semi-hard" else torch.from_numpy(true.index)
            as_tensors = (
                torch.tensor(true.value, dtype=torch.float64),
                torch.from_numpy(true.gx),
                torch.from_numpy(true.gy),
            )
            expected, tolerance = Expected(*as_tensors, index, None), 1e-10  # as in test_contract.py
        size, exchange = way_of(number)
        what = {
            "x": x,
            "y": y,
            **data,
            "counts": counts_of(len(x), size, number),
            "arguments": terms_of(case),
            "expected": expected,
            "tolerance": tolerance,
            "exchange": exchange,
            "averaged": number % 5 == 0,
            "by_gradients": number % 11 == 0,
        }
        yield Job(f"{size} {exchange} {case.id}", size, "objective", what)


def way_of(number: int) -> tuple[int, str]:
    """The size of the group and the exchange of a case: of neighbours in the table, one goes by gather, one by ring."""
    return (2, 4, 3, 1, 2, 3, 4)[number // 2 % 7], EXCHANGES[number % 2]


# ── other batches ───────────────────────────────────────────────────────────────────────────────────────────────────


def float32_jobs() -> Iterator[Job]:
    """Within twice the error of a dense version, anchors whose decision is open left out, as in test_contract.py."""
    for number, of in enumerate(GROUPS.values()):
        if number % 5:
            continue
        case, size, exchange = paired(of[number % len(of)]), (2, 3, 4)[number // 5 % 3], EXCHANGES[number // 5 % 2]
        x, y = embeddings(np.random.default_rng(number), 63, 63, 24, torch.float32)
        S = similarities(case.similarity, x.double(), y.double())
        weight = (~close_calls(case, S, negatives_of(S, None, None), within=16 * EPS)).float()
        assert weight.mean() >= 0.9
        true = dense(case, x.double(), y.double(), weight=weight)
        yardstick = max(gap(*both) for both in zip(dense(case, x, y, weight=weight), true, strict=True))
        what = {
            "x": x,
            "y": y,
            "ids": None,
            "y_ids": None,
            "weight": weight,
            "counts": counts_of(63, size, number),
            "arguments": terms_of(case),
            "expected": Expected(None, *true, None, None),
            "tolerance": 2 * yardstick + 2 * EPS,
            "exchange": exchange,
        }
        yield Job(f"float32 {size} {exchange} {case.id}", size, "objective", what)


def large_jobs() -> Iterator[Job]:
    """Blocks of several tiles, full of ties and of duplicates on other ranks; half precision."""
    rng = np.random.default_rng(0)
    x, y = on_a_grid(rng, 300, 300)
    ids = torch.from_numpy(rng.integers(0, 90, 300))
    for number, (P, mining) in enumerate(itertools.product(("con", "lin-ms", "sig-ms"), ranks.MININGS)):
        arguments = {"T": ("nca", {}), "P": (P, {}), "mining": (mining, {}), "reduction": "mean"}
        expected = alone(x, y, arguments, ids=ids)
        for size, exchange in zip(((3, 4), (4, 2), (2, 3))[number % 3], EXCHANGES, strict=True):
            data = {"x": x, "y": y, "ids": ids, "y_ids": None, "weight": None}
            rest = {"arguments": arguments, "tolerance": 1e-12, "exchange": exchange}
            what = {**data, **rest, "counts": counts_of(300, size, number), "expected": expected}
            yield Job(f"large {size} {exchange} {P} {mining}", size, "in_small_tiles", what)
            if P == "sig-ms":
                data |= {"x": x.bfloat16(), "y": y.half()}  # the grid is exact in both
                what |= data | {"tolerance": 2**-8, "expected": expected._replace(stats=None)}
                yield Job(f"half {size} {exchange} {P} {mining}", size, "objective", what)


def tie_jobs() -> Iterator[Job]:
    """What counts as equal is decided by the longest row of all ranks: here by the last, of length 1e9."""
    c = torch.tensor([0.5, 0.5 - 1e-7, 0.3, 0.2, 0.1, 0.4, 0.45, 0.0], dtype=torch.float64)
    x, y = torch.eye(4, dtype=torch.float64)[[0] * 7 + [3]], torch.zeros(8, 4, dtype=torch.float64)
    x[7] *= 1e9
    y[:, 0], y[7, 3] = c, 1e-9
    arguments = {"T": ("con", {}), "P": ("lin-ms", {}), "mining": ("hardest", {})}
    expected = alone(x, y, arguments)
    for size, exchange in itertools.product((2, 3), EXCHANGES):
        data = {"x": x, "y": y, "ids": None, "y_ids": None, "weight": None, "counts": counts_of(8, size, 1)}
        what = {"arguments": arguments, "expected": expected, "tolerance": 1e-12, "exchange": exchange}
        yield Job(f"tie {size} {exchange}", size, "objective", data | what)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────

TOGETHER = ("overlap", "backward", "tiles_once", "traffic", "disagreement", "nan_passes", "shown", "whole_losses")
TOGETHER += ("cached",)
TRAINED = [("ddp", 2), ("ddp", 3), ("ddp", 4), ("plain", 3), ("fsdp", 4)]
TRAININGS = (("mean", "gather", "hardest"), ("sum", "ring", "hardest"), ("sum", "gather", "selective"))


def other_jobs() -> Iterator[Job]:
    for size in (2, 3, 4):
        yield from (Job(f"{name} {size}", size, name, {}) for name in TOGETHER)
    yield Job("compiled 1", 1, "compiled", {})  # a process alone: Dynamo takes its time
    objectives = [goal.Objective(mining=mining, reduction=reduction) for reduction, _, mining in TRAININGS]
    trained = [ranks.steps(ranks.Encoders(), objective, slice(0, 24)) for objective in objectives]
    assert all(ranks.apart(ranks.Encoders(), model) > 0.1 for model in trained)
    rest = {"trainings": TRAININGS, "trained": trained}
    for wrapper, size in TRAINED:
        yield Job(f"{wrapper} {size}", size, "training", {"wrapper": wrapper, **rest})
    for name in ("accelerate", "lightning"):
        if importlib.util.find_spec(name) is not None:
            yield Job(f"{name} 4", 4, "training", {"wrapper": name, **rest})


JOBS = {  # of the tests that are not about the others
    "test_the_table_in_float64": table_jobs,
    "test_the_full_product_in_float64": full_jobs,
    "test_float32_is_as_exact_as_a_dense_version": float32_jobs,
    "test_blocks_of_several_tiles_full_of_ties": large_jobs,
    "test_half_precision": large_jobs,
    "test_equality_is_that_of_the_whole_batch": tie_jobs,
}


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong, by the name of the job: the jobs of all tests asked for are run once, by four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    asked = [item for item in request.session.items if item.path == request.path and "found" in item.fixturenames]
    jobs = [job for make in dict.fromkeys(JOBS.get(item.originalname, other_jobs) for item in asked) for job in make()]
    jobs.sort(key=lambda job: (1, 3, 2, 4).index(job.size))  # 1 beside 3, which it is not a member of
    torch.save(jobs, folder / "jobs.pt")
    processes.run_ranks(ranks.work, WORLD, str(folder))
    each = [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {
        job.name: [f"rank {rank}: {what}" for rank in MEMBERS[job.size] for what in each[rank][job.name]]
        for job in jobs
    }


def wrong(found: dict[str, list[str]], beginning: str, least: int) -> dict[str, list[str]]:
    mine = {name: of for name, of in found.items() if name.startswith(beginning)}
    assert len(mine) >= least
    return {name: of for name, of in mine.items() if of}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", MEMBERS)
def test_the_table_in_float64(found: dict[str, list[str]], size: int, exchange: str) -> None:
    assert wrong(found, f"{size} {exchange} ", 20) == {}


@pytest.mark.full
def test_the_full_product_in_float64(found: dict[str, list[str]]) -> None:
    assert wrong(found, "full ", 640) == {}


def test_the_table_meets_all_terms() -> None:
    """Although the cases of further rows are left out."""
    some = list(square(covering()))
    margins = ["margin" in case.T_params for case in some]
    assert len({(case.T, margin, case.P, case.mining) for case, margin in zip(some, margins, strict=True)}) == 100
    assert len({(case.P, case.mining, case.similarity, case.ids_case) for case in some}) == 270
    ways = [(*way_of(number), case) for number, case in enumerate(some)]
    assert len({(exchange, case.P, case.mining, case.similarity) for _, exchange, case in ways}) == 150
    assert (
        len({(exchange, case.T, "margin" in case.T_params, case.P, case.mining) for _, exchange, case in ways}) == 200
    )
    for name, values in (("T", 3), ("P", 5), ("mining", 5), ("similarity", 3), ("reduction", 2), ("ids_case", 4)):
        assert len({(size, exchange, getattr(case, name)) for size, exchange, case in ways}) == 8 * values, name


def test_float32_is_as_exact_as_a_dense_version(found: dict[str, list[str]]) -> None:
    assert wrong(found, "float32 ", 48) == {}


def test_blocks_of_several_tiles_full_of_ties(found: dict[str, list[str]]) -> None:
    assert wrong(found, "large ", 24) == {}


def test_equality_is_that_of_the_whole_batch(found: dict[str, list[str]]) -> None:
    assert wrong(found, "tie ", 4) == {}


def test_half_precision(found: dict[str, list[str]]) -> None:
    assert wrong(found, "half ", 8) == {}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", TOGETHER)
def test_the_ways_of_ranks(found: dict[str, list[str]], name: str, size: int) -> None:
    assert wrong(found, f"{name} {size}", 1) == {}


def test_a_graph_ends_at_the_objective_and_goes_on(found: dict[str, list[str]]) -> None:
    assert wrong(found, "compiled 1", 1) == {}


@pytest.mark.parametrize(("wrapper", "size"), TRAINED)
def test_twenty_steps_are_those_of_the_large_batch(found: dict[str, list[str]], wrapper: str, size: int) -> None:
    assert wrong(found, f"{wrapper} {size}", 1) == {}


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_twenty_steps_under_frameworks(found: dict[str, list[str]], name: str) -> None:
    pytest.importorskip(name)
    assert wrong(found, f"{name} ", 1) == {}


def test_twenty_steps_of_lightnings_trainer(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes.run_ranks(ranks.trainer, 2, 2, store.port, str(tmp_path), TRAININGS)
    assert [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)] == [[], []]


# ── a rank that dies or hangs ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("how", "at", "exchange"), [("dies", 1, "ring"), ("dies", 3, "gather"), ("hangs", 4, "ring")])
def test_a_rank_that_fails_is_an_error_on_the_others(how: str, at: int, exchange: str, tmp_path: Path) -> None:
    context = processes.forking()
    both = [context.Process(target=ranks.fail, args=(rank, str(tmp_path), how, at, exchange)) for rank in range(2)]
    for process in both:
        process.start()
    both[0].join(60)
    both[1].kill()
    both[1].join(10)
    took, said = (tmp_path / "said-0").read_text().split(" ", 1)
    assert said.startswith("RuntimeError"), said
    assert float(took) < 10


# ── arguments ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_arguments_are_checked_before_any_rank_is_asked() -> None:
    x = torch.eye(3)
    for bad, error, text in (
        ({"group": "all"}, TypeError, "group must be"),
        ({"group": "world"}, ValueError, "init_process_group"),
        ({"exchange": "star"}, ValueError, "gather"),
        ({"averaged": 1}, TypeError, "averaged must be"),
        ({"averaged": True}, ValueError, "it needs group="),
    ):
        with pytest.raises(error, match=text):
            goal.apply(x, x, **bad)
    with pytest.raises(ValueError, match="it needs group="):
        goal.Objective(averaged=True)
    with pytest.raises(ValueError, match="ranks must be"):
        goal.explain(x, x, ranks=0)
    with pytest.raises(ValueError, match="same number of rows"):
        goal.explain(x, torch.eye(4, 3), ranks=2)
    assert goal.recipe("vse++", group="world").extra_repr().endswith("over ranks by gather")


def test_explain_without_ranks_says_nothing_of_them() -> None:
    x = torch.empty(16, 4)
    assert "ranks" not in str(goal.explain(x, x))
    assert goal.explain(x, x, ranks=1).gather == 0
    assert "rounds   2" in str(goal.explain(x, x, ranks=8, mining="selective", exchange="ring"))


# ── the model of many GPUs ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_model_counts_as_explain_does_and_hides_the_shorter() -> None:
    gather, ring, usual, usual_ring = network.schemes(8, 64, 32, torch.float32, "con", "hardest")
    x = torch.empty(64, 32)
    assert (gather.sent, ring.sent) == tuple(goal.explain(x, x, P="con", ranks=8)[-3:-1])
    assert usual.sent == 2 * 7 * 64 * 32 * (4 + 4)
    assert usual_ring.sent == 2 * 7 * 64 * 32 * 4 + 8 * 64 * 32 * 4
    for overlap, seconds in ((0.0, 5.0), (1.0, 3.0), (0.5, 4.0)):
        machine = network.Machine(bandwidth=1.0, latency=0.25, rate=1.0, overlap=overlap)
        assert network.expected(network.Scheme("-", 1, 3, 4, 0), machine) == seconds
