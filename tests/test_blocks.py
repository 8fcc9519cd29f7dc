"""A batch in blocks on the kernels: however S is cut, merged and summed it is what the whole is; over ranks too."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from processes import run_ranks
from torch import Tensor
from torch.nn.functional import normalize

import goal
import goal.distributed
from goal.distributed.exchange import as_bytes, pack, unpack
from goal.engine.backend import Backend
from goal.engine.partials import Partial, finish, merge
from goal.engine.statistics import Request, Statistics
from goal.engine.types import Block, Dense, Masks, Mined, Pairs
from goal.kernels import launch
from goal.kernels.bits import reach_of, threshold, tie_of
from goal.similarity import Dot
from goal.terms import Product

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes its time in the interpreter; some rows are still those of another."""
    few_programs(monkeypatch)


def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ROWS", 32)
    monkeypatch.setitem(launch.SINGLE, "ROWS", 32)


REQUESTS = {
    "hardest": Request(),
    "semi-hard": Request(semi_hard=0.3),
    "all of it": Request(semi_hard=0.3, lin=True, beta=10.0),
}
SHAPES = ((70, 70), (30, 85), (85, 30))
EPS = torch.finfo(torch.float32).eps


class Batch(NamedTuple):
    """A batch, who computes it, and the blocks that it is cut into."""

    backend: Backend
    whole: Block
    pairs: Pairs

    def blocks(self) -> list[list[Block]]:
        """Uneven ones, some of them without an anchor, some without the pairs of their anchors."""
        (x, y, masks), (n, m) = self.whole, self.whole.masks.size
        row_cuts, col_cuts = (0, n // 3, n), (0, m // 4, m // 2, m)
        return [
            [
                Block(x[a:b], y[c:d], masks.block(slice(a, b), slice(c, d)))
                for c, d in itertools.pairwise(col_cuts)
            ]
            for a, b in itertools.pairwise(row_cuts)
        ]  # fmt: skip

    def to(self, impl: str, dtype: torch.dtype) -> "Batch":
        """The same, computed by somebody else."""
        x, y, masks = self.whole
        backend, x, y = self.backend._replace(impl=impl), x.to(dtype), y.to(dtype)
        return Batch(backend, Block(x, y, masks), backend.pair(x, y, masks.pairs))


def batch(n: int, m: int, with_ids: bool, dtype: torch.dtype = torch.float32, precision: str = "exact") -> Batch:
    generator = torch.Generator().manual_seed(n + m)
    x, y = torch.randn(n, 24, generator=generator), torch.randn(m, 24, generator=generator)
    k = min(n, m)
    y[:k] += x[:k]
    y[k // 2] = y[k // 3]  # a tie
    x, y = normalize(x, dim=1).to(dtype), normalize(y, dim=1).to(dtype)
    ids = (torch.arange(n) // 3, torch.arange(m) // 3) if with_ids else (None, None)
    backend = Backend("triton", precision, Dot())
    return Batch(backend, Block(x, y, Masks(n, m, (n, m), ids=ids[0], y_ids=ids[1])), backend.pair(x, y, k))


def merged(of: Batch, request: Request) -> Statistics:
    """The statistics of a batch from the partials of its blocks."""
    limits = of.backend.limits(of.whole, of.pairs, request)
    mined = [[of.backend.mine(block, of.pairs, request) for block in row] for row in of.blocks()]

    def together(parts: list[Partial]) -> Partial:
        first, *rest = parts
        for part in rest:
            first = merge(first, part, request, limits)
        return first

    def joined(parts: list[Partial]) -> Partial:
        columns: list[Any] = [None if one[0] is None else torch.cat(one) for one in zip(*parts, strict=True)]
        return Partial(*columns)

    rows = joined([together([rows for rows, _ in row]) for row in mined])
    cols = joined([together([cols for _, cols in column]) for column in zip(*mined, strict=True)])
    return finish(of.pairs.s_pos, rows, cols)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("name", REQUESTS)
def test_statistics_of_blocks_are_those_of_the_whole(name: str, n: int, m: int, with_ids: bool) -> None:
    of, request = batch(n, m, with_ids), REQUESTS[name]
    found, whole = merged(of, request), of.backend.statistics(of.whole, of.pairs, request)
    true = of.to("torch", torch.float64)
    truth = true.backend.statistics(true.whole, true.pairs, request)
    assert torch.equal(found.s_neg, whole.s_neg)
    assert torch.equal(found.negative, whole.negative)
    if request.semi_hard is not None:
        assert torch.equal(found.semi, whole.semi)
        some = whole.semi != -torch.inf
        assert torch.equal(found.semi_negative[some], whole.semi_negative[some])
    for statistic in ("r_neg_lin", "r_neg_exp"):
        one, other, right = (getattr(each, statistic) for each in (found, whole, truth))
        assert (one is None) == (other is None)
        if one is not None:
            rounding = 2 * (other - right).abs().max() + 16 * EPS
            assert (one - right).abs().max() <= rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_half_precision_scan_of_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks look for in 16 bit is scored in float32: their winners are those of the whole."""
    monkeypatch.setattr(launch, "SMALL", 0)
    of, request = batch(70, 90, True, dtype, "fast"), REQUESTS["all of it"]
    found, whole = merged(of, request), of.backend.statistics(of.whole, of.pairs, request)
    assert torch.equal(found.s_neg, whole.s_neg)
    assert torch.equal(found.negative, whole.negative)
    if dtype == torch.bfloat16:  # else blocks that look for semi-hard negatives are scanned in another arithmetic
        torch.testing.assert_close(found.r_neg_lin, whole.r_neg_lin, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.r_neg_exp, whole.r_neg_exp, rtol=1e-5, atol=1e-6)


@triton.jit
def _limits_of_kernels(bounds, out, slack):
    tl.store(out, threshold(bounds))
    tl.store(out + 1, tie_of(reach_of(bounds), slack))


@pytest.mark.parametrize("length", [0.0, 1e-30, 3e-3, 1.0, 7.0, 1e3, 1e30])
def test_blocks_are_merged_by_the_limits_that_kernels_reduce_by(length: float) -> None:
    x, y, _ = batch(20, 20, False).whole
    pairs = launch.pair(length * x, y, 20)
    out = torch.empty(2)
    _limits_of_kernels[(1,)](pairs.bounds, out, launch._slack(24))
    assert list(launch.limits(pairs.bounds, 24)[:2]) == out.tolist()


def dense_of(of: Batch, P: str, every: bool) -> Dense:
    product = Product(goal.T.cir(), goal.P[P]())
    share = torch.rand(2, of.whole.masks.pairs, generator=torch.Generator().manual_seed(1))
    if not every:
        share[:, ::3] = 0
    relative = {name: torch.full_like(share, 0.2) for name in product.statistics}
    return Dense(product, *of.pairs[:2], share, relative, every)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("P", ["lin", "sig-ms"])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_dense_blocks_add_up(n: int, m: int, P: str, every: bool, with_ids: bool) -> None:
    of = batch(n, m, with_ids)
    dense = dense_of(of, P, every)
    value, gx, gy, pull = _summed(of, dense)
    whole_x, whole_y, whole_pull = of.backend.dense_block(of.whole, dense, (True, True))
    true = of.to("torch", torch.float64)
    double = dense._replace(
        s_pos=true.pairs.s_pos,
        bounds=true.pairs.bounds,
        share=dense.share.double(),
        relative={name: one.double() for name, one in dense.relative.items()},
    )
    right_x, right_y, right_pull = true.backend.dense_block(true.whole, double, (True, True))
    for found, whole, right in ((gx, whole_x, right_x), (gy, whole_y, right_y), (pull, whole_pull, right_pull)):
        scale = right.abs().max()
        assert (found - right).abs().max() <= 2 * (whole - right).abs().max() + 4 * EPS * scale
    whole_value, right_value = of.backend.dense_value(of.whole, dense), true.backend.dense_value(true.whole, double)
    assert (value - right_value).abs() <= 2 * (whole_value - right_value).abs() + 8 * EPS * right_value.abs()


def _summed(of: Batch, dense: Dense) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, gradients and pulls of all blocks."""
    (x, y, _), value, pull = of.whole, torch.zeros(()), torch.zeros_like(dense.share)
    gx, gy = torch.zeros(x.shape), torch.zeros(y.shape)
    for block in itertools.chain.from_iterable(of.blocks()):
        value += of.backend.dense_value(block, dense)
        at_x, at_y, taken = of.backend.dense_block(block, dense, (True, True))
        a, b = block.masks.row_offset, block.masks.col_offset
        gx[a : a + block.masks.n] += at_x
        gy[b : b + block.masks.m] += at_y
        pull += taken
    return value, gx, gy, pull


@pytest.mark.parametrize("few", [0, 1024])  # sorted, and not
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_mined_entries_of_blocks_add_up(n: int, m: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "FEW", few)
    of, k = batch(n, m, False), min(n, m)
    generator = torch.Generator().manual_seed(2)
    negative = torch.stack([torch.randint(0, size, (k,), generator=generator) for size in (m, n)])
    mined = Mined(negative, *torch.randn(2, 2, k, generator=generator))
    incoming = torch.tensor(1.5)
    gx, gy = torch.zeros(n, 24), torch.zeros(m, 24)
    for block in itertools.chain.from_iterable(of.blocks()):
        at_x, at_y = of.backend.mined_emit(block, mined, incoming, (True, True))
        a, b = block.masks.row_offset, block.masks.col_offset
        gx[a : a + block.masks.n] += at_x
        gy[b : b + block.masks.m] += at_y
    true = of.to("torch", torch.float64)
    double = Mined(negative, mined.pull.double(), mined.push.double())
    right = true.backend.mined_emit(true.whole, double, incoming.double(), (True, True))
    for found, expected in zip((gx, gy), right, strict=True):
        assert (found - expected).abs().max() <= 8 * EPS * expected.abs().max()


# ── over ranks ──────────────────────────────────────────────────────────────────────────────────────────────────────

COUNTS = (13, 6, 21)
OBJECTIVES = (("hardest", "lin-ms"), ("semi-hard", "sig-ms"), ("all", "sig-ms"), ("selective", "con"))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    few_programs(pytest.MonkeyPatch())
    x, y, ids = _global()
    own = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    found = {}
    with goal.distributed.joined(init_method=f"file://{folder}/store", rank=rank, world_size=len(COUNTS)):
        for exchange in ("gather", "ring"):
            for mining, P in OBJECTIVES:
                a, b = (side[own].clone().requires_grad_() for side in (x, y))
                rest: dict[str, Any] = {"impl": "triton", "precision": "exact", "exchange": exchange}
                objective = goal.Objective(T="cir", P=P, mining=mining, group="world", **rest)
                loss = objective(a, b, ids[own])
                (1.5 * loss).backward()
                stats = None if mining == "all" and exchange == "ring" else objective.stats
                found[exchange, mining, P] = loss.detach(), a.grad, b.grad, stats
    torch.save(found, f"{folder}/{rank}.pt")


def _global() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    n = sum(COUNTS)
    x, y = torch.randn(n, 20, generator=generator), torch.randn(n, 20, generator=generator)
    return normalize(x, dim=1), normalize(x + y, dim=1), torch.arange(n) // 2


def test_ranks_on_kernels_are_one_process_on_kernels(tmp_path: Path) -> None:
    run_ranks(_rank, len(COUNTS), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(len(COUNTS))]
    x, y, ids = _global()
    for mining, P in OBJECTIVES:
        a, b = x.double().requires_grad_(), y.double().requires_grad_()
        objective = goal.Objective(T="cir", P=P, mining=mining)
        loss = objective(a, b, ids)
        (1.5 * loss).backward()
        for exchange in ("gather", "ring"):
            values, gx, gy, stats = zip(*(each[exchange, mining, P] for each in ranks), strict=True)
            assert len({value.item() for value in values}) == 1, "the value is the same bits on all ranks"
            torch.testing.assert_close(values[0].double(), loss.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(torch.cat(gx).double(), a.grad, rtol=1e-4, atol=2e-7)
            torch.testing.assert_close(torch.cat(gy).double(), b.grad, rtol=1e-4, atol=2e-7)
            if stats[0] is None:
                continue
            assert torch.equal(torch.cat([each.index for each in stats], 1), objective.stats.index)
            for name in ("s_neg", "T", "P_pos", "P_neg"):
                shown, right = torch.cat([getattr(each, name) for each in stats], 1), getattr(objective.stats, name)
                torch.testing.assert_close(shown.double(), right, rtol=1e-4, atol=1e-6)


def test_the_plan_names_the_kernels() -> None:
    x, y, _ = _global()
    plan = goal.explain(x, y, ranks=3, impl="triton")
    assert plan.impl == "triton"
    assert plan.ranks == 3


@pytest.mark.parametrize("rows", [1, 4])
def test_a_column_with_any_stride_is_sent(rows: int) -> None:
    """PyTorch calls a single column contiguous whatever its stride, and yet does not view it as bytes."""
    column = torch.arange(20.0).view(5, 4)[0, :rows].as_strided((rows, 1), (1, 7))
    (back,) = unpack(pack(column), [column])
    assert torch.equal(back, column)
    assert torch.equal(as_bytes(column).view(torch.float32), column.clone(memory_format=torch.contiguous_format))
