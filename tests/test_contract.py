"""The engine against the oracle and against the literature: the cases of the table, on every path of the engine.

In float64 all; in tiles and as matrices the covering cases, and all by `pytest -m full tests/test_contract.py`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Result, oracle, oracle_similarity, relative_similarities
from table import INTEGRABLE, Case, Params, cases, covering, make_inputs, stays_integrable
from torch import Tensor
from torch.nn.functional import normalize

import goal
from goal.engine import eager, statistics
from goal.engine.partials import Partial, merge
from goal.engine.statistics import Request
from goal.engine.types import Block, Masks, Pairs
from goal.similarity import Dot

pytestmark = pytest.mark.usefixtures("one_thread")

MININGS, POSITIVES = goal.mining.RULES, goal.positives.RULES


def group(case: Case) -> str:
    margin = "+margin" if "margin" in case.T_params else ""
    return f"{case.T}{margin}-{case.P}-{case.mining}-{case.similarity}"


GROUPS = {name: list(of) for name, of in itertools.groupby(covering(), group)}
PRODUCT = {name: list(of) for name, of in itertools.groupby(cases(), group)}
every_group = pytest.mark.parametrize("of", GROUPS.values(), ids=GROUPS)
every_product = pytest.mark.parametrize("of", PRODUCT.values(), ids=PRODUCT)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so that whoever reads before writing is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def paired(case: Case) -> Case:
    """The case with pairs for positives."""
    return case._replace(positives="pair", positives_params={})


# ── a case, for the engine and for the oracle ───────────────────────────────────────────────────────────


def arguments(case: Case) -> dict[str, Any]:
    """What `goal.apply` is asked for."""
    return {
        "T": goal.T[case.T](**case.T_params),
        "P": goal.P[case.P](**case.P_params),
        "mining": MININGS[case.mining](**case.mining_params),
        "reduction": case.reduction,
        "scale": case.scale,
        "directions": case.directions,
        "positives": POSITIVES[case.positives](**case.positives_params),
    }


def question(case: Case) -> dict[str, Any]:
    """What the oracle is asked for."""
    return {name: getattr(case, name) for name in case._fields if name not in ("similarity", "ids_case", "shape")}


def tensors(*arrays: Any) -> list[Any]:
    return [None if array is None else torch.from_numpy(array) for array in arrays]


@functools.cache
def truth(case_id: str) -> Result:
    case = BY_ID[case_id]
    x, y, ids, y_ids, weight = make_inputs(case, 0)
    return oracle(x, y, similarity=case.similarity, ids=ids, y_ids=y_ids, weight=weight, **question(case))


BY_ID = {case.id: case for case in cases()}


def gap(actual: Tensor, expected: Any) -> float:
    """The largest error, in units of the largest entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    if actual.shape != expected.shape:
        return math.inf
    scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    error = (
        torch.where(actual == expected, 0.0, actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    )
    return error / max(scale, 1e-4) if error == error else math.inf


def check(case: Case) -> list[str]:
    """What differs from the oracle in float64."""
    x, y, ids, y_ids, weight = tensors(*make_inputs(case, 0))
    options = {**arguments(case), "similarity": case.similarity, "ids": ids, "y_ids": y_ids, "weight": weight}
    expected = truth(case.id)
    x.requires_grad_(), y.requires_grad_()
    if np.isposinf(expected.s_pos).all():  # an error, unless the ids are not read
        with pytest.raises(ValueError, match="ids leave every anchor without a positive"):
            goal.apply(x, y, **options)
        options["check_finite"] = False
    loss = goal.apply(x, y, **options)
    loss.backward()
    gx, gy, stats = goal.gradients(x, y, **options)
    gaps = {
        "x.grad": gap(x.grad, expected.gx),
        "y.grad": gap(y.grad, expected.gy),
        "gradients x": gap(gx, expected.gx),
        "gradients y": gap(gy, expected.gy),
        "value": gap(loss.detach(), expected.value),
        "s_pos": gap(stats.s_pos, expected.s_pos),
    }
    wrong = [f"{name} is {size:.1e} off" for name, size in gaps.items() if not size <= 1e-10]
    if case.mining != "semi-hard":  # its stats show the semi-hard negative: see test_edges.py
        found = stats.index >= 0
        if not np.array_equal(stats.index.numpy(), expected.index):
            wrong.append(f"index {stats.index.tolist()} is not {expected.index.tolist()}")
        s_neg = expected.s_neg if expected.soft is None else expected.soft
        if not gap(stats.s_neg[found], s_neg[found.numpy()]) <= 1e-10:
            wrong.append("s_neg")
    return [f"{case.id}: {what}" for what in wrong]


# ── the cases of the table, in float64 to 1e-10 ─────────────────────────────────────────────────────────


@every_product
def test_the_oracle_in_float64(of: list[Case]) -> None:
    """All of them: a transposed mask of ids passes the covering cases."""
    assert [wrong for case in of for wrong in check(case)] == []


def test_every_case_is_in_a_group() -> None:
    assert sum(map(len, PRODUCT.values())) == len(BY_ID) >= 2400
    assert sum(map(len, GROUPS.values())) == len(covering())
    assert GROUPS.keys() == PRODUCT.keys()
    assert len(GROUPS) == 300


# ── the same in small tiles: what a large batch goes through ────────────────────────────────────────────


def in_tiles(monkeypatch: pytest.MonkeyPatch, height: int) -> None:
    """Every batch walks over tiles of `height` rows, however small it is."""
    monkeypatch.setattr(eager, "SMALL", 0)
    monkeypatch.setattr(eager, "tiles", lambda n, m: (slice(i, min(i + height, n)) for i in range(0, n, height)))


HEIGHTS = dict(zip(BY_ID, itertools.cycle((1, 2, 3, 4, 5, 6, 7)), strict=False))  # 7: in step with no factor


def check_in_small_tiles(of: list[Case], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    wrong = []
    for case in of:
        in_tiles(monkeypatch, height=HEIGHTS[case.id])
        wrong += check(case)
    return wrong


@every_group
def test_the_oracle_in_small_tiles(of: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_in_small_tiles(of, monkeypatch) == []


@pytest.mark.full
@every_product
def test_the_full_product_in_small_tiles(of: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_in_small_tiles(of, monkeypatch) == []


# ── matrices ────────────────────────────────────────────────────────────────────────────────────────────


def matrix(case: Case) -> np.ndarray:
    """An arbitrary S (N, M) on a grid of 1/64: ties are ties, and no default of a threshold lies on it."""
    rng = np.random.default_rng(list(case.id.encode()))
    S = rng.integers(-40, 60, case.shape[:2]) / 64
    k = np.arange(min(S.shape))
    S[k, k] = rng.integers(0, 64, len(k)) / 64
    return S


MATRIX_GROUPS = {name.removesuffix("-dot"): of for name, of in GROUPS.items() if name.endswith("-dot")}


@pytest.mark.parametrize("of", MATRIX_GROUPS.values(), ids=MATRIX_GROUPS)
def test_a_matrix_against_the_oracle(of: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    check_matrices(of, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("of", [of for name, of in PRODUCT.items() if name.endswith("-dot")], ids=MATRIX_GROUPS)
def test_the_full_product_of_a_matrix(of: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    check_matrices(of, monkeypatch)


def check_matrices(of: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    for case, height in itertools.product(of, (None, 2)):
        _, _, *rest = make_inputs(case, 0)
        named = dict(zip(("ids", "y_ids", "weight"), rest, strict=True))
        S = matrix(case)
        expected = oracle_similarity(S, **question(case), **named)
        leaf = torch.from_numpy(S.copy()).requires_grad_()
        with monkeypatch.context() as patch:
            if height is not None:
                in_tiles(patch, height)
            options = dict(zip(named, tensors(*rest), strict=True))
            lacking = {"check_finite": False} if np.isposinf(expected.s_pos).all() else {}
            loss = goal.apply_similarity(leaf, **arguments(case), **options, **lacking)
            loss.backward()
        assert gap(leaf.grad, expected.G) <= 1e-10, case.id
        assert gap(loss.detach(), expected.value) <= 1e-10, case.id
        assert np.array_equal(leaf.detach().numpy(), S), "S was written to"


# ── mining blocks and merging them ──────────────────────────────────────────────────────────────────────

EVERYTHING = Request(0.2, lin=True, beta=10.0, softmax=goal.mining.soft().softmax, shares=True)


class Blocks:
    """A batch on a grid, cut into blocks; every product is exact, so every reduction but the two sums is too."""

    def __init__(self, n: int, m: int, with_ids: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.x, self.y = (torch.from_numpy(rng.integers(-3, 4, (size, 6)) / 8) for size in (n, m))
        self.k = min(n, m)
        self.y[: self.k : 2] = self.x[: self.k : 2]  # some pairs are equal, and some rows are ties
        self.s_pos = (self.x[: self.k] * self.y[: self.k]).sum(1)
        ids, y_ids = (torch.from_numpy(rng.integers(0, 9, size)) for size in (n, m))
        pair_ids = {"ids": ids, "y_ids": y_ids} if with_ids else {}
        self.masks = Masks(n, m, (n, m), **pair_ids)  # which the engine takes though those of a pair may differ

    @property
    def pairs(self) -> Pairs:
        return Pairs(self.s_pos, torch.tensor(eager.bounds(Dot(), self.x, self.y, self.s_pos, EVERYTHING)))

    def mine(self, rows: slice, cols: slice) -> tuple[Partial, Partial]:
        block = Block(self.x[rows], self.y[cols], self.masks.block(rows, cols))
        return eager.mine(Dot(), block, self.pairs, EVERYTHING)

    def merge(self, a: Partial, b: Partial) -> Partial:
        limits = eager.limits(Dot(), Block(self.x, self.y, self.masks), self.pairs, EVERYTHING)
        return merge(a, b, EVERYTHING, limits)


def cut(size: int, *at: int) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise((0, *at, size))]


def same(a: Partial, b: Partial) -> bool:
    """Equal bit by bit, but for the rounding of the two sums."""
    exact = [name for name in Partial._fields if not name.endswith(("_sum", "negative", "peak", "norm"))]
    found = a.s_neg != -torch.inf, a.semi != -torch.inf
    return (
        all(torch.equal(getattr(a, name).double(), getattr(b, name).double()) for name in exact)
        and torch.equal(a.negative[found[0]], b.negative[found[0]])
        and torch.equal(a.semi_negative[found[1]], b.semi_negative[found[1]])
        and torch.allclose(a.lin_sum, b.lin_sum, rtol=1e-13, atol=1e-13)
        and torch.allclose(a.exp_sum, b.exp_sum, rtol=1e-13, atol=0)
        and torch.allclose(a.peak + a.soft_sum.log(), b.peak + b.soft_sum.log(), rtol=1e-13, atol=1e-13)
        and torch.allclose(a.soft_sum / a.soft_norm, b.soft_sum / b.soft_norm, rtol=1e-13, equal_nan=True)
    )


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize(("n", "m"), [(17, 17), (13, 22), (22, 13)])
def test_blocks_merge_to_the_whole_in_any_order(n: int, m: int, with_ids: bool) -> None:
    batch = Blocks(n, m, with_ids, seed=n)
    whole = batch.mine(slice(0, n), slice(0, m))
    row_blocks, col_blocks = cut(n, 1, 6, 14 if n > 14 else 9), cut(m, 4, 11)
    mined = [[batch.mine(rows, cols) for cols in col_blocks] for rows in row_blocks]

    for r, rows in enumerate(row_blocks):  # x→y: a block of anchors meets all blocks of candidates
        anchors = slice(rows.start, min(rows.stop, batch.k))
        if anchors.start >= anchors.stop:
            assert all(len(part[0].s_neg) == 0 for part in mined[r])
            continue
        of_anchors = Partial(*(field[anchors] for field in whole[0]))
        for a, b, c in itertools.permutations(part[0] for part in mined[r]):
            assert same(batch.merge(batch.merge(a, b), c), of_anchors)
            assert same(batch.merge(a, batch.merge(b, c)), of_anchors)

    for c, cols in enumerate(col_blocks):  # y→x
        anchors = slice(cols.start, min(cols.stop, batch.k))
        if anchors.start >= anchors.stop:
            continue
        of_anchors = Partial(*(field[anchors] for field in whole[1]))
        for order in itertools.permutations(mined[r][c][1] for r in range(len(row_blocks))):
            one_by_one = functools.reduce(batch.merge, order)
            in_halves = batch.merge(batch.merge(*order[:2]), batch.merge(*order[2:]))
            assert same(one_by_one, of_anchors)
            assert same(in_halves, of_anchors)


def test_a_tie_goes_to_the_lowest_index_whichever_block_has_it() -> None:
    batch = Blocks(12, 12, with_ids=False, seed=0)
    batch.y[:] = batch.y[0]  # every negative of an x is a tie
    batch.s_pos = (batch.x * batch.y).sum(1)
    left, right = (batch.mine(slice(0, 12), cols)[0] for cols in cut(12, 5))
    for merged in (batch.merge(left, right), batch.merge(right, left)):
        assert merged.negative.tolist() == [1] + [0] * 11
        assert merged.ties.tolist() == [11] * 12
        assert merged.lin_count.tolist() == [0] * 12


@pytest.mark.parametrize("column", [2, 9])
def test_a_nan_in_one_block_shows_in_the_merge(column: int) -> None:
    batch = Blocks(12, 12, with_ids=False, seed=1)
    batch.y[column, 3] = torch.nan
    parts = [batch.mine(slice(0, 12), cols)[0] for cols in cut(12, 4, 8)]
    for order in itertools.permutations(parts):
        merged = functools.reduce(batch.merge, order)
        anchors = torch.arange(12) != column  # of the pair itself it is the positive that is NaN
        assert merged.s_neg[anchors].isnan().all()
        assert (merged.negative[anchors] == column).all()
        assert merged.soft_sum[anchors].isnan().all()


# ── R⁺: by the definition for few pairs, in sorted order for many ───────────────────────────────────────


def positives_of(kind: str, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """s⁺ (K,) and s⁻ (2, K)."""
    s_pos = {
        "unit": rng.uniform(-1, 1, k),
        "tied": rng.integers(-3, 4, k) / 4,
        "equal": np.full(k, 0.3),
        "collapsed": 1 - 1e-9 * rng.random(k),
        "wide": rng.uniform(-150, 150, k),
        "apart": rng.uniform(-1, 1, k) + 1000 * (np.arange(k) % 2),  # entries of the one half are 0 for the other
        "huge": rng.choice([-1.0, 1.0], k) * 10 ** rng.uniform(-3, 15, k),
    }[kind]
    spread = np.abs(s_pos).max()
    s_neg = rng.uniform(-spread, spread, (2, k))
    s_neg[:, ::5] = s_pos.min() - 1 - spread  # nothing is valid
    s_neg[:, 1::5] = s_pos.max() + 1  # everything is
    s_neg[1, 2] = -math.inf  # no negative at all
    return s_pos, s_neg


@pytest.mark.parametrize("kind", ["unit", "tied", "equal", "collapsed", "wide", "apart", "huge"])
@pytest.mark.parametrize("k", [1, 2, 30])
@pytest.mark.parametrize("P", ["lin-ms", "sig-ms"])
def test_both_readings_of_r_pos_are_the_definition(P: str, k: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s_pos, s_neg = positives_of(kind, max(k, 3), np.random.default_rng(k))
    s_pos, s_neg = s_pos[:k], s_neg[:, :k]

    def defined(i: int, reach: float) -> float:  # a row of one negative, the hardest
        return relative_similarities(P, {}, i, s_pos.tolist(), [reach], [0], 0)[0]

    expected = np.array([[defined(i, float(reach[i])) for i in range(k)] for reach in s_neg])
    for few in (0, 1 << 20):
        monkeypatch.setattr(statistics, "_FEW", few)
        own, hardest = torch.from_numpy(s_pos), torch.from_numpy(s_neg)
        linear = P == "lin-ms"
        found = statistics.r_pos_lin(own, hardest) if linear else statistics.r_pos_exp(own, hardest, 2.0)
        actual = found.numpy()
        assert not np.isnan(actual).any(), few
        exact = np.abs(s_pos).max() * 1e-13 if linear else 0.0
        scale = 1e-10 if kind != "huge" else 1e-6  # e^{αs}: an error of ε in αs is one of αs·ε in the result
        representable = expected < 1e300
        np.testing.assert_allclose(actual[representable], expected[representable], rtol=scale, atol=exact)
        assert (actual[~representable] > 1e290).all()


# ── dense and eager: the truth for large batches, and the yardstick of float32 ──────────────────────────


def similarities(similarity: str, x: Tensor, y: Tensor) -> Tensor:
    """S, (N, M)."""
    if similarity == "order":
        return -torch.linalg.vector_norm((y - x[:, None]).clamp(min=0), dim=-1)
    return unit(x) @ unit(y).T if similarity == "cosine" else x @ y.T


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖, and 0 with gradient 0 for a zero vector."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length == 0, 0, x / torch.where(length == 0, 1, length))


def some(values: Tensor, among: Tensor) -> Tensor:
    """The mean of each row's values over a set, 0 for an empty one: (K, …) → (K,)."""
    return torch.where(among, values, 0).sum(1) / among.sum(1).clamp(min=1)


def negatives_of(S: Tensor, ids: Tensor | None, y_ids: Tensor | None) -> Tensor:
    """Where S holds a negative."""
    negative = ~torch.eye(*S.shape, dtype=torch.bool)
    if ids is not None:
        negative &= ids[:, None] != (ids if y_ids is None else y_ids)
    return negative


def dense(case: Case, x: Tensor, y: Tensor, ids: Any = None, y_ids: Any = None, weight: Any = None) -> list[Tensor]:
    """∂l/∂x and ∂l/∂y in the dtype of x and y: all of S is made, and autograd goes through it."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    S = similarities(case.similarity, x, y)
    chosen, params = arguments(case), {"alpha": 2.0, "beta": 10.0} | dict(case.P_params)
    negative, G = negatives_of(S, ids, y_ids), torch.zeros_like(S)
    s_pos = S.detach().diagonal()
    k = len(s_pos)
    share = torch.ones_like(s_pos) if weight is None else weight.to(S.dtype)
    if case.reduction == "mean":
        share = share / (share.sum() if share.any() else 1)
    both = [case.scale * share if case.directions in ("both", one) else 0 * share for one in ("x→y", "y→x")]
    with torch.no_grad():
        views = (S[:k], negative[:k], G[:k]), (S.T[:k], negative.T[:k], G.T[:k])
        for (s, off, g), share in zip(views, both, strict=True):
            own = s_pos[:, None]
            s_neg, index = torch.where(off, s, -torch.inf).max(1)
            hardest = torch.zeros_like(off).scatter_(1, index[:, None], True) & off
            R = {}
            if case.P.endswith("-ms"):
                below = off & ~hardest & (s >= s_pos.min() - 0.1)
                above = (s_pos <= s_neg[:, None] + 0.1) & ~torch.eye(k, dtype=torch.bool)
                to_pos, to_neg = own - s_pos, s_neg[:, None] - s
                if case.P == "lin-ms":
                    R["r_pos_lin"] = some(to_pos, above & (to_pos != 0))[:, None]
                    R["r_neg_lin"] = some(to_neg, below & (to_neg != 0))[:, None]
                else:
                    R["r_pos_exp"] = some((params["alpha"] * to_pos).exp(), above)[:, None]
                    R["r_neg_exp"] = some((-params["beta"] * to_neg).exp(), below)[:, None]
            if case.mining == "soft":
                softmax = chosen["mining"].softmax
                among = off | ~negatives_of(s, None, None) if softmax.over == "candidates" else off
                h = torch.where(among, softmax.h(s), -torch.inf)
                z, has = h.logsumexp(1), among.any(1)
                at = torch.where(has, softmax.stands(z, among.sum(1).to(S.dtype)), s_pos)[:, None]
                q = torch.where(has[:, None], (h - z[:, None]).exp(), 0)
                t, (p_pos, p_neg) = chosen["T"](own, at), chosen["P"](own, at, **R)
                if softmax.at == "each":
                    p_neg = chosen["P"](own, s, **R)[1]
                pulls = has | (not isinstance(t, Tensor))  # con without a margin pulls without a negative
                g += torch.where(among, share[:, None] * t * p_neg * q, 0)
                g.diagonal().sub_(torch.where(pulls, share * (t * p_pos * torch.ones_like(own))[:, 0], 0))
                continue
            every = off.to(S.dtype) / off.sum(1, keepdim=True).clamp(min=1)
            if case.mining == "semi-hard":
                inside = off & (s > own - case.mining_params.get("margin", 0.2)) & (s < own)
                index = torch.where(inside, s, -torch.inf).argmax(1, keepdim=True)
                selected = torch.zeros_like(inside).scatter_(1, index, True) & inside
            elif case.mining == "all":
                selected = every if case.mining_params.get("average", True) else off
            elif case.mining == "selective":
                near = (s_pos - s_neg).abs() < case.mining_params.get("eps", 0.01)
                selected = torch.where(near[:, None], every, hardest.to(S.dtype))
            else:
                selected = hardest
            t = chosen["T"](own, s)
            p_pos, p_neg = chosen["P"](own, s, **R)
            emitted = share[:, None] * selected * t
            g += torch.where(off, emitted * p_neg, 0)
            pull = torch.where(off, emitted * p_pos, 0).sum(1)
            if case.mining_params.get("pull") == "once":
                count = off.sum(1)
                pull = pull if case.mining_params.get("average", True) else pull / count.clamp(min=1)
                alone = (t * p_pos * torch.ones_like(s))[:, 0]  # con without a margin pulls without a negative
                pull = torch.where(count > 0, pull, 0 if isinstance(t, Tensor) else share * alone)
            g.diagonal().sub_(pull)
    S.backward(G)
    return [x.grad, y.grad]


def soft_negatives(case: Case, s: Tensor, negative: Tensor) -> Tensor:
    """(K,) s̃⁻ of soft mining's anchors; inf where there is no candidate."""
    softmax = MININGS["soft"](**case.mining_params).softmax
    among = negative | ~negatives_of(s, None, None) if softmax.over == "candidates" else negative
    z = torch.where(among, softmax.h(s), -torch.inf).logsumexp(1)
    return torch.where(among.any(1), softmax.stands(z, among.sum(1).to(s.dtype)), torch.inf)


def close_calls(case: Case, S: Tensor, off: Tensor, within: float) -> Tensor:
    """(K,) the anchors for which some decision lies within a rounding of a threshold or of a tie."""
    s_pos = S.diagonal()
    k = len(s_pos)
    found = torch.zeros(k, dtype=torch.bool)

    def lead(s: Tensor, among: Tensor) -> Tensor:  # of the first over the second, (K, 1)
        first, second = torch.where(among, s, -torch.inf).topk(2).values.T
        return torch.where(second == -torch.inf, 1.0, first - second)[:, None]

    for s, negative in ((S[:k], off[:k]), (S.T[:k], off.T[:k])):
        own, hardest = s_pos[:, None], torch.where(negative, s, -torch.inf).amax(1, keepdim=True)
        s = torch.where(negative, s, torch.inf)
        near = []
        if case.mining not in ("all", "soft") or case.P.endswith("-ms"):
            near.append(lead(s, negative))
        if case.mining == "semi-hard":
            lower = own - case.mining_params.get("margin", 0.2)
            near += [s - own, s - lower, lead(s, negative & (s < own) & (s > lower))]
        if case.mining == "selective":
            near.append((own - hardest).abs() - case.mining_params.get("eps", 0.01))
        if "margin" in case.T_params:
            at = soft_negatives(case, s, negative)[:, None] if case.mining == "soft" else s
            near.append(at - own + case.T_params["margin"])
        if case.P.endswith("-ms"):
            near += [s - (s_pos.min() - 0.1), s_pos - hardest - 0.1]
        if case.P == "lin-ms":
            near.append((own - s_pos).fill_diagonal_(1.0))
        for each in near:
            found |= (each.abs() < within).any(1)
    return found


def embeddings(rng: np.random.Generator, n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows whose pairs are alike, rounded to a dtype."""
    x, y = (torch.from_numpy(rng.normal(size=(size, d))) for size in (n, m))
    k = min(n, m)
    y[:k] = 0.7 * y[:k] + 0.7 * x[:k]
    return normalize(x).to(dtype), normalize(y).to(dtype)


@pytest.mark.parametrize("number", range(8))
def test_the_dense_yardstick_is_the_oracle(number: int) -> None:
    for case in [case for case in covering() if case.positives == "pair"][number::8]:
        expected = truth(case.id)
        for actual, of in zip(dense(case, *tensors(*make_inputs(case, 0))), (expected.gx, expected.gy), strict=True):
            assert gap(actual, of) <= 1e-10, case.id


# ── float32, within twice the error of the dense version ────────────────────────────────────────────────

EPS = torch.finfo(torch.float32).eps
SIZES = ((63, 63), (127, 63), (63, 257), (127, 127), (257, 257))


@pytest.mark.parametrize(("number", "of"), list(enumerate(GROUPS.values())), ids=GROUPS)
def test_float32_is_as_exact_as_a_dense_version(number: int, of: list[Case]) -> None:
    case, rng = paired(of[number % len(of)]), np.random.default_rng(number)
    errors, yardsticks = [], []
    for n, m in (SIZES[number % 5], (66, 64)):
        x, y = embeddings(rng, n, m, 24, torch.float32)
        x64, y64 = x.double(), y.double()
        S = similarities(case.similarity, x64, y64)
        left_out = close_calls(case, S, negatives_of(S, None, None), within=16 * EPS)
        assert left_out.double().mean() <= 0.06
        weight = (~left_out).float()  # their decision is open: they emit nothing, here and there
        true = dense(case, x64, y64, weight=weight)
        yardsticks += [gap(*both) for both in zip(dense(case, x, y, weight=weight), true, strict=True)]
        gx, gy, _ = goal.gradients(x, y, similarity=case.similarity, weight=weight, **arguments(case))
        assert gx.dtype == gy.dtype == torch.float32
        errors += [gap(*both) for both in zip((gx, gy), true, strict=True)]
    assert max(errors) <= 2 * max(yardsticks) + 2 * EPS


def on_a_grid(rng: np.random.Generator, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Few distinct rows, exact products: every row has ties, and some negatives equal their positive."""
    x, y = (torch.from_numpy(rng.integers(-2, 3, (size, 3)) / 4) for size in (n, m))
    k = min(n, m)
    y[: k // 2] = x[: k // 2]
    return x, y


@pytest.mark.parametrize("of", MATRIX_GROUPS.values(), ids=MATRIX_GROUPS)
def test_float32_sees_every_tie_that_float64_sees(of: list[Case]) -> None:
    """Where products are exact no anchor has to be left out."""
    rng = np.random.default_rng(0)
    for case in map(paired, of):
        x, y = on_a_grid(rng, 24, 19)
        gx, gy, _ = goal.gradients(x.float(), y.float(), **arguments(case))
        expected = dense(case, x, y)
        assert gap(gx, expected[0]) <= 3e-6, case.id
        assert gap(gy, expected[1]) <= 3e-6, case.id


@pytest.mark.parametrize("height", [None, 7])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "order"])
def test_a_copy_of_the_positive_is_no_semi_hard_negative(
    similarity: str, height: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a product rounds: it is not the routine that s⁺ comes from."""
    if height is not None:
        in_tiles(monkeypatch, height)
    for seed in range(5):
        x, y = embeddings(np.random.default_rng(seed), 40, 40, 130, torch.float32)
        semi_hard, copies = goal.mining.semi_hard(margin=2.0), torch.arange(40) + 40
        _, _, stats = goal.gradients(x, torch.cat((y, y)), mining=semi_hard, similarity=similarity)
        assert (stats.index[0] >= 0).any()
        assert (stats.index[0] != copies).all()
        _, _, stats = goal.gradients(torch.cat((x, x)), y, mining=semi_hard, similarity=similarity)
        assert (stats.index[1] != copies).all()


# ── bfloat16 and float16 ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", GROUPS.values(), ids=GROUPS)
def test_half_precision_loses_no_more_than_its_own_rounding(of: list[Case], dtype: torch.dtype) -> None:
    case, rng = paired(of[0]), np.random.default_rng(7)
    x, y = embeddings(rng, 24, 17, 12, dtype)
    S = similarities(case.similarity, x.double(), y.double())
    weight = (~close_calls(case, S, negatives_of(S, None, None), within=16 * EPS)).float()
    assert weight.mean() >= 0.8
    expected = dense(case, x.double(), y.double(), weight=weight)
    x.requires_grad_(), y.requires_grad_()
    loss = goal.apply(x, y, similarity=case.similarity, weight=weight, **arguments(case))
    assert loss.dtype == torch.float32
    loss.backward()
    for leaf, true in zip((x, y), expected, strict=True):
        assert leaf.grad.dtype == dtype
        rounding = torch.finfo(dtype).eps * true.abs() + torch.finfo(dtype).tiny + 1e-5 * true.abs().max()
        assert ((leaf.grad.double() - true).abs() <= rounding).all()


@pytest.mark.parametrize("mining", ["hardest", "all"])
def test_ids_are_told_apart_whatever_the_dtype_of_the_rows(mining: str) -> None:
    """bfloat16 holds integers up to 256."""
    x, y = embeddings(np.random.default_rng(9), 600, 600, 8, torch.bfloat16)
    without = goal.gradients(x, y, mining=mining)
    found = goal.gradients(x, y, mining=mining, ids=torch.randperm(600, generator=torch.Generator().manual_seed(0)))
    for one, true in zip(found[:2], without[:2], strict=True):
        assert gap(one, true) <= 2**-8


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16, torch.float16])
def test_each_gradient_has_the_dtype_of_its_input(other: torch.dtype) -> None:
    x, y = embeddings(np.random.default_rng(0), 9, 11, 8, torch.float32)
    y = y.to(other)
    x.requires_grad_(), y.requires_grad_()
    loss = goal.apply(x, y)
    loss.backward()
    assert loss.dtype == (torch.float64 if other == torch.float64 else torch.float32)
    assert (x.grad.dtype, y.grad.dtype) == (torch.float32, other)
    gx, gy, stats = goal.gradients(x, y)
    assert (gx.dtype, gy.dtype, stats.T.dtype) == (torch.float32, other, loss.dtype)


# ── batches of several tiles, full of ties ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "m"), [(1100, 130), (130, 1100), (600, 600)])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("P", ["con", "lin-ms", "sig-ms"])
def test_large_batches_in_large_tiles(P: str, mining: str, n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "TILE", 512 * m)  # the tiles down which a maximum is taken by groups of rows
    case = Case("nca", {}, P, {}, mining, {}, "dot", "sum", "-", (n, m, 3))
    rng = np.random.default_rng(n)
    x, y = on_a_grid(rng, n, m)
    ids, y_ids = (torch.from_numpy(np.arange(size) * 7 % 40) for size in (n, m))  # of a pair equal
    gx, gy, _ = goal.gradients(x, y, ids=ids, y_ids=y_ids, **arguments(case))
    expected = dense(case, x, y, ids, y_ids)
    assert gap(gx, expected[0]) <= 1e-10
    assert gap(gy, expected[1]) <= 1e-10


# ── where T × P is the gradient of a loss, it is the gradient of the value ──────────────────────────────


def smooth_batch(case: Case, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """A batch with no decision, and no kink of a similarity, close by."""
    n, m, d = case.shape
    for seed in range(200):
        x, y = embeddings(np.random.default_rng(seed), n, m, d, torch.float64)
        if case.similarity != "dot":
            x, y = 1.3 * x, 0.8 * y
        S, off = similarities(case.similarity, x, y), negatives_of(torch.empty(n, m), ids, ids)
        if not close_calls(case, S, off, within=1e-3).any() and (y - x[:, None]).abs().min() > 1e-4:
            return x.requires_grad_(), y.requires_grad_()
    raise AssertionError("no smooth batch found")


MINED: tuple[tuple[str, Params], ...] = (
    ("hardest", {}),
    ("semi-hard", {"margin": 0.6}),
    ("all", {}),
    ("all", {"average": False}),
    ("selective", {"eps": 0.3}),
    ("all", {"average": False, "pull": "once"}),
    ("soft", {"tau": 4.0}),
    ("soft", {"tau": 3.0, "normalise": "mean"}),
    ("soft", {"tau": 4.0, "over": "candidates"}),
)
every_loss = pytest.mark.parametrize(
    ("T", "T_params", "P", "P_params"),
    INTEGRABLE,
    ids=[f"{goal.T[T](**t)!r}-{goal.P[P](**p)!r}" for T, t, P, p in INTEGRABLE],
)
LOSSES = [(*term, *mined) for term in INTEGRABLE for mined in MINED if stays_integrable(term, *mined)]


@pytest.mark.parametrize("similarity", ["dot", "cosine", "order"])
@pytest.mark.parametrize(
    ("T", "T_params", "P", "P_params", "mining", "mining_params"),
    LOSSES,
    ids=[f"{goal.T[T](**t)!r}-{goal.P[P](**p)!r}-{MININGS[m](**q)!r}" for T, t, P, p, m, q in LOSSES],
)
def test_gradcheck(
    T: str, T_params: Params, P: str, P_params: Params, mining: str, mining_params: Params, similarity: str
) -> None:
    ids, weight = torch.tensor([1, 2, 1, 4, 5]), torch.tensor([1.0, 0.0, 2.5, 0.5, 1.0])
    case = Case(T, T_params, P, P_params, mining, mining_params, similarity, "mean", "-", (5, 5, 3))
    x, y = smooth_batch(case, ids)
    of_xy = functools.partial(goal.apply, similarity=similarity, ids=ids, weight=weight, **arguments(case))
    assert torch.autograd.gradcheck(of_xy, (x, y), rtol=1e-4)


@every_loss
def test_gradcheck_of_a_matrix(T: str, T_params: Params, P: str, P_params: Params) -> None:
    for mining, mining_params in MINED:
        if not stays_integrable((T, T_params, P, P_params), mining, mining_params):
            continue
        case = Case(T, T_params, P, P_params, mining, mining_params, "dot", "sum", "-", (4, 6, 3))
        S = similarities("dot", *smooth_batch(case, None)).detach().requires_grad_()
        of_S = functools.partial(goal.apply_similarity, **arguments(case))
        assert torch.autograd.gradcheck(of_S, (S,), rtol=1e-4)


# ── the incoming gradient ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("mining", MININGS)
def test_the_incoming_gradient_multiplies_and_calls_accumulate(mining: str, positives: str) -> None:
    ids = {} if positives == "pair" else {"ids": torch.arange(9) // 2, "y_ids": torch.arange(12) // 2}
    options: dict[str, Any] = {"mining": mining, "positives": positives, **ids}
    x, y = embeddings(np.random.default_rng(3), 9, 12, 6, torch.float64)
    x.requires_grad_(), y.requires_grad_()
    gx, gy, _ = goal.gradients(x, y, **options)
    for c in (-2.5, 0.0, 1e6):
        x.grad = y.grad = None
        (c * goal.apply(x, y, **options)).backward()
        assert gap(x.grad, c * gx) <= 1e-13
        assert gap(y.grad, c * gy) <= 1e-13
    x.grad = y.grad = None
    loss = goal.apply(x, y, **options)
    loss.backward(retain_graph=True)
    loss.backward()
    goal.apply(x, y, T="con", P="con", **options).backward()
    other, _, _ = goal.gradients(x, y, T="con", P="con", **options)
    assert gap(x.grad, 2 * gx + other) <= 1e-13


def test_it_is_one_term_of_a_larger_loss() -> None:
    x, y = embeddings(np.random.default_rng(4), 8, 8, 5, torch.float64)
    w = torch.eye(5, dtype=torch.float64, requires_grad=True)
    (0.5 * goal.apply(x @ w, y) + w.square().sum()).backward()
    gx, _, _ = goal.gradients(x, y)
    assert gap(w.grad, 0.5 * x.T @ gx + 2 * w.detach()) <= 1e-13


# ── the literature, written dense with ordinary autograd ────────────────────────────────────────────────


def sum_of_hinges(S: Tensor, margin: float) -> Tensor:
    """Kiros et al., 2014: Σ over all negative captions and all negative images."""
    off = ~torch.eye(len(S), dtype=torch.bool)
    pair = S.diagonal()
    return ((margin + S - pair[:, None]).relu() + (margin + S - pair).relu())[off].sum()


def max_of_hinges(S: Tensor, margin: float) -> Tensor:
    """Faghri et al., VSE++, eq. 6."""
    others = S.masked_fill(torch.eye(len(S), dtype=torch.bool), -torch.inf)
    pair = S.diagonal()
    return (margin + others.amax(1) - pair).relu().sum() + (margin + others.amax(0) - pair).relu().sum()


def t_selhn(S: Tensor, margin: float = 0.2, eps: float = 0.01) -> Tensor:
    """The mean hinge over all negatives where s⁺ and the hardest s⁻ are within eps, the hardest hinge elsewhere."""
    total = S.new_zeros(())
    for s in (S, S.T):
        for i, row in enumerate(s):
            negatives = torch.cat((row[:i], row[i + 1 :]))
            hinges = (margin + negatives - row[i]).relu()
            total = total + (hinges.mean() if (row[i] - negatives.max()).abs() < eps else hinges.max())
    return total / len(S)


def collapsing(seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows, some of whose positives are all but their hardest negatives."""
    x, y = embeddings(np.random.default_rng(seed), 20, 20, 6, torch.float64)
    y = y.clone()
    for copy, of, by in ((1, 0, 1e-3), (5, 4, 1e-3), (6, 4, -2e-3)):
        y[copy] = normalize(y[of] + by, dim=0)
    return x, y


HINGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "vse0": (lambda S: sum_of_hinges(S, 0.2), "dot"),
    "vse++": (lambda S: max_of_hinges(S, 0.2), "dot"),
    "t-selhn": (t_selhn, "dot"),
    "order0": (lambda S: sum_of_hinges(S, 0.05), "order"),
    "order++": (lambda S: max_of_hinges(S, 0.05), "order"),
}


@pytest.mark.parametrize("recipe", HINGES)
@pytest.mark.parametrize("seed", range(3))
def test_hinge_recipes_are_their_textbook_losses(recipe: str, seed: int) -> None:
    loss_of, similarity = HINGES[recipe]
    x, y = collapsing(seed)
    if similarity == "order":
        x, y = 1.2 * x.abs(), y.abs()
    x.requires_grad_(), y.requires_grad_()
    expected = loss_of(similarities(similarity, x, y))
    gx, gy = torch.autograd.grad(expected, (x, y))
    objective = goal.recipe(recipe)
    loss = objective(x, y)
    loss.backward()
    assert gap(loss.detach(), expected.detach()) <= 1e-12
    assert gap(x.grad, gx) <= 1e-12
    assert gap(y.grad, gy) <= 1e-12
    assert (objective.stats.fallback > 0) == (recipe == "t-selhn")
    assert objective.stats.fallback < 1


@pytest.mark.parametrize("mining", [mining for mining in MININGS if mining != "soft"])
def test_a_triplet_exactly_at_the_margin_has_no_gradient(mining: str) -> None:
    """The table's margins lie off its grid, so that float32 decides as float64 does; here the hinge is exactly 0."""
    S = np.array([[0.75, 0.5, 0.25], [0.5, 0.75, 0.5], [0.25, 0.5, 0.5]])
    params = {"margin": 0.6} if mining == "semi-hard" else {}  # a window with the margin in it
    case = Case("con", {"margin": 0.25}, "con", {}, mining, params, "dot", "sum", "none", (3, 3, 0))
    expected = oracle_similarity(S, **question(case))
    leaf = torch.from_numpy(S).requires_grad_()
    goal.apply_similarity(leaf, **arguments(case)).backward()
    assert (leaf.grad[0] == 0).all()
    assert gap(leaf.grad, expected.G) <= 1e-12


def test_the_hinges_of_a_matrix_are_their_textbook_losses() -> None:
    S = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (15, 15))).requires_grad_()
    for loss_of, mining in ((sum_of_hinges, goal.mining.all_negatives(average=False)), (max_of_hinges, "hardest")):
        expected = loss_of(S, 0.2)
        loss = goal.apply_similarity(S, T=goal.T.con(margin=0.2), P="con", mining=mining, reduction="sum")
        actual, true = (torch.autograd.grad(each, S)[0] for each in (loss, expected))
        assert gap(loss.detach(), expected.detach()) <= 1e-12
        assert gap(actual, true) <= 1e-12


def deviance(S: Tensor) -> Tensor:
    """Binomial deviance of the pairs and of each anchor's hardest negative, α = 2, β = 10, λ = ½."""
    others = S.masked_fill(torch.eye(len(S), dtype=torch.bool), -torch.inf)
    positive = (1 + (-2 * (S.diagonal() - 0.5)).exp()).log() / 2
    negative = [(1 + (10 * (hardest - 0.5)).exp()).log() / 10 for hardest in (others.amax(0), others.amax(1))]
    return (2 * positive + negative[0] + negative[1]).mean()


def nca(S: Tensor) -> Tensor:
    """−log of the share of the pair among itself and the hardest negative, τ = 10."""
    others = S.masked_fill(torch.eye(len(S), dtype=torch.bool), -torch.inf)
    pair = (10 * S.diagonal()).exp()
    shares = [pair / (pair + (10 * hardest).exp()) for hardest in (others.amax(0), others.amax(1))]
    return -(shares[0].log() + shares[1].log()).mean() / 10


def circle(S: Tensor) -> Tensor:
    """log(1 + e^{τ[(s⁻)² − m²]} e^{τ[(1 − s⁺)² − (1 − m)²]}), m = ½, τ = 10, the hardest negative; over 2τ."""
    others = S.masked_fill(torch.eye(len(S), dtype=torch.bool), -torch.inf)
    pull = (10 * ((1 - S.diagonal()) ** 2 - 0.25)).exp()
    pushes = [(10 * (hardest**2 - 0.25)).exp() for hardest in (others.amax(0), others.amax(1))]
    return ((1 + pull * pushes[0]).log() + (1 + pull * pushes[1]).log()).mean() / 20


@pytest.mark.parametrize(("recipe", "loss_of"), [("binomial-deviance", deviance), ("nca", nca), ("circle", circle)])
def test_smooth_recipes_are_their_textbook_losses(recipe: str, loss_of: Callable[[Tensor], Tensor]) -> None:
    x, y = embeddings(np.random.default_rng(5), 12, 12, 6, torch.float64)
    x.requires_grad_(), y.requires_grad_()
    expected = loss_of(x @ y.T)
    true = torch.autograd.grad(expected, (x, y))
    loss = goal.recipe(recipe)(x, y)
    assert gap(loss.detach(), expected.detach()) <= 1e-12
    for actual, of in zip(torch.autograd.grad(loss, (x, y)), true, strict=True):
        assert gap(actual, of) <= 1e-12


# ── recipes ─────────────────────────────────────────────────────────────────────────────────────────────

SUM_ALL = {"mining": goal.mining.all_negatives(average=False), "reduction": "sum"}
RECIPES: dict[str, dict[str, Any]] = {
    "vse0": {"T": goal.T.con(margin=0.2), "P": "con", **SUM_ALL},
    "vse++": {"T": goal.T.con(margin=0.2), "P": "con", "mining": "hardest", "reduction": "sum"},
    "t-selhn": {"T": goal.T.con(margin=0.2), "P": "con", "mining": "selective", "reduction": "mean"},
    "order0": {"T": goal.T.con(margin=0.05), "P": "con", **SUM_ALL, "similarity": "order"},
    "order++": {"T": goal.T.con(margin=0.05), "P": "con", "reduction": "sum", "similarity": "order"},
    "circle": {"T": "cir", "P": "lin"},
    "nca": {"T": "nca", "P": "con"},
    "binomial-deviance": {"T": "con", "P": "sig"},
    "multi-similarity": {"T": "con", "P": "sig-ms"},
    "goal": {"T": "cir", "P": "sig-ms"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_combination_it_claims(recipe: str) -> None:
    x, y = embeddings(np.random.default_rng(6), 10, 10, 4, torch.float32)
    x.requires_grad_(), y.requires_grad_()
    ids, weight = torch.arange(10) // 2, torch.arange(10.0)
    loss = goal.recipe(recipe)(x, y, ids=ids, weight=weight)
    expected = goal.apply(x, y, ids=ids, weight=weight, **RECIPES[recipe])
    assert torch.equal(loss, expected)
    for actual, of in zip(*(torch.autograd.grad(each, (x, y)) for each in (loss, expected)), strict=True):
        assert torch.equal(actual, of)
        assert actual.any()


def test_every_recipe_is_accounted_for_and_takes_overrides() -> None:
    assert set(goal.recipes()) == {*RECIPES, *SOFT, "supcon", "soft-targets", "siglip"}
    x, y = embeddings(np.random.default_rng(6), 10, 10, 4, torch.float32)
    changed = goal.recipe("vse++", T=goal.T.con(margin=0.5), reduction="mean")
    assert torch.equal(changed(x, y), goal.apply(x, y, T=goal.T.con(margin=0.5), P="con"))
    assert not torch.equal(changed(x, y), goal.recipe("vse++", reduction="mean")(x, y))


def test_defaults() -> None:
    x, y = embeddings(np.random.default_rng(7), 10, 10, 4, torch.float32)
    named = {"T": goal.T.cir(tau=10.0), "P": goal.P.sig_ms(alpha=2.0, beta=10.0, lam=0.5, self_term=False)}
    whole = {**named, "mining": goal.mining.hardest(), "reduction": "mean", "similarity": "dot", "impl": "auto"}
    expected = goal.gradients(x, y, **whole)
    for actual in (goal.gradients(x, y), goal.gradients(x, y, "cir", "sig_ms"), goal.gradients(x, y, impl="torch")):
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
    assert torch.equal(goal.Objective()(x, y), goal.apply(x, y, **whole))
    for name, objects in {
        "semi-hard": goal.mining.semi_hard(margin=0.2),
        "all": goal.mining.all_negatives(average=True),
        "selective": goal.mining.selective(eps=0.01),
    }.items():
        assert torch.equal(goal.gradients(x, y, mining=name)[0], goal.gradients(x, y, mining=objects)[0])


def log_sum(h: Tensor, off: Tensor) -> Tensor:
    """log Σ e^h over each row's negatives."""
    return torch.where(off, h, -torch.inf).logsumexp(1)


def cross_entropy(s_pos: Tensor, s: Tensor, off: Tensor, tau: float) -> Tensor:
    """−log of the share of the pair among itself and its negatives."""
    return torch.logaddexp(tau * s_pos, log_sum(tau * s, off)) - tau * s_pos


def hardness_weighted(s_pos: Tensor, s: Tensor, off: Tensor, tau: float, alpha: float) -> Tensor:
    """Lan et al., LLaVE: the same with e^{αs} before each negative's exponential, a constant of the gradient."""
    weighted = tau * s + alpha * s.detach()
    return torch.logaddexp(tau * s_pos, log_sum(weighted, off)) - tau * s_pos


def circle_loss(s_pos: Tensor, s: Tensor, off: Tensor, tau: float) -> Tensor:
    """Sun et al., eq. 6 with m = ½: log(1 + Σ e^{τ(s² − m²)} · e^{τ((1 − s⁺)² − (1 − m)²)})."""
    exponent = log_sum(tau * (s**2 - 0.25), off) + tau * ((1 - s_pos) ** 2 - 0.25)
    return torch.logaddexp(torch.zeros_like(exponent), exponent)


# recipe, its numbers, the published loss of an anchor from (s⁺, s, its negatives, …), its mean over the directions?
SOFT: dict[str, tuple[Params, Callable[..., Tensor], bool]] = {
    "infonce": ({"tau": 12.0}, cross_entropy, True),
    "dcl": ({"tau": 12.0}, lambda s_pos, s, off, tau: log_sum(tau * s, off) - tau * s_pos, True),
    "hardness-infonce": ({"tau": 9.0, "alpha": 4.0}, hardness_weighted, True),
    "circle-loss": ({"tau": 8.0}, circle_loss, False),
    "vse++-soft": (
        {"margin": 0.4, "tau": 15.0},
        lambda s_pos, s, off, margin, tau: (margin + log_sum(tau * s, off) / tau - s_pos).relu(),
        False,
    ),
}


@pytest.mark.parametrize("directions", ["both", "x→y", "y→x"])
@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("recipe", SOFT)
def test_soft_recipes_are_their_published_losses(recipe: str, with_ids: bool, n: int, m: int, directions: str) -> None:
    rng = np.random.default_rng(8)
    x, y = embeddings(rng, n, m, 4, torch.float64)
    x.requires_grad_(), y.requires_grad_()
    ids, y_ids = (torch.from_numpy(np.arange(size) * 2 % 7 // 2) if with_ids else None for size in (n, m))
    params, loss_of, averages = SOFT[recipe]
    k, S, off = min(n, m), x @ y.T, negatives_of(torch.empty(n, m), ids, y_ids)
    views = {"x→y": (S[:k], off[:k]), "y→x": (S.T[:k], off.T[:k])}
    views = {one: views[one] for one in (views if directions == "both" else [directions])}
    s_pos = S.diagonal()
    losses = torch.stack([loss_of(s_pos, s, among, **params) for s, among in views.values()])
    expected = losses.sum(1).mean() if averages else losses.sum()
    objective = goal.recipe(recipe, **params, directions=directions, reduction="sum")
    loss = objective(x, y, ids, y_ids)
    assert gap(loss.detach(), expected.detach()) <= 1e-12
    true = torch.autograd.grad(expected, (x, y))
    for actual, of in zip(torch.autograd.grad(loss, (x, y)), true, strict=True):
        assert gap(actual, of) <= 1e-12


@pytest.mark.parametrize(("n", "m"), [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_siglip(n: int, m: int, with_ids: bool) -> None:
    rng = np.random.default_rng(9)
    x, y = embeddings(rng, n, m, 4, torch.float64)
    ids, y_ids = (torch.from_numpy(rng.integers(0, 4, size)) if with_ids else None for size in (n, m))
    pair, off = torch.eye(n, m, dtype=torch.bool), negatives_of(torch.empty(n, m), ids, y_ids)
    logits = 5.0 * x @ y.T - 3.0
    expected = ((1 + (-logits[pair]).exp()).log().sum() + (1 + logits[off].exp()).log().sum()) / min(n, m)
    module = goal.recipe("siglip", tau=5.0, bias=-3.0).double()
    loss = module(x, y, ids, y_ids)
    assert gap(loss.detach(), expected) <= 1e-6  # its parameters were float32
    loss.backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None and p.grad != 0} == {"log_tau", "bias"}
