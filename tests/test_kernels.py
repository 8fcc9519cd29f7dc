"""The kernels, in Triton's interpreter, against the oracle: every T × P × mining, precision, layout and tiling.

The interpreter runs the kernels as written, on NumPy, one program after another: it shows wrong indices, masks, sums
and merges. It does not show races, and it ignores tf32, so that `tf32` is held to float32 here. Tiles of a few rows
stand for large batches: `in_tiles` makes many of them, and with HELD = 1 many chunks.
"""

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracle import Result, oracle
from table import DIRECTIONS, MINING, SCALES, TERMS_P, TERMS_T, Case, _families
from test_contract import MININGS, arguments, close_calls, embeddings, gap, negatives_of, question, similarities
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import goal
from goal.engine import backend as ops
from goal.engine.backend import WEIGHED, Backend
from goal.engine.operators import Work, pack
from goal.engine.settings import settings
from goal.engine.statistics import Request, Statistics
from goal.engine.types import Block, Dense, Masks, Mined
from goal.kernels import launch
from goal.similarity import Dot

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of NaN and inf that a kernel masks
]

EPS = torch.finfo(torch.float32).eps
# what becoming 16 bit loses: half of the last place, and in the interpreter, which cuts bfloat16 off, all of it
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, so that whoever reads before writing is seen; and programs are few and large."""
    monkeypatch.setattr(launch, "ROWS", 64)
    monkeypatch.setitem(launch.SINGLE, "ROWS", 64)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def in_tiles(monkeypatch: pytest.MonkeyPatch, height: int, width: int, chunked: bool = False) -> None:
    """S in tiles of this size, a row of tiles at a time if `chunked`."""
    cut = launch.Tiling(height, width, 16, 4, 2)
    monkeypatch.setattr(launch, "tiling", lambda *_: cut)
    monkeypatch.setattr(launch, "dense_tiling", lambda *_: cut)
    if chunked:
        monkeypatch.setattr(launch, "HELD", 1)


# ── inputs ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Inputs(NamedTuple):
    x: Tensor  # (N, D)
    y: Tensor  # (M, D)
    ids: Tensor | None = None  # (N,)
    y_ids: Tensor | None = None  # (M,)
    weight: Tensor | None = None  # (K,)

    @property
    def off(self) -> Tensor:
        """(N, M) where S holds a negative."""
        return negatives_of(self.x @ self.y.T, self.ids, self.y_ids)


def identities(rng: np.random.Generator, name: str, n: int, m: int) -> tuple[Tensor | None, Tensor | None]:
    """Each side's ids: none, groups of five, or further rows that share theirs with pairs."""
    if name == "none":
        return None, None
    known = np.arange(min(n, m))
    fives, extra = (
        [np.arange(size) // 5 for size in (n, m)],
        [np.concatenate([known, rng.integers(0, 2 * len(known), size - len(known))]) for size in (n, m)],
    )
    ids, y_ids = (torch.from_numpy(side) + 2**60 - 2 for side in (fives if name == "fives" else extra))
    return ids, y_ids  # apart only in int64


def on_a_grid(
    seed: int, n: int, m: int, d: int, ids: str = "none", *, step: float = 0.25, shift: float = 0.0, hub: bool = False
) -> Inputs:
    """Exact products, full of ties: equal rows, equal pairs. shift: of every similarity; hub: one y above the rest."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(-2, 3, (max(n, m) // 3 + 2, d)) * step
    x, y = (pool[rng.integers(len(pool), size=size)] for size in (n, m))
    k = min(n, m)
    y[:k:2] = x[:k:2]
    x[:, 0], y[:, 0] = 0.5, 2 * shift
    if hub:
        y[rng.integers(m), 0] = 4
    return Inputs(*(torch.from_numpy(side).float() for side in (x, y)), *identities(rng, ids, n, m))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other memory, whose gaps hold NaN."""
    gaps = torch.full_like(x, torch.nan)
    match layout:
        case "transposed":
            return x.T.contiguous().T
        case "columns":
            return torch.stack((x, gaps), 2)[..., 0]
        case "rows":
            return torch.cat((gaps, x, gaps), 1)[:, x.shape[1] : 2 * x.shape[1]]
    return x.contiguous()


LAYOUTS = ("contiguous", "transposed", "columns", "rows")
IDS = ("none", "fives", "extra")


def truth(case: Case, inputs: Inputs) -> Result:
    arrays = [None if one is None else one.detach().double().numpy() for one in (*inputs[:2], inputs.weight)]
    ids = [None if one is None else one.numpy() for one in (inputs.ids, inputs.y_ids)]
    x, y, weight = arrays
    return oracle(
        x, y, similarity=case.similarity, ids=ids[0], y_ids=ids[1], weight=weight, **question(case)
    )  # fmt: skip


def regret(inputs: Inputs, index: Tensor, S: Tensor) -> Tensor:
    """(2, K) how far below the hardest negative the chosen one is; 0 where there is none. S: float64."""
    k = min(S.shape)
    found = []
    for s, off, at in ((S, inputs.off, index[0]), (S.T, inputs.off.T, index[1])):
        s = torch.where(off, s, -torch.inf)[:k]
        best, has = s.amax(1), off[:k].any(1)
        assert torch.equal(at >= 0, has)
        chosen = s.gather(1, at.clamp(min=0)[:, None])[:, 0]
        found.append(torch.where(has, best - chosen, 0.0))
    return torch.stack(found)


def reach(inputs: Inputs) -> float:
    """max ‖x‖ · max ‖y‖."""
    longest = [side.double().norm(dim=1).max().item() for side in inputs[:2]]
    return longest[0] * longest[1]


def worst(found: Any, true: Any) -> float:
    """The larger of both gradients' errors, in units of their largest entries."""
    return max(gap(one, of) for one, of in zip(found, true, strict=True))


def exact_as(found: Any, eager: Any, true: Any, roundings: float = 4.0, most: float = 2e-5) -> None:
    """Twice the error of the eager objective at most, and a few roundings; its error is small itself."""
    yardstick = worst(eager, true)
    assert yardstick <= most
    assert worst(found, true) <= 2 * yardstick + roundings * EPS


def objective(case: Case, impl: str, inputs: Inputs, **options: Any) -> tuple[list[Tensor], Tensor, goal.Objective]:
    """Both gradients, the value, and who knows the stats."""
    x, y = (side.detach().requires_grad_() for side in inputs[:2])
    module = goal.Objective(**arguments(case), similarity=case.similarity, impl=impl, **options)
    loss = module(x, y, *inputs[2:])
    loss.backward()
    assert x.grad is not None
    assert y.grad is not None
    return [x.grad, y.grad], loss.detach(), module


# ── every T × P × mining ────────────────────────────────────────────────────────────────────────────────────────────

SIZES = (  # (N, M, D)
    (1, 1, 7),
    (63, 63, 24),
    (63, 127, 20),
    (63, 1, 9),
    (63, 40, 33),
    (1, 63, 5),
    (127, 127, 20),
    (63, 63, 130),
    (127, 63, 12),
    (40, 63, 41),
    (257, 63, 12),
    (63, 63, 7),
    (63, 257, 10),
)
TILES = (None, (32, 64, False), (64, 32, True), (32, 32, True))  # as they are, or those of `in_tiles`


SUPPORTED = tuple(mining for mining in MININGS if mining != "soft")  # by kernels


class Spread(NamedTuple):
    """A case, and everything that its name does not tell."""

    case: Case
    number: int
    exact: bool  # on the grid, where nothing has to be left out; else on the unit sphere
    tiles: tuple[int, int, bool] | None
    layouts: tuple[str, str]  # of x and y
    weighed: int  # pairs up to which the kernel weighs, and not the engine


def every_objective() -> Iterator[Spread]:
    """Each T × P × mining once; variants, sizes, layouts and tiles are spread over them."""
    mined = tuple(one for one in MINING if one[0] in SUPPORTED)
    combinations = itertools.product(*(list(enumerate(_families(terms))) for terms in (TERMS_T, TERMS_P, mined)))
    for number, parts in enumerate(combinations):
        choose = random.Random(f"kernels {number}").choice
        terms = [part for _, variants in parts for part in choose(variants)]
        exact = sum(at for at, _ in parts) % 2 == 0
        sizes = SIZES if exact else [size for size in SIZES if min(size) > 1]
        similarity = "dot" if exact else choose(("dot", "cosine"))
        case = Case(*terms, similarity, choose(("mean", "sum")), choose(IDS), sizes[number % len(sizes)])
        tiles, layouts, weighed = choose(TILES), (choose(LAYOUTS), choose(LAYOUTS)), choose((WEIGHED, 0))
        case = case._replace(scale=choose(SCALES), directions=choose(DIRECTIONS))
        yield Spread(case, number, exact, tiles, layouts, weighed)


OBJECTIVES = {of.case.id: of for of in every_objective()}


def random_inputs(case: Case, number: int) -> Inputs:
    """Similar pairs on the unit sphere (of any length for the cosine). Anchors with an open decision weigh nothing."""
    rng = np.random.default_rng(number)
    n, m, d = case.shape
    x, y = embeddings(rng, n, m, d, torch.float32)
    if case.similarity == "cosine":
        x, y = (side * torch.from_numpy(rng.uniform(0.3, 2.0, (len(side), 1))).float() for side in (x, y))
    inputs = Inputs(x, y, *identities(rng, case.ids_case, n, m))
    S = similarities(case.similarity, x.double(), y.double())
    left_out = close_calls(case, S, inputs.off, within=32 * EPS)
    assert left_out.double().mean() <= 0.06
    weight = torch.from_numpy(rng.choice([0.5, 1.0, 3.0], len(left_out))).float()
    return inputs._replace(weight=weight * ~left_out)


@pytest.mark.parametrize("of", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective(of: Spread, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (n, m, d) = of.case, of.case.shape
    if of.exact:
        inputs = on_a_grid(of.number, n, m, d, case.ids_case, hub=of.number % 4 == 0)
        if of.number % 3 == 0:
            inputs = inputs._replace(weight=torch.arange(min(n, m)) % 4 / 2)
    else:
        inputs = random_inputs(case, of.number)
    expected = truth(case, inputs)
    monkeypatch.setattr(ops, "WEIGHED", of.weighed)
    if of.tiles is not None:
        in_tiles(monkeypatch, *of.tiles)
    x, y = (laid_out(side, layout) for side, layout in zip(inputs[:2], of.layouts, strict=True))
    grads, value, module = objective(case, "triton", inputs._replace(x=x, y=y), precision="exact")
    eager, eager_value, _ = objective(case, "torch", inputs)
    roundings = 4.0
    if of.exact and case.P == "sig-ms":  # whose exponents are exact for the yardstick alone
        roundings += case.P_params.get("beta", 10.0) * reach(inputs) / 8
    exact_as(grads, eager, (expected.gx, expected.gy), roundings)
    size = 1 + reach(inputs)  # of the value's terms
    if case.reduction == "sum":
        size *= 1 + (min(n, m) if inputs.weight is None else inputs.weight.sum().item())
    if case.mining_params.get("average") is False:
        size *= max(n, m)
    error, yardstick = (abs(one.item() - expected.value) for one in (value, eager_value))
    assert yardstick <= 2e-5 * size
    assert error <= 2 * yardstick + 8 * EPS * size
    if case.mining in ("hardest", "selective"):  # all negatives mine none, and those of semi-hard mining are others
        stats = module.stats
        has = torch.from_numpy(expected.index >= 0)
        S = similarities(case.similarity, *(side.double() for side in inputs[:2]))
        bound = 1.0 if case.similarity == "cosine" else reach(inputs)
        assert gap(stats.s_neg[has], torch.from_numpy(expected.s_neg)[has]) <= 8 * EPS
        assert regret(inputs, stats.index, S).max() <= (0 if of.exact else 16 * EPS * bound)
        if of.exact:
            assert np.array_equal(stats.index.numpy(), expected.index)


def test_every_name_is_met_in_every_way() -> None:
    """Each T, P and mining comes with exact and with random inputs, each reduction, ids, tiling and layout."""
    every = OBJECTIVES.values()
    assert len(every) == 4 * 5 * 4
    for field in ("T", "P", "mining"):
        for name in {getattr(of.case, field) for of in every}:
            some = [of for of in every if getattr(of.case, field) == name]
            assert {of.exact for of in some} == {True, False}, name
            assert {of.case.reduction for of in some} == {"mean", "sum"}, name
            assert {of.case.ids_case for of in some} == set(IDS), name
            assert {of.tiles for of in some} == set(TILES), name
            assert {of.weighed for of in some} == {WEIGHED, 0}, name
            assert {layout for of in some for layout in of.layouts} == set(LAYOUTS), name
    assert {of.case.shape for of in every} == set(SIZES)
    assert {of.case.similarity for of in every} == {"dot", "cosine"}


def test_tiles_and_programs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """257 pairs with the sizes that are shipped."""
    monkeypatch.setattr(launch, "ROWS", 16)
    monkeypatch.setitem(launch.SINGLE, "ROWS", 8)
    case = Case("cir", {}, "sig-ms", {}, "hardest", {}, "dot", "mean", "fives", (257, 257, 12))
    inputs = random_inputs(case, 0)
    expected = truth(case, inputs)
    grads, _, module = objective(case, "triton", inputs, precision="exact")
    eager, _, _ = objective(case, "torch", inputs)
    exact_as(grads, eager, (expected.gx, expected.gy))
    assert regret(inputs, module.stats.index, inputs.x.double() @ inputs.y.double().T).max() <= 16 * EPS


# ── ties ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def mined(inputs: Inputs, request: Request, precision: str = "exact") -> Statistics:
    pairs = launch.pair(inputs.x, inputs.y, min(len(inputs.x), len(inputs.y)))
    n, m = len(inputs.x), len(inputs.y)
    block = Block(inputs.x, inputs.y, Masks(n, m, (n, m), ids=inputs.ids, y_ids=inputs.y_ids))
    return launch.statistics(block, pairs, request, precision)


def true_statistics(inputs: Inputs, request: Request) -> Statistics:
    """The eager path's, in float64."""
    return eager_statistics(inputs.x.double(), inputs.y.double(), request, inputs.ids, inputs.y_ids)


def eager_statistics(x: Tensor, y: Tensor, request: Request, ids: Any = None, y_ids: Any = None) -> Statistics:
    n, m = len(x), len(y)
    backend = Backend("torch", "exact", Dot())
    block = Block(x, y, Masks(n, m, (n, m), ids=ids, y_ids=y_ids))
    return backend.statistics(block, backend.pair(x, y, min(n, m)), request)


SPLITS = {  # one tile, across tiles (more of them than candidates that are kept), across chunks
    "one tile": (128, 128, False),
    "rows of tiles": (16, 128, False),
    "columns of tiles": (128, 16, False),
    "tiles": (32, 32, False),
    "chunks": (32, 64, True),
}


@pytest.mark.parametrize("split", SPLITS)
def test_ties_go_to_the_lowest_index(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all similarities are negative."""
    in_tiles(monkeypatch, *SPLITS[split])
    for number, shift in enumerate((0.0, -8.0)):
        n, m, d = ((90, 82, 3), (82, 90, 9))[number]
        inputs = on_a_grid(number, n, m, d, ids=("none", "extra")[number], shift=shift)
        request = Request(semi_hard=0.6)
        found, true = mined(inputs, request), true_statistics(inputs, request)
        has = true.s_neg != -torch.inf
        assert torch.equal(found.s_neg.double(), true.s_neg)
        assert torch.equal(found.negative[has], true.negative[has])
        has = true.semi != -torch.inf
        assert 0 < has.sum() < has.numel()
        assert torch.equal(found.semi.double(), true.semi)
        assert torch.equal(found.semi_negative[has], true.semi_negative[has])
        assert shift == 0 or true.s_neg.max() < 0


@pytest.mark.parametrize("split", ["one tile", "chunks"])
def test_all_rows_are_equal(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_tiles(monkeypatch, *SPLITS[split])
    for sign in (1.0, -1.0):
        x = torch.full((82, 5), 0.5)
        found = mined(Inputs(x, sign * x), Request(None, True, 10.0))
        assert found.negative.tolist() == [[1] + [0] * 81] * 2
        assert (found.s_neg == sign * 1.25).all()
        assert torch.equal(found.s_neg[0], found.s_pos)
        assert (found.r_neg_lin == 0).all()
        assert gap(found.r_neg_exp, torch.ones(2, 82)) <= 4 * EPS


# ── the statistics of every request ─────────────────────────────────────────────────────────────────────────────────

REQUESTS = [Request(*of) for of in itertools.product((None, 0.3), (False, True), (None, 10.0))]


def same_statistics(found: Statistics, true: Statistics, request: Request, tolerance: float) -> None:
    """Mined similarities and R⁻ within a tolerance (of R⁻ relative to its largest), and nothing unasked for."""
    for name, asked in (("semi", request.semi_hard), ("r_neg_lin", request.lin or None), ("r_neg_exp", request.beta)):
        assert (getattr(found, name) is None) == (asked is None)
    for name in ("s_neg", "semi"):
        if (one := getattr(found, name)) is not None:
            of = getattr(true, name)
            has = of != -torch.inf
            assert torch.equal(one == -torch.inf, ~has)
            assert (one[has] - of[has]).abs().max() <= 4 * EPS * of[has].abs().max()
    for name in ("r_neg_lin", "r_neg_exp"):
        if (one := getattr(found, name)) is not None:
            assert gap(one, getattr(true, name)) <= tolerance, name


@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=map(str, REQUESTS))
@pytest.mark.parametrize("chunked", [False, True])
def test_statistics_of_every_request(number: int, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    split = "chunks" if chunked else ("rows of tiles", "columns of tiles")[(number + number // 2) % 2]
    in_tiles(monkeypatch, *SPLITS[split])
    request = REQUESTS[number]
    n, m, d = ((90, 63, 6), (63, 82, 20))[number % 2]
    inputs = on_a_grid(number, n, m, d, IDS[number % 3])
    found, true = mined(inputs, request), true_statistics(inputs, request)
    has = true.s_neg != -torch.inf
    assert torch.equal(found.negative[has], true.negative[has])
    same_statistics(found, true, request, 16 * EPS)


@pytest.mark.parametrize("split", ["one tile", "rows of tiles"])
@pytest.mark.parametrize(
    ("d", "precision"), [(2, "exact"), (7, "exact"), (24, "exact"), (130, "exact"), (24, "fast"), (130, "fast")]
)
def test_relative_similarities_are_as_exact_as_eager(
    d: int, precision: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the unit sphere, of any dimension; at anchors for which no decision is open."""
    monkeypatch.setattr(launch, "SMALL", 0)
    in_tiles(monkeypatch, *SPLITS[split])
    fast, k = precision == "fast", 40
    x, y = embeddings(np.random.default_rng(d), 90, k, d, torch.float32)
    inputs, request = Inputs(x, y), Request(None, True, 10.0)
    S, within = x.double() @ y.double().T, 2**-11 if fast else 32 * EPS
    clear = torch.stack([
        ~close_calls(Case("con", {}, P, {}, "hardest", {}, "dot", "sum", "none", (90, k, d)), S, inputs.off, within)
        for P in ("lin-ms", "sig-ms")
    ]).all(0)  # fmt: skip
    assert clear.double().mean() >= (0.3 if fast else 0.8)
    found, true = mined(inputs, request, precision), true_statistics(inputs, request)
    if fast:
        x, y = x.half().float(), y.half().float()
    eager = eager_statistics(x, y, request)
    for name in ("r_neg_lin", "r_neg_exp"):
        of = getattr(true, name)[:, clear]
        error, yardstick = (gap(getattr(one, name)[:, clear], of) for one in (found, eager))
        assert yardstick <= (2**-6 if fast else 2e-5), name
        assert error <= 2 * yardstick + 4 * EPS, name


# ── precision ───────────────────────────────────────────────────────────────────────────────────────────────────────

SPREAD = [
    ("con", {"margin": 0.2}, "con", {}, "hardest", {}),
    ("nca", {}, "lin", {}, "all", {}),
    ("cir", {}, "sig-ms", {}, "hardest", {}),
    ("con", {}, "lin-ms", {}, "selective", {"eps": 0.3}),
    ("nca", {"tau": 4.0}, "sig", {}, "semi-hard", {"margin": 0.6}),
    ("cir", {}, "con", {}, "all", {"average": False}),
]
spread = pytest.mark.parametrize("terms", SPREAD, ids=lambda terms: f"{terms[0]}-{terms[2]}-{terms[4]}")


def clear_batch(case: Case, dtype: torch.dtype, within: float, most: float) -> Inputs:
    """Unit rows of a dtype, as float32; anchors with a decision `within` some error weigh nothing, `most` of them."""
    n, m, d = case.shape
    x, y = (side.float() for side in embeddings(np.random.default_rng(11), n, m, d, dtype))
    left_out = close_calls(case, x.double() @ y.double().T, negatives_of(x @ y.T, None, None), within)
    assert left_out.double().mean() <= most
    return Inputs(x, y, weight=(~left_out).float())


@pytest.mark.parametrize("small", [False, True])
@spread
def test_fast_is_as_exact_as_inputs_in_float16(terms: Any, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SMALL", 0)
    if small:
        in_tiles(monkeypatch, 32, 32, chunked=True)
    case = Case(*terms, "dot", "mean", "none", (40, 33, 24))
    inputs = clear_batch(case, torch.float32, 2**-11, most=0.35)
    expected = truth(case, inputs)
    grads, value, _ = objective(case, "triton", inputs)
    rounded = inputs._replace(x=inputs.x.half().float(), y=inputs.y.half().float())
    eager, eager_value, _ = objective(case, "torch", rounded)
    exact_as(grads, eager, (expected.gx, expected.gy), most=2**-7)
    error, yardstick = (abs(one.item() - expected.value) for one in (value, eager_value))
    assert error <= 2 * yardstick + 2**-12  # a yardstick that is one number may be right by chance
    assert grads[0].dtype == torch.float32


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
@pytest.mark.parametrize("mining", ["hardest", "all"])
def test_each_gradient_has_the_dtype_of_its_input(mining: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs = on_a_grid(0, 20, 30, 9, step=0.125)
    x, y = (side.to(dtype) for side, dtype in zip(inputs[:2], dtypes, strict=True))
    found = goal.gradients(x, y, "nca", "lin", mining=mining, impl="triton", precision="exact")
    true = goal.gradients(x.double(), y.double(), "nca", "lin", mining=mining)
    for one, of, dtype in zip(found[:2], true[:2], dtypes, strict=True):
        assert one.dtype == dtype
        assert gap(one, of) <= max(torch.finfo(dtype).eps, 1e-6)


@spread
def test_tf32_is_as_exact_as_float32_in_the_interpreter(terms: Any) -> None:
    """Which has no tf32: this is about the tiles and the candidates of that mode, not about its rounding."""
    case = Case(*terms, "dot", "mean", "none", (40, 33, 24))
    inputs = clear_batch(case, torch.float32, 2**-11, most=0.35)
    expected = truth(case, inputs)
    eager, _, _ = objective(case, "torch", inputs)
    # small batches of "fast", the default, are scanned in tf32, too
    grads, _, _ = objective(case, "triton", inputs, **({"precision": "tf32"} if case.T == "con" else {}))
    exact_as(grads, eager, (expected.gx, expected.gy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@spread
def test_16_bit_inputs_lose_the_rounding_of_what_is_16_bit(terms: Any, dtype: torch.dtype) -> None:
    """The gradient, and in dense objectives the tiles of G; the inputs are exact."""
    case = Case(*terms, "dot", "mean", "none", (40, 33, 24))
    inputs = clear_batch(case, dtype, 16 * EPS, most=0.06)
    expected = truth(case, inputs)
    grads, value, _ = objective(case, "triton", inputs._replace(x=inputs.x.to(dtype), y=inputs.y.to(dtype)))
    S = torch.from_numpy(expected.G).abs()
    carried = S @ inputs.y.double().abs(), S.T @ inputs.x.double().abs()  # what a rounding of every entry could do
    dense = case.mining in ("all", "selective")
    for one, of, most in zip(grads, (expected.gx, expected.gy), carried, strict=True):
        assert one.dtype == dtype
        true = torch.from_numpy(of)
        rounding = ROUNDING[dtype] * (true.abs() + dense * most) + torch.finfo(dtype).tiny
        assert ((one.double() - true).abs() <= rounding + 16 * EPS * true.abs().max()).all()
    assert value.dtype == torch.float32
    assert abs(value.item() - expected.value) <= 16 * EPS * max(1, abs(expected.value))


ARITHMETICS: dict[str, tuple[torch.dtype, str]] = {
    "exact": (torch.float32, "exact"),
    "tf32": (torch.float32, "tf32"),
    "fast": (torch.float32, "fast"),
    "bfloat16": (torch.bfloat16, "fast"),
    "float16": (torch.float16, "fast"),
}
every_arithmetic = pytest.mark.parametrize(("dtype", "precision"), ARITHMETICS.values(), ids=ARITHMETICS)


def collapsed(rng: np.random.Generator, n: int, d: int, spread: float) -> Tensor:
    """Unit rows around one direction: similarities within spread² of each other, below 1."""
    return torch.nn.functional.normalize(torch.from_numpy(1 + spread * rng.normal(size=(n, d))), dim=1).float()


@every_arithmetic
@pytest.mark.parametrize("width", [0.05, 1.0])
def test_mined_similarities_are_exact(
    width: float, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the scan is computed in, s⁻ is the similarity of that pair in float32, and its regret is bounded."""
    monkeypatch.setattr(launch, "SMALL", 0)
    in_tiles(monkeypatch, 64, 16)
    rng = np.random.default_rng(5)
    x, y = (collapsed(rng, size, 24, width).to(dtype) for size in (63, 70))
    inputs = Inputs(x, y)
    S = x.double() @ y.double().T
    found = mined(inputs, Request(semi_hard=0.3), precision)
    k = 63
    for s, index in ((found.s_neg, found.negative), (found.semi, found.semi_negative)):
        has = s != -torch.inf
        chosen = torch.stack((S[:k].gather(1, index[0][:, None]), S.T[:k].gather(1, index[1][:, None])))[..., 0]
        assert has.any()
        assert (s[has] - chosen[has]).abs().max() <= 4 * EPS * reach(inputs)
    below = (found.s_pos - found.semi)[has]
    error = (2**-9 if (precision, dtype) == ("fast", torch.float32) else 2**-17) * reach(inputs)
    assert below.min() > -error
    assert below.max() < 0.3 + error
    # float16 rounds either side by half of 2⁻¹⁰; two may lie a unit of the scan's keys apart, which is 2⁻¹⁹ at most
    assert regret(Inputs(x.double(), y.double()), found.negative, S).max() <= error


def test_the_best_of_several_tiles_is_found_by_its_exact_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four candidates, each in a tile of its own, closer than float16 tells apart: no regret at all."""
    monkeypatch.setattr(launch, "SMALL", 0)
    in_tiles(monkeypatch, 64, 16)
    rng = np.random.default_rng(0)
    x, y = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(64, 24))), dim=1) for _ in range(2))
    for anchor in range(8):  # of row 32 + anchor of x: rows 8 + anchor, 24 + anchor, … of y are nearly that row
        for tile, step in enumerate(rng.permutation(4)):
            noise = 1e-4 * torch.from_numpy(rng.normal(size=24))
            y[16 * tile + 8 + anchor] = x[32 + anchor] * (1 - 2e-5 * step) + noise
    inputs = Inputs(x.float(), y.float())
    S = inputs.x.double() @ inputs.y.double().T
    top = torch.where(inputs.off, S, -torch.inf)[32:40].topk(4).values
    assert ((top[:, :1] - top) < 0.05).all()
    index = mined(inputs, Request(), "fast").negative
    assert regret(inputs, index, S)[0, 32:40].max() <= 4 * EPS
    halved = (inputs.x.half().double() @ inputs.y.half().double().T).where(inputs.off, -torch.inf)
    assert (halved[32:40].argmax(1) != index[0, 32:40]).any(), "float16 alone would have found them"


# ── equal pairs are bit-equal ───────────────────────────────────────────────────────────────────────────────────────


@every_arithmetic
def test_a_copy_of_the_positive_is_bit_equal(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SMALL", 0)
    in_tiles(monkeypatch, 64, 64)
    x, _ = embeddings(np.random.default_rng(3), 45, 45, 140, torch.float32)
    x = x.to(dtype)
    y = torch.cat((x, x[:40]))  # row k of y is the pair, row 45 + k its copy
    at = list(ARITHMETICS.values()).index((dtype, precision))
    inputs = Inputs(laid_out(x, LAYOUTS[at % 4]), laid_out(y, LAYOUTS[(at + 1) % 4]))
    found = mined(inputs, Request(), precision)
    assert found.negative[0, :40].tolist() == list(range(45, 85))
    assert torch.equal(found.s_neg[0, :40], found.s_pos[:40])
    turned = mined(Inputs(inputs.y, inputs.x), Request(), precision)
    assert torch.equal(turned.s_neg[1, :40], found.s_pos[:40])


@every_arithmetic
def test_the_fallback_is_decided_on_exact_similarities(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negatives 0, 2e-5 or 2e-4 from their positive, ε = 1e-5: only the equal ones are near, in any arithmetic."""
    monkeypatch.setattr(launch, "SMALL", 0)
    x = torch.eye(24)[:12].repeat_interleave(2, 0)
    y = x.clone()
    away = torch.tensor([0.0, 2e-5, 2e-4]).repeat(4)
    y[1::2] *= 1 - away[:, None]  # of x's 2k: pair 1, negative 1 − away; of x's 2k + 1: pair 1 − away, negative 1
    if dtype != torch.float32:  # which cannot hold them: 0, or an ulp at 1 and more
        away = torch.tensor([0.0, 1.0, 3.0]).repeat(4) * torch.finfo(dtype).eps
        y[1::2] = x[1::2] * (1 - away[:, None])
    batch = goal.gradients(x.to(dtype), y.to(dtype), mining=goal.mining.selective(eps=1e-5), impl="triton",
                           precision=precision)  # fmt: skip
    near = (batch[2].s_pos - batch[2].s_neg).abs() < 1e-5
    assert torch.equal(near[0], (away == 0).repeat_interleave(2))
    assert batch[2].fallback == near.float().mean()


# ── NaN, inf, and memory that nobody wrote ──────────────────────────────────────────────────────────────────────────

BLIND = [("con", "con"), ("nca", "lin-ms"), ("cir", "sig-ms")]  # the first looks at no similarity


@pytest.mark.parametrize("mining", SUPPORTED)
@pytest.mark.parametrize(("T", "P"), BLIND)
def test_nan_and_inf_show(T: str, P: str, mining: str) -> None:
    """In a pair, and in a candidate beyond the pairs."""
    rng = np.random.default_rng(0)
    for side, row, bad in ((0, 3, -torch.inf), (1, 19, torch.nan)):
        x, y = embeddings(rng, 12, 20, 6, torch.float32)
        (x, y)[side][row, 2] = bad
        gx, gy, _ = goal.gradients(x, y, T, P, mining=mining, impl="triton", check_finite=False)
        assert not gx.isfinite().all(), (side, row)
        assert not gy.isfinite().all(), (side, row)


@pytest.mark.parametrize("mining", ["hardest", "all"])
def test_nan_shows_as_it_does_eagerly_where_nobody_has_a_negative(mining: str) -> None:
    x, y = torch.ones(3, 4), torch.ones(3, 4)
    y[1, 1] = torch.nan
    for rows, ids in ((slice(1, 2), None), (slice(0, 3), torch.zeros(3, dtype=torch.int64))):
        options: dict[str, Any] = {"ids": ids, "mining": mining, "check_finite": False}
        found, eager = (
            goal.gradients(x[rows], y[rows], "con", "con", **options, impl=impl)[0] for impl in ("triton", "torch")
        )
        assert found.isnan().any() or not eager.isnan().any()


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()


# ── wide exponents, huge and tiny norms ─────────────────────────────────────────────────────────────────────────────

LENGTHS = {
    "long x": (1e9, 1.0),
    "both long": (1e9, 1e9),
    "short": (1e-15, 1e-15),
    "subnormal squares": (1e-25, 1.0),
    "long and short": (1e25, 1e-25),
    "zero": (0.0, 1.0),
}


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_finite_in_finite_out(lengths: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SMALL", 0)
    x, y = embeddings(np.random.default_rng(1), 33, 20, 9, torch.float32)
    by_x, by_y = LENGTHS[lengths]
    number = list(LENGTHS).index(lengths) + (precision == "fast")
    for terms in (("cir", {}, "sig-ms", {}, "hardest", {}), SPREAD[(1, 3, 4)[number % 3]]):
        case = Case(*terms, "dot", "mean", "none", (33, 20, 9))
        gx, gy, stats = goal.gradients(by_x * x, by_y * y, **arguments(case), impl="triton", precision=precision)
        assert gx.isfinite().all()
        assert gy.isfinite().all()
        assert stats.s_pos.isfinite().all()
        assert not stats.s_neg.isnan().any()


def test_lengths_whose_product_is_beyond_float32() -> None:
    """max ‖x‖ · max ‖y‖ is, but every similarity is representable."""
    x, y = torch.eye(6), torch.eye(6)
    x[0] *= 1e25
    y[0] *= 1e-25
    y[1] *= 1e25
    x[1] *= 1e-25
    for T, P, mining in (("con", "con", "hardest"), ("cir", "sig-ms", "hardest"), ("nca", "lin", "all")):
        gx, gy, stats = goal.gradients(x, y, T, P, mining=mining, impl="triton", precision="exact")
        assert gx.isfinite().all(), (T, P, mining)
        assert gy.isfinite().all()
        assert not stats.s_neg.isnan().any()


RANGES = {
    "both beyond": (1e20, 1e20, None),
    "x beyond": (1e20, 1.0, None),
    "one row": (1e25, 1e25, 2),
    "S²": (1e12, 1e12, None),
}


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("lengths", RANGES)
@pytest.mark.parametrize("mining", SUPPORTED)
def test_what_float32_does_not_hold_shows(
    mining: str, lengths: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient is finite only where it is that of the eager objective, which is so itself (tests/test_range.py)."""
    monkeypatch.setattr(launch, "SMALL", 0)
    x, y = embeddings(np.random.default_rng(5), 9, 9, 5, torch.float32)
    by_x, by_y, row = RANGES[lengths]
    x[slice(None) if row is None else row] *= by_x
    y[slice(None) if row is None else row] *= by_y
    wrong = []
    first = list(RANGES).index(lengths)
    for number, (T, P) in enumerate([(goal.T.con(margin=0.2), "con"), ("cir", "lin"), ("cir", "sig-ms")], first):
        ids = np.arange(9) // 2 if number % 2 else None
        options: dict[str, Any] = {"T": T, "P": P, "mining": mining, "ids": ids, "similarity": "dot"}
        found = [one.clone().requires_grad_() for one in (x, y)]
        loss = goal.apply(*found, **options, impl="triton", precision=precision)
        loss.backward()
        gradients = [one.grad for one in found]
        if not all(one.isfinite().all() for one in gradients):
            continue
        eager = goal.gradients(x, y, **options, impl="torch")[:2]
        close = [
            torch.allclose(one, other, 1e-2, 1e-2 * other.abs().max())
            for one, other in zip(gradients, eager, strict=True)
        ]
        if not (loss.isfinite() and all(close)):
            wrong.append((T, P, ids is None, loss.item()))
    assert wrong == []


@pytest.mark.parametrize("length", [1e-17, 1e-12, 1.0, 1e6])
def test_the_hardest_among_rows_of_any_length(length: float) -> None:
    x, _ = embeddings(np.random.default_rng(4), 20, 20, 7, torch.float32)
    found = mined(Inputs(length * x, length * x), Request(semi_hard=1e30, lin=True, beta=10.0))
    hardest = (x.double() @ x.double().T).fill_diagonal_(-torch.inf).argmax(1)
    assert torch.equal(found.negative, hardest.expand(2, -1))
    assert torch.equal(found.semi, found.s_neg)
    assert found.r_neg_lin.isfinite().all()
    assert found.r_neg_exp.isfinite().all()


@pytest.mark.parametrize("beta", [9.0, 60.0, 400.0])
@pytest.mark.parametrize("split", ["one tile", "chunks"])
def test_exponents_of_any_range(beta: float, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """R⁻ where one shift serves all, and where every anchor needs its own."""
    in_tiles(monkeypatch, *SPLITS[split])
    request = Request(beta=beta)
    inputs = on_a_grid(7, 63, 70, 9)
    found, true = mined(inputs, request), true_statistics(inputs, request)
    # β · s is rounded to float32 before it is an exponent
    assert ((found.r_neg_exp - true.r_neg_exp).abs() <= (8 + 4 * beta) * EPS * true.r_neg_exp + 1e-37).all()
    assert (true.r_neg_exp > 0).any()


# ── launches ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Launches(TorchDispatchMode):
    """Names of what would run on a device: kernels, and operators that neither make empty tensors nor views."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        for module in (launch.tile, launch.scan, launch.merge, launch.emit, launch.dense, launch.weigh):
            for name, kernel in vars(module).items():
                if hasattr(kernel, "arg_names") and name[0] != "_":
                    monkeypatch.setattr(module, name, _Launched(name, kernel, self.names))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Launched(NamedTuple):
    """A kernel that says its name; what the interpreter does for it are no launches."""

    name: str
    kernel: Any
    names: list[str]

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.names.append(self.name)
            with _disable_current_modes():
                self.kernel[grid](*args, **options)

        return launch

    def __call__(self, *args: Any) -> Any:  # from another kernel
        return self.kernel(*args)


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 128), (torch.bfloat16, 1024)], ids=str)
@pytest.mark.parametrize(("T", "P"), [("con", "con"), ("nca", "sig-ms")])
def test_a_small_batch_takes_six_launches(
    T: str, P: str, dtype: torch.dtype, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward together, autograd's own 1 for the loss among them."""
    x, y = (side.to(dtype).requires_grad_() for side in embeddings(np.random.default_rng(5), 128, 128, d, dtype))
    with _Launches(monkeypatch) as launches:
        goal.apply(x, y, T, P, impl="triton", check_finite=False).backward()
    assert launches.names == ["pair", "scan", "finish", "weigh", "aten::ones_like", "emit"]
    assert x.grad is not None
    assert x.grad.isfinite().all()


# ── the same bits ───────────────────────────────────────────────────────────────────────────────────────────────────


@spread
def test_the_same_bits_in_every_run(terms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SMALL", 0)
    case = Case(*terms, "dot", "mean", "none", (40, 33, 24))
    inputs = Inputs(*embeddings(np.random.default_rng(2), 40, 33, 24, torch.float32))
    first, second = (objective(case, "triton", inputs) for _ in range(2))
    assert all(torch.equal(one, of) for one, of in zip((*first[0], first[1]), (*second[0], second[1]), strict=True))


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_chunks_are_one_chunk(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SMALL", 0)
    inputs = Inputs(*embeddings(np.random.default_rng(4), 70, 50, 10, torch.float32))
    launched: list[Any] = []
    monkeypatch.setattr(launch.scan, "scan", _Counting(launch.scan.scan, launched))
    found = []
    for chunked in (False, True):
        with monkeypatch.context() as patch:
            in_tiles(patch, 16, 32, chunked)
            found.append(mined(inputs, Request(0.3, True, 10.0), precision))
    assert all(torch.equal(one, of) for one, of in zip(*found, strict=True) if one is not None)
    assert {grid for (grid,) in launched} == {10, 2}


class _Counting:
    """A kernel that notes the grids of its launches."""

    def __init__(self, kernel: Any, launched: list[Any]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("hub", [False, True])
def test_sorted_emission_is_unsorted(hub: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of ±1 times rows on a grid: exact in any order, so equal bit by bit."""
    case = Case("con", {}, "con", {}, "hardest", {}, "dot", "sum", "extra", (127, 150, 9))
    inputs = on_a_grid(3, 127, 150, 9, "extra")
    if hub:
        inputs.y[77] = 0
        inputs.y[77, 0] = 100.0
        inputs.x[:, 0] = 0.5
    found = []
    for few in (1 << 20, 0):
        monkeypatch.setattr(launch, "FEW", few)
        grads, _, module = objective(case, "triton", inputs, precision="exact")
        found.append(grads)
    assert not hub or (module.stats.index[0] == 77).sum() >= 120
    assert all(torch.equal(one, of) for one, of in zip(*found, strict=True))
    assert worst(found[0], (truth(case, inputs).gx, truth(case, inputs).gy)) == 0


# ── dense objectives ────────────────────────────────────────────────────────────────────────────────────────────────

NEAR = {"none": 1e-9, "some": 0.3, "all": 1e9}  # eps of selective mining: how many anchors meet all negatives


ARITHMETIC = ("float32", "halved", "float16", "bfloat16")  # of the inputs and of the tiles of G
DENSE = [  # each mining in three of the four; and a number that spreads shapes, chunks and reductions
    (mining, arithmetic, m + a)
    for (m, mining), (a, arithmetic) in itertools.product(*map(enumerate, (("average", "sum", *NEAR), ARITHMETIC)))
    if (m + a) % 4
]


@pytest.mark.parametrize(("mining", "arithmetic", "number"), DENSE)
def test_dense_tiles(mining: str, arithmetic: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 and 16-bit tiles of G, one row of tiles at a time or all at once; both shapes of S."""
    monkeypatch.setattr(launch, "SMALL", 0)
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(arithmetic, torch.float32)
    chosen = ("selective", {"eps": NEAR[mining]}) if mining in NEAR else ("all", {"average": mining == "average"})
    in_tiles(monkeypatch, 32, 64, chunked=number % 2 == 0)
    shape = ((50, 90, 20), (70, 45, 33))[number // 2 % 2]
    case = Case("nca", {}, "sig-ms", {}, *chosen, "dot", ("mean", "sum")[number % 2], "fives", shape)
    inputs = on_a_grid(number, *shape, "fives", step=0.125)  # exact in 16 bit
    expected = truth(case, inputs)
    rows = inputs._replace(x=inputs.x.to(dtype), y=inputs.y.to(dtype))
    grads, value, module = objective(case, "triton", rows, precision="exact" if arithmetic == "float32" else "fast")
    G = torch.from_numpy(expected.G).abs()
    carried = G @ inputs.y.double().abs(), G.T @ inputs.x.double().abs()
    loss = {"float32": EPS, "bfloat16": ROUNDING[torch.bfloat16]}.get(arithmetic, 2.0**-11)  # of the tiles of G
    for one, of, most in zip(grads, (expected.gx, expected.gy), carried, strict=True):
        true = torch.from_numpy(of)
        rounding = loss * most + ROUNDING[dtype] * true.abs() + torch.finfo(dtype).tiny
        assert ((one.double() - true).abs() <= rounding + 32 * EPS * true.abs().max()).all()
    assert abs(value.item() - expected.value) <= 1e-5 * max(1.0, abs(expected.value))
    if mining in NEAR:
        share = module.stats.fallback
        assert {"none": share < 0.5, "some": 0 < share < 1, "all": share == 1}[mining]


@pytest.mark.parametrize("size", [1e-9, 1e9])
@pytest.mark.parametrize("mining", ["all", "selective"])
def test_coefficients_that_no_16_bits_hold(mining: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of G are scaled by what suits them."""
    monkeypatch.setattr(launch, "SMALL", 0)
    inputs = on_a_grid(8, 40, 33, 9, step=0.125)
    options: dict[str, Any] = {"T": "nca", "P": "con", "mining": mining, "reduction": "sum"}
    weight = torch.full((33,), size)
    found = goal.gradients(inputs.x, inputs.y, **options, weight=weight, impl="triton")
    true = goal.gradients(inputs.x.double(), inputs.y.double(), **options)
    assert worst([side / size for side in found[:2]], true[:2]) <= 2**-10


@pytest.mark.parametrize("mining", ["all", "selective"])
@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["x", "y"])
def test_one_side_alone(needs: tuple[bool, bool], mining: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SMALL", 0)
    in_tiles(monkeypatch, 32, 32)
    options: dict[str, Any] = {"mining": mining, "impl": "triton", "similarity": "cosine"}
    sides = embeddings(np.random.default_rng(6), 33, 50, 10, torch.float32)
    both = goal.gradients(*sides, **options)
    leaves = [side.clone().requires_grad_(needed) for side, needed in zip(sides, needs, strict=True)]
    goal.apply(*leaves, **options).backward()
    for leaf, needed, of in zip(leaves, needs, both, strict=False):
        assert (leaf.grad is not None) == needed
        assert not needed or gap(leaf.grad, of) <= 4 * EPS


def test_no_work_is_done_for_a_side_that_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(launch.dense, "product", _Counting(launch.dense.product, launched))
    x, y = embeddings(np.random.default_rng(6), 33, 50, 10, torch.float32)
    goal.apply(x.requires_grad_(), y, mining="all", impl="triton").backward()
    assert len(launched) == 1


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("mining", ["all", "selective", "hardest"])
def test_terms_of_users(mining: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In dense kernels, and outside them, with every statistic."""

    @goal.triplet_weight("ramp", statistics=("r_neg_exp", "r_pos_lin"))
    def ramp(s_pos, s_neg, *, width=0.5, beta=8.0, hard=False, r_neg_exp, r_pos_lin):  # type: ignore[no-untyped-def]
        ramped = torch.clamp((s_neg - s_pos) / width + 0.5, 0, 1) + 0.1 * (1 + r_neg_exp)
        return torch.where(ramped > 0.5, 1.0, ramped) if hard else ramped - 0.2 * r_pos_lin.tanh()

    @goal.pair_weight("powers", statistics=("r_neg_lin", "r_pos_exp"))
    def powers(s_pos, s_neg, *, alpha=1.5, r_neg_lin, r_pos_exp):  # type: ignore[no-untyped-def]
        return (1 - s_pos) ** 3 / (1 + r_pos_exp), torch.nn.functional.softplus(alpha * s_neg) + r_neg_lin

    in_tiles(monkeypatch, 32, 64)
    inputs = on_a_grid(1, 50, 40, 9, "extra")
    options = {"mining": mining, "ids": inputs.ids, "y_ids": inputs.y_ids}
    for T, P in ((goal.T.ramp(), "powers"), (goal.T.ramp(width=1.25, hard=True), goal.P.powers(alpha=0.5))):
        found = goal.gradients(inputs.x, inputs.y, T, P, **options, impl="triton", precision="exact")
        true = goal.gradients(inputs.x.double(), inputs.y.double(), T, P, **options)
        eager = goal.gradients(inputs.x, inputs.y, T, P, **options, impl="torch")
        exact_as(found[:2], eager[:2], true[:2])


# ── autograd, operators, torch.compile ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mining", ["all", "selective"])
def test_the_incoming_gradient_multiplies(mining: str) -> None:
    options: dict[str, Any] = {"mining": mining, "impl": "triton"}
    x, y = embeddings(np.random.default_rng(3), 9, 12, 6, torch.float32)
    gx, gy, _ = goal.gradients(x, y, **options)
    x.requires_grad_(), y.requires_grad_()
    for c in (-2.5, 0.0, 1e6):
        x.grad = y.grad = None
        (c * goal.apply(x, y, **options)).backward()
        assert gap(x.grad, c * gx) <= 4 * EPS
        assert gap(y.grad, c * gy) <= 4 * EPS


@pytest.mark.parametrize("mining", ["hardest", "all"])
def test_a_second_derivative_is_refused(mining: str) -> None:
    x, y = embeddings(np.random.default_rng(3), 5, 5, 6, torch.float32)
    x.requires_grad_()
    loss = goal.apply(x, y, mining=mining, impl="triton")
    (gx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gx.sum().backward()


@pytest.mark.parametrize(
    ("P", "mining", "with_ids"), [("con", "hardest", False), ("lin-ms", "semi-hard", True), ("sig-ms", "all", False)]
)
def test_operators_keep_the_rules(P: str, mining: str, with_ids: bool) -> None:
    x, y = embeddings(np.random.default_rng(0), 7, 10, 6, torch.float32)
    chosen = settings("nca", P, mining, "dot", "mean", "triton", "exact")
    ids = {"ids": torch.arange(7) // 2, "y_ids": torch.arange(10) // 2} if with_ids else {}
    block, pairs = Block(x, y, Masks(7, 10, (7, 10), **ids)), launch.pair(x, y, 7)
    share, relative = torch.full((2, 7), 0.1), {name: torch.full((2, 7), 0.3) for name in chosen.product.statistics}
    dense = Dense(chosen.product, *pairs[:2], share, relative, every=not with_ids)
    work = Work(Backend("triton", "exact", chosen.similarity), block, needs=(True, with_ids))
    mined = Mined(torch.randint(0, 7, (2, 7)), share, share)
    of = torch.ops.goal
    torch.library.opcheck(of.pair, pack(work))
    torch.library.opcheck(of.mine, pack(work._replace(pairs=pairs, request=chosen.request)))
    torch.library.opcheck(of.dense_value, pack(work._replace(dense=dense)))
    torch.library.opcheck(of.dense_block, pack(work._replace(dense=dense)))
    torch.library.opcheck(of.mined_emit, pack(work._replace(mined=mined, incoming=torch.ones(()))))


@pytest.mark.parametrize(
    ("T", "P", "mining", "similarity"),
    [
        ("cir", "sig-ms", "semi-hard", "cosine"),
        ("nca", "con", "all", "dot"),
        ("cir", "lin-ms", "selective", "dot"),
    ],
)
def test_one_graph_equals_eager(T: str, P: str, mining: str, similarity: str) -> None:
    torch._dynamo.reset()
    module = goal.Objective(T, P, mining=mining, similarity=similarity, impl="triton", precision="exact")
    ids = torch.arange(24) // 2
    found = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        x, y = embeddings(np.random.default_rng(1), 24, 24, 8, torch.float32)
        x.requires_grad_(), y.requires_grad_(similarity == "dot")
        value = call(x, y, ids)
        value.backward()
        assert x.grad.abs().max() > 0
        y_grad = y.grad if y.requires_grad else x.grad
        found.append((value.detach(), x.grad, y_grad, module.stats.s_neg, module.stats.T))
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-7)


# ── who computes ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_auto_takes_torch_on_the_cpu() -> None:
    x, y = embeddings(np.random.default_rng(0), 9, 9, 6, torch.float32)
    assert all(torch.equal(one, of) for one, of in zip(
        goal.gradients(x, y)[:2], goal.gradients(x, y, impl="torch")[:2], strict=True))  # fmt: skip
    assert goal.explain(x, y).impl == "torch"
    assert goal.explain(x, y, impl="triton").impl == "triton"


@pytest.mark.parametrize(
    ("dtypes", "options", "reason"),
    [
        ((torch.float64, torch.float32), {}, "float64"),
        ((torch.float32, torch.float64), {"mining": "all"}, "float64"),
        ((torch.float32, torch.float32), {"similarity": "order"}, "similarity='order'"),
    ],
)
def test_what_kernels_cannot_do_is_refused(dtypes: Any, options: Any, reason: str) -> None:
    x, y = (torch.rand(5, 4).to(dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=f"impl='triton' cannot be used here: {reason}"):
        goal.apply(x, y, **options, impl="triton")
    goal.apply(x, y, **options)


def test_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="impl='triton' cannot be used here: similarity='given'"):
        goal.apply_similarity(torch.rand(5, 5), impl="triton")


@pytest.mark.usefixtures("registries")
def test_a_term_that_cannot_be_lowered_is_refused_by_dense_objectives_alone() -> None:
    goal.triplet_weight("bell")(lambda s_pos, s_neg: torch.erf(s_neg - s_pos) + 1)
    inputs = on_a_grid(0, 20, 20, 6)
    x, y = inputs[:2]
    for mining in ("all", "selective"):
        with pytest.raises(ValueError, match=r"impl='triton' cannot .* T\.bell: torch\.erf cannot be translated"):
            goal.gradients(x, y, "bell", "con", mining=mining, impl="triton")
    for mining in ("hardest", "semi-hard"):
        found = goal.gradients(x, y, "bell", "con", mining=mining, impl="triton", precision="exact")
        true = goal.gradients(x.double(), y.double(), "bell", "con", mining=mining)
        assert worst(found[:2], true[:2]) <= 8 * EPS


WITHOUT = """
import torch, goal
x = torch.rand(5, 4)
goal.apply(x, x)
try:
    goal.apply(x, x, impl="triton")
except ValueError as error:
    print(error)
"""


def test_without_a_gpu_and_without_the_interpreter() -> None:
    path = os.pathsep.join([*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert "impl='triton' cannot be used here: the inputs are on cpu" in done.stdout
        assert "TRITON_INTERPRET=1" in done.stdout
