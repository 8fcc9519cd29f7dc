"""Where training code breaks: odd batches, odd numbers, autograd's corners, what is left alone and what is stored."""

import copy
import functools
import itertools
import math
import pickle
from collections.abc import Callable
from functools import partial, partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import hardest_of, oracle, pair_weight, relative_similarities, selection, soft_negative, triplet_weight
from table import SIMILARITIES, Case, covering, make_inputs
from test_contract import MININGS, arguments, embeddings, gap, in_tiles, negatives_of, similarities, tensors
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import goal
from goal import lab
from goal.engine import eager
from goal.lab.batch import batch_integrability
from goal.lab.dynamics import simulate, triplet_trajectory
from goal.similarity import Dot
from goal.training import Curriculum, FewSemiHard, Scheduled, linear, varying

pytestmark = pytest.mark.usefixtures("one_thread")

T_ALL = [goal.T.con(), goal.T.con(margin=0.2), goal.T.nca(), goal.T.cir()]
P_ALL = [goal.P[name]() for name in goal.P]
MINING_ALL = [
    goal.mining.hardest(),
    goal.mining.semi_hard(),
    goal.mining.all_negatives(),
    goal.mining.all_negatives(average=False),
    goal.mining.selective(),
]
every_mining = pytest.mark.parametrize("mining", MINING_ALL, ids=repr)
every_P = pytest.mark.parametrize("P", P_ALL, ids=lambda P: P.name)
every_similarity = pytest.mark.parametrize("similarity", SIMILARITIES)


def batch(n: int = 9, m: int = 9, d: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return embeddings(np.random.default_rng(n * 100 + m), n, m, d, dtype)


def leaves(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    x, y = batch(*args, **kwargs)
    return x.requires_grad_(), y.requires_grad_()


# ── finite in, finite out ───────────────────────────────────────────────────────────────────────────────


LARGEST = {torch.float32: 1e9, torch.float64: 1e76}  # ‖x‖ and ‖y‖ for which S² still is representable
SMALLEST = {torch.float32: 1e-34, torch.float64: 1e-290}


@st.composite
def odd_batches(draw: st.DrawFn, names: tuple[str, ...]) -> dict[str, Any]:
    """Any shape, duplicates, equal pairs, zero rows, norms from tiny to huge."""
    n, m, d = (draw(st.integers(1, top)) for top in (8, 8, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    P = goal.P[draw(st.sampled_from(names))]()
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    # what -ms weights are of S, S² or an exponential, has to be representable times ‖y‖
    large, small = 1e2 if P.name.endswith("-ms") else LARGEST[dtype], SMALLEST[dtype]
    scales = draw(st.sampled_from([[1.0], [0.0, 1.0], [30.0], [large], [small], [small, 0.0, 1.0, large]]))

    def rows(size: int) -> np.ndarray:
        directions = rng.normal(size=(size, d))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        directions = directions[rng.integers(0, size, size)] if draw(st.booleans()) else directions
        return directions * rng.choice(scales, (size, 1))

    x, y = rows(n), rows(m)
    k = min(n, m)
    if draw(st.booleans()):
        y[:k] = x[:k]
    ids = draw(st.sampled_from([None, 1, 3]))
    of_rows = rng.integers(0, ids or 1, max(n, m))
    given: dict[str, Any] = {} if ids is None else {"ids": of_rows[:n], "y_ids": of_rows[:m]}
    if draw(st.booleans()):
        given["weight"] = rng.choice([0.0, 1.0, 1e-3], k)
    return {
        "x": torch.from_numpy(x).to(dtype).requires_grad_(),
        "y": torch.from_numpy(y).to(dtype).requires_grad_(),
        "T": draw(st.sampled_from(T_ALL)),
        "P": P,
        "mining": draw(st.sampled_from(MINING_ALL)),
        "similarity": draw(st.sampled_from(SIMILARITIES)),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        **{name: torch.from_numpy(value) for name, value in given.items()},
    }


@given(call=odd_batches(tuple(goal.P)))
@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
def test_finite_in_finite_out(call: dict[str, Any]) -> None:
    x, y = call["x"], call["y"]
    before = x.detach().clone(), y.detach().clone()
    loss = goal.apply(**call)
    loss.backward()
    for name, tensor in {"value": loss, "x.grad": x.grad, "y.grad": y.grad}.items():
        assert tensor.isfinite().all(), f"{name}: {tensor}"
    assert (x.grad.shape, y.grad.shape) == (x.shape, y.shape)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_similarity
@every_P
def test_finite_to_the_end_of_the_range(P: Any, similarity: str, dtype: torch.dtype) -> None:
    """As the design bounds it: wherever S, S², ‖x‖ and ‖y‖ are representable."""
    infinite = []
    for T, mining, length in itertools.product(T_ALL, MINING_ALL, (LARGEST[dtype], LARGEST[dtype] ** 0.5)):
        x, y = batch(4, 3)
        x, y = ((side * length).to(dtype) for side in (x, y))
        gx, gy, _ = goal.gradients(x, y, T=T, P=P, mining=mining, similarity=similarity)
        if not (gx.isfinite().all() and gy.isfinite().all()):
            infinite.append((T, mining, length))
    assert infinite == []


@given(call=odd_batches(("con", "sig")))
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_stats_of_odd_batches_are_consistent(call: dict[str, Any]) -> None:
    _, _, stats = goal.gradients(**call)
    k, rows, cols = len(stats.s_pos), len(call["x"]), len(call["y"])
    has = stats.index >= 0
    assert stats.index.shape == stats.s_neg.shape == stats.T.shape == (2, k)
    assert (stats.index[0] < cols).all()
    assert (stats.index[1] < rows).all()
    assert torch.equal(has, stats.s_neg != -torch.inf)
    assert not (stats.index == torch.arange(k)).any()
    for share in (stats.active, stats.fallback, *stats.recall_at_1):
        assert 0 <= share <= 1


# ── batches without negatives ───────────────────────────────────────────────────────────────────────────


@every_mining
@every_P
@every_similarity
def test_without_a_negative_the_gradient_is_zero_and_connected(P: Any, mining: Any, similarity: str) -> None:
    for T, (n, ids) in itertools.product(T_ALL, [(1, None), (5, torch.full((5,), 7))]):
        x, y = leaves(n, n)
        encoder = x * 2
        loss = goal.apply(encoder, y, T=T, P=P, mining=mining, similarity=similarity, ids=ids)
        assert loss.requires_grad
        assert loss == 0
        loss.backward()
        assert torch.equal(x.grad, torch.zeros_like(x))
        assert torch.equal(y.grad, torch.zeros_like(y))


def test_a_matrix_of_one_pair() -> None:
    S = torch.tensor([[0.5]], requires_grad=True)
    goal.apply_similarity(S).backward()
    assert S.grad.item() == 0


def test_one_pair_with_further_candidates_has_negatives() -> None:
    x, y = leaves(1, 4)
    goal.apply(x, y, T="con", P="con").backward()
    assert x.grad.any()


# ── what needs no gradient ──────────────────────────────────────────────────────────────────────────────


@every_mining
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tower_costs_nothing(mining: Any, frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(kept: Callable[..., Any], *args: Any) -> Any:
        asked.append(args[-1])
        return kept(*args)

    for name in ("vjp", "tile_vjp"):
        monkeypatch.setattr(Dot, name, partialmethod(partial(spy, getattr(Dot, name))))
    sides = [side.requires_grad_() for side in batch()]
    goal.apply(*sides, mining=mining).backward()
    expected = sides[1 - frozen].grad
    assert asked
    assert all(tuple(needs) == (True, True) for needs in asked)

    asked.clear()
    sides = list(batch())
    sides[1 - frozen].requires_grad_()
    goal.apply(*sides, mining=mining).backward()
    assert sides[frozen].grad is None
    assert torch.equal(sides[1 - frozen].grad, expected)
    assert asked
    assert all(tuple(needs) == (frozen == 1, frozen == 0) for needs in asked)


def test_nothing_requires_grad() -> None:
    loss = goal.apply(*batch())
    assert not loss.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_mining
def test_evaluation_without_a_graph(mode: Callable[[], Any], mining: Any) -> None:
    x, y = leaves()
    objective = goal.Objective(mining=mining)
    expected = objective(x, y)
    with mode():
        loss = objective(x, y)
        stats = objective.stats
        gx, _, _ = goal.gradients(x, y, mining=mining)
        S = goal.apply_similarity(x @ y.T, mining=mining)
    assert not loss.requires_grad
    assert not S.requires_grad
    assert torch.equal(loss, expected)
    assert torch.equal(S, expected) or gap(S, expected.detach()) < 1e-12
    assert torch.equal(objective.stats.s_neg, stats.s_neg)  # asked for again, outside
    assert gx.any()


# ── strides, views, one tensor as both sides ────────────────────────────────────────────────────────────


def spread_out(rows: Tensor) -> Tensor:
    """The same values, every second row and column of a larger tensor."""
    n, d = rows.shape
    large = torch.full((2 * n, 2 * d), torch.nan, dtype=rows.dtype)
    large[::2, 1::2] = rows
    return large[::2, 1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda rows: rows.T.contiguous().T,
    "strided": spread_out,
    "offset": lambda rows: torch.cat((rows[:1], rows))[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_mining
@every_similarity
def test_non_contiguous_inputs(layout: str, mining: Any, similarity: str) -> None:
    x, y = batch(9, 12)
    expected = goal.gradients(x, y, mining=mining, similarity=similarity)
    views = [LAYOUTS[layout](side).detach().requires_grad_() for side in (x, y)]
    assert not views[0].is_contiguous() or layout == "offset"
    goal.apply(*views, mining=mining, similarity=similarity).backward()
    for view, true in zip(views, expected, strict=False):
        assert gap(view.grad, true) <= 1e-12


@every_mining
def test_a_matrix_that_is_a_transposed_view(mining: Any) -> None:
    x, y = batch(9, 12)
    S = (x @ y.T).detach()
    view = S.T.contiguous().T.requires_grad_()
    leaf = S.clone().requires_grad_()
    goal.apply_similarity(view, mining=mining).backward()
    goal.apply_similarity(leaf, mining=mining).backward()
    assert gap(view.grad, leaf.grad) <= 1e-12
    assert torch.equal(view, leaf)


def test_a_row_shared_by_all_captions() -> None:
    """An expanded view: five captions of one image, the image stored once."""
    x, y = batch(4, 20)
    leaf = x.clone().requires_grad_()
    ids = torch.arange(4).repeat_interleave(5)
    goal.apply(leaf[:, None].expand(4, 5, 6).reshape(20, 6), y, ids=ids).backward()
    gx, _, _ = goal.gradients(x.repeat_interleave(5, 0), y, ids=ids)
    assert gap(leaf.grad, gx.view(4, 5, 6).sum(1)) <= 1e-12


@pytest.mark.parametrize("mining", MININGS)
def test_one_tensor_as_both_sides_loses_only_the_pairs(mining: str) -> None:
    x, _ = batch(8, 8)
    leaf = x.clone().requires_grad_()
    case = Case("nca", {}, "lin", {}, mining, {}, "dot", "sum", "none", (8, 8, 6))
    goal.apply(leaf, leaf, **arguments(case)).backward()
    asked = {"T": "nca", "T_params": {}, "P": "lin", "P_params": {}, "mining": mining, "mining_params": {}}
    expected = oracle(x, x, reduction="sum", **asked)
    assert gap(leaf.grad, expected.gx + expected.gy) <= 1e-10
    assert leaf.grad.any() or mining == "semi-hard"


# ── mixed precision ─────────────────────────────────────────────────────────────────────────────────────


@every_mining
@every_similarity
def test_autocast_leaves_the_mathematics_in_float32(mining: Any, similarity: str) -> None:
    results = []
    for enabled in (False, True):
        x, y = leaves(40, 40, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = goal.apply(x, y, mining=mining, similarity=similarity)
            loss.backward()  # inside, as it is now and then written
        results.append((loss.detach(), x.grad, y.grad))
    assert results[0][0].dtype == torch.float32
    for plain, under_autocast in zip(*results, strict=True):
        assert torch.equal(plain, under_autocast)


def test_autocast_around_a_model() -> None:
    torch.manual_seed(0)
    heads = [nn.Linear(6, 8), nn.Linear(6, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        x, y = (head(side) for head, side in zip(heads, batch(dtype=torch.float32), strict=True))
        assert x.dtype == torch.bfloat16
        loss = goal.apply(x, y, similarity="cosine")
        matrix = goal.apply_similarity(x @ y.T)
    assert loss.dtype == matrix.dtype == torch.float32
    (loss + matrix).backward()
    for head in heads:
        assert head.weight.grad.dtype == torch.float32
        assert head.weight.grad.any()
        assert head.weight.grad.isfinite().all()


@every_mining
def test_a_loss_scale_comes_out_again(mining: Any) -> None:
    x, y = leaves(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(goal.apply(x, y, mining=mining)).backward()
    gx, _, _ = goal.gradients(x, y, mining=mining)
    assert torch.equal(x.grad / 2**16, gx)
    optimiser = torch.optim.SGD([x, y], lr=0.1)
    before = x.detach().clone()
    scaler.step(optimiser)
    scaler.update()
    assert torch.allclose(x, before - 0.1 * gx, atol=1e-7)


def test_a_loss_scale_saves_what_float16_would_lose() -> None:
    x, y = leaves(dtype=torch.float16)
    weight = torch.full((9,), 1e-12)
    goal.apply(x, y, reduction="sum", weight=weight).backward()
    assert not x.grad.any()  # below float16's smallest number
    x.grad = None
    (goal.apply(x, y, reduction="sum", weight=weight) * 2**36).backward()
    gx, _, _ = goal.gradients(x.double(), y.double(), reduction="sum", weight=weight)
    assert gap(x.grad.double() / 2**36 * 1e12, gx * 1e12) < 2e-3


# ── autograd's corners ──────────────────────────────────────────────────────────────────────────────────


def refuses_a_second_derivative(gradient: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"second derivative") as raised:
        gradient.square().sum().backward()
    assert "create_graph" in str(raised.value)
    assert "not a loss" in str(raised.value)


@every_mining
def test_a_second_derivative_raises_and_says_why(mining: Any) -> None:
    x, y = leaves()
    loss = goal.apply(x, y, mining=mining)
    for gradient in torch.autograd.grad(loss, (x, y), create_graph=True):
        refuses_a_second_derivative(gradient)
    S = (x @ y.T).detach().requires_grad_()
    refuses_a_second_derivative(torch.autograd.grad(goal.apply_similarity(S), S, create_graph=True)[0])


def test_a_gradient_penalty_behind_an_encoder_raises() -> None:
    x, y = batch()
    weights = torch.eye(6, dtype=torch.float64, requires_grad=True)
    objective = goal.Objective()
    (gradient,) = torch.autograd.grad(objective(x @ weights, y), weights, create_graph=True)
    refuses_a_second_derivative(gradient)
    c = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(c * goal.apply(x, y), x, create_graph=True)
    refuses_a_second_derivative(gradient)


def test_create_graph_alone_gives_the_gradient() -> None:
    x, y = leaves()
    gx, gy, _ = goal.gradients(x, y)
    actual = torch.autograd.grad(goal.apply(x, y), (x, y), create_graph=True)
    assert torch.equal(actual[0], gx)
    assert torch.equal(actual[1], gy)


@pytest.mark.parametrize("side", [0, 1])
@every_mining
def test_an_in_place_change_before_backward_is_detected(side: int, mining: Any) -> None:
    sides = [leaf.clone() for leaf in leaves()]
    loss = goal.apply(*sides, mining=mining)
    with torch.no_grad():
        sides[side].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice_needs_retain_graph() -> None:
    x, y = leaves()
    loss = goal.apply(x, y)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_only_the_asked_input_gets_a_gradient() -> None:
    x, y = leaves()
    (gx,) = torch.autograd.grad(goal.apply(x, y), (x,))
    assert x.grad is y.grad is None
    assert torch.equal(gx, goal.gradients(x, y)[0])


def test_the_gradients_are_no_views_of_what_is_kept() -> None:
    x, y = leaves()
    loss = goal.apply(x, y)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    for again, before in zip(torch.autograd.grad(loss, (x, y)), kept, strict=True):
        assert torch.equal(again, before)


# ── modules ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("recipe", goal.recipes())
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("used", [False, True])
def test_modules_survive_copying_and_saving(recipe: str, way: str, used: bool) -> None:
    x, y = leaves(dtype=torch.float32)
    ids, y_ids = torch.arange(len(x)), torch.arange(len(y))
    module = goal.recipe(recipe)
    if used:
        module(x, y, ids, y_ids)
    if way == "deepcopy":
        other = copy.deepcopy(module)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        other = goal.recipe(recipe)
        other.load_state_dict(module.state_dict())
    gradients = [torch.autograd.grad(each(x, y, ids, y_ids), (x, y)) for each in (module, other)]
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)
    assert repr(module) == repr(other)


def test_an_objective_has_no_state_and_moves_with_its_model() -> None:
    model = nn.ModuleDict({"head": nn.Linear(6, 6), "objective": goal.Objective()})
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    assert list(model["objective"].parameters()) == []
    model.double().eval().train()
    x, y = batch()
    assert model["objective"](model["head"](x), y).dtype == torch.float64


# ── NaN and inf ─────────────────────────────────────────────────────────────────────────────────────────

PLACES = [("x", 3), ("y", 3), ("x", -1), ("y", -1)]
SHAPES = [(8, 8), (6, 9), (9, 6)]


def broken(place: tuple[str, int], n: int, m: int, value: float) -> tuple[Tensor, Tensor]:
    sides = dict(zip("xy", batch(n, m, dtype=torch.float32), strict=True))
    sides[place[0]][place[1], 2] = value
    return sides["x"], sides["y"]


@every_similarity
@every_mining
@every_P
def test_nan_shows_in_the_gradient(P: Any, mining: Any, similarity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = []
    for shape, T, place in itertools.product(SHAPES, T_ALL, PLACES):
        if shape[0] != shape[1]:
            in_tiles(monkeypatch, height=3)
        x, y = broken(place, *shape, value=math.nan)
        options = {"T": T, "P": P, "mining": mining, "similarity": similarity}
        gx, gy, _ = goal.gradients(x, y, check_finite=False, **options)
        if not (gx.isnan().any() or gy.isnan().any()):
            hidden.append((T, place, shape))
    assert hidden == []


@every_mining
@every_P
def test_nan_in_a_matrix_shows_in_the_gradient(P: Any, mining: Any) -> None:
    hidden = []
    for T, (i, j), shape in itertools.product(T_ALL, [(3, 3), (2, 4), (-1, 0), (0, -1)], SHAPES):
        if (T.name, T.params["margin"] if T.name == "con" else 0, P.name) == ("con", None, "con"):
            continue  # constant weights: no value of S enters the gradient
        x, y = batch(*shape)
        S = x @ y.T
        S[i, j] = torch.nan
        S.requires_grad_()
        goal.apply_similarity(S, T=T, P=P, mining=mining, check_finite=False).backward()
        if not S.grad.isnan().any():
            hidden.append((T, (i, j), shape))
    assert hidden == []


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@every_mining
def test_inf_shows_in_the_gradient(value: float, mining: Any, similarity: str) -> None:
    hidden = []
    for T, P, place, shape in itertools.product(T_ALL[1:3], P_ALL, PLACES, SHAPES):
        x, y = broken(place, *shape, value=value)
        options = {"T": T, "P": P, "mining": mining, "similarity": similarity}
        gx, gy, _ = goal.gradients(x, y, check_finite=False, **options)
        if gx.isfinite().all() and gy.isfinite().all():
            hidden.append((T, P, place, shape))
    assert hidden == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [("x", 3), ("y", 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_non_finite_entry_raises_by_default_on_the_cpu(value: float, place: Any, dtype: torch.dtype) -> None:
    x, y = (side.to(dtype) for side in broken(place, 9, 8, value))
    (x if place[0] == "x" else y)[-1, 0] = math.nan  # a later row, which is not the first
    for call in (goal.apply, goal.gradients, goal.Objective()):
        with pytest.raises(ValueError, match=rf"^{place[0]} .*{value}.* row {place[1]}\b"):
            call(x, y)
    if place[0] == "x":
        with pytest.raises(ValueError, match=rf"^S .*{value}.* row 3\b"):
            goal.apply_similarity(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_large_finite_entries_are_no_error(dtype: torch.dtype) -> None:
    """Their sum overflows, none of them does."""
    S = torch.full((4, 4), torch.finfo(dtype).max, dtype=dtype)
    S[1] *= -1
    goal.apply_similarity(S, T="con", P="con")


def test_the_bad_row_is_sought_only_after_the_sum_failed() -> None:
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, y = batch()
    with Names():
        goal.apply(x, y, T="con", P="con")
    checked = names.copy()
    names.clear()
    with Names():
        goal.apply(x, y, T="con", P="con", check_finite=False)
    extra = len(checked) - len(names)
    assert extra <= 8  # a sum and its read-out for either tensor
    assert not any("isfinite" in name for name in checked)


# ── nothing changes that is not asked to ────────────────────────────────────────────────────────────────


@every_mining
@every_similarity
def test_inputs_are_not_written_to(mining: Any, similarity: str) -> None:
    x, y = leaves(9, 11)
    rng = np.random.default_rng(0)
    of_rows = torch.from_numpy(rng.integers(0, 5, 11))
    ids, y_ids = of_rows[:9].clone(), of_rows.clone()
    weight = torch.from_numpy(rng.uniform(0, 2, 9))
    given = {"x": x, "y": y, "ids": ids, "y_ids": y_ids, "weight": weight}
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    goal.apply(**given, mining=mining, similarity=similarity).backward()
    goal.gradients(**given, mining=mining, similarity=similarity)
    for name, tensor in given.items():
        assert torch.equal(tensor, before[name]), name


@every_mining
@pytest.mark.parametrize("P", ["con", "sig-ms"])
def test_the_same_call_gives_the_same_bits(mining: Any, P: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    x, y = leaves(300, 280, dtype=torch.float32)
    with torch.no_grad():
        y[7] *= 4  # a hub: the hardest negative of many
    seen = []
    for _ in range(3):
        x.grad = y.grad = None
        loss = goal.apply(x, y, P=P, mining=mining)
        loss.backward()
        seen.append((loss.detach(), x.grad, y.grad))
    torch.set_num_threads(threads)
    for again in seen[1:]:
        for one, two in zip(seen[0], again, strict=True):
            assert torch.equal(one, two)


# ── weights of anchors ──────────────────────────────────────────────────────────────────────────────────


@every_mining
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_anchor_at_all(mining: Any, reduction: str) -> None:
    x, y = leaves()
    loss = goal.apply(x, y, mining=mining, reduction=reduction, weight=torch.zeros(9))
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(y.grad, torch.zeros_like(y))


@every_mining
def test_weight_zero_removes_the_anchor_and_keeps_its_rows_as_candidates(mining: Any) -> None:
    x, y = batch(dtype=torch.float64)
    y[0] = x[5]  # row 0 of y is the hardest negative of row 5 of x
    weight = torch.ones(9)
    weight[0] = 0
    options = {"T": "con", "P": "con", "mining": mining, "reduction": "sum"}
    gx, gy, stats = goal.gradients(x, y, weight=weight, **options)
    whole, whole_y, _ = goal.gradients(x, y, **options)
    alone, alone_y, _ = goal.gradients(x, y, weight=1 - weight, **options)
    assert gap(gx + alone, whole) <= 1e-12
    assert gap(gy + alone_y, whole_y) <= 1e-12
    assert stats.index[0, 5] == 0 or mining.name == "semi-hard"


def test_weights_may_be_integers_and_lists() -> None:
    x, y = batch(3, 3)
    expected, _, _ = goal.gradients(x, y, weight=torch.tensor([1.0, 0.0, 2.0]))
    for weight in ([1, 0, 2], [1.0, 0.0, 2.0], torch.tensor([1, 0, 2]), np.array([1, 0, 2])):
        assert torch.equal(goal.gradients(x, y, weight=weight)[0], expected)


# ── stats ───────────────────────────────────────────────────────────────────────────────────────────────


def seen_by(case: Case) -> dict[str, np.ndarray]:
    """`Stats`, entry by entry from the definitions."""
    x, y, ids, y_ids, _ = tensors(*make_inputs(case, 1))
    S = similarities(case.similarity, x, y)
    off = negatives_of(S, ids, y_ids).numpy()
    S = S.numpy()
    K = min(S.shape)
    s_pos = [float(S[k, k]) for k in range(K)]
    s_neg, index = np.full((2, K), -np.inf), np.full((2, K), -1)
    T, P_pos, P_neg = np.zeros((2, K)), np.zeros((2, K)), np.zeros((2, K))
    fallback, recalled, effective = np.zeros((2, K)), np.zeros((2, K)), np.zeros((2, K))
    for side, (s, is_negative) in enumerate(((S, off), (S.T, off.T))):
        for k in range(K):
            row, negatives = s[k].tolist(), np.flatnonzero(is_negative[k]).tolist()
            recalled[side, k] = all(s_pos[k] > row[j] for j in negatives)
            soft, shares = (
                soft_negative(row, [k], negatives, **case.mining_params) if case.mining == "soft" else (0.0, {})
            )
            if not negatives and not shares:
                continue
            hardest = j = hardest_of(row, negatives) if negatives else -1
            if case.mining == "semi-hard":
                inside = selection(case.mining, case.mining_params, s_pos[k], row, negatives)
                if not inside:
                    continue
                (j,) = inside
            if case.mining == "selective":
                fallback[side, k] = abs(s_pos[k] - row[hardest]) < case.mining_params.get("eps", 0.01)
            R = relative_similarities(case.P, case.P_params, k, s_pos, row, negatives, hardest) if negatives else (0, 0)
            at = soft if case.mining == "soft" else row[j]
            effective[side, k] = 1 / math.fsum(q**2 for q in shares.values()) if shares else 0
            s_neg[side, k], index[side, k] = at, j
            T[side, k] = triplet_weight(case.T, case.T_params, s_pos[k], at)
            P_pos[side, k], P_neg[side, k] = pair_weight(case.P, case.P_params, s_pos[k], at, *R)
    return {
        "s_pos": np.array(s_pos),
        "s_neg": s_neg,
        "index": index,
        "T": T,
        "P_pos": P_pos,
        "P_neg": P_neg,
        "active": np.array((T != 0).mean()),
        "fallback": np.array(fallback.mean()),
        "recall_at_1": recalled.mean(1),
        **({"effective": effective} if case.mining == "soft" else {}),
    }


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("P", goal.P)
def test_stats_are_what_they_say(P: str, mining: str) -> None:
    some = [case for case in covering() if (case.P, case.mining) == (P, mining) and case.positives == "pair"]
    for case in some:
        x, y, ids, y_ids, _ = tensors(*make_inputs(case, 1))
        options = {"ids": ids, "y_ids": y_ids}
        _, _, stats = goal.gradients(x, y, similarity=case.similarity, **options, **arguments(case))
        objective = goal.Objective(similarity=case.similarity, **arguments(case))
        objective(x.requires_grad_(), y, **options)
        for name, expected in seen_by(case).items():
            actual = getattr(stats, name)
            assert actual.shape == expected.shape, (case.id, name)
            assert not actual.requires_grad
            np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12, err_msg=f"{case.id}: {name}")
            assert torch.equal(getattr(objective.stats, name), actual)


@every_mining
@every_similarity
@pytest.mark.parametrize("small_tiles", [False, True])
def test_a_collapsed_batch_recalls_nothing(
    mining: Any, similarity: str, small_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All similarities are equal, in whatever order float32 summed them: no anchor beats its negatives."""
    if small_tiles:
        in_tiles(monkeypatch, height=7)
    one = normalize(torch.randn(1, 515, generator=torch.Generator().manual_seed(0)), dim=1)
    _, _, stats = goal.gradients(one.repeat(100, 1), one.repeat(90, 1), mining=mining, similarity=similarity)
    assert stats.recall_at_1.tolist() == [0.0, 0.0]


def test_stats_print_as_one_line() -> None:
    _, _, stats = goal.gradients(torch.eye(3), torch.eye(3) / 2, T="con", P="con")
    assert str(stats) == "3 pairs: s⁺ 0.500, s⁻ 0.000, recall@1 1.000 (x→y) 1.000 (y→x), active 1.000"
    _, _, alone = goal.gradients(torch.ones(1, 2), torch.ones(1, 2))
    assert "s⁻ none" in str(alone)


def test_stats_want_a_call_first() -> None:
    with pytest.raises(RuntimeError, match="no"):
        _ = goal.Objective().stats


def test_stats_are_computed_on_access(monkeypatch: pytest.MonkeyPatch) -> None:
    mined = []
    kept = eager.statistics

    def spy(*args: Any) -> Any:
        mined.append(args)
        return kept(*args)

    monkeypatch.setattr(eager, "statistics", spy)
    objective = goal.Objective(T="con", P="con", mining="all")  # needs no hardest negative
    x, y = leaves()
    objective(x, y).backward()
    assert not mined
    stats = objective.stats
    assert len(mined) == 1
    assert (stats.index >= 0).all()


# ── labelled batches of one modality ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(5))
def test_pairs_make_every_item_with_a_partner_an_anchor_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 6, 17)) * 10
    embedded = torch.arange(17.0)[:, None].expand(17, 3).clone().requires_grad_()
    x, y, ids = goal.pairs(embedded, labels)
    items, partners = x[:, 0].long(), y[:, 0].long()
    paired = [i for i in range(17) if (labels == labels[i]).sum() > 1]
    assert sorted(items.tolist()) == sorted(partners.tolist()) == paired
    assert (items != partners).all()
    assert torch.equal(labels[items], labels[partners])
    assert torch.equal(labels[items], ids)
    (x.sum() + 2 * y.sum()).backward(retain_graph=True)
    assert torch.equal(embedded.grad[paired], torch.full((len(paired), 3), 3.0))
    goal.apply(x, y, ids=ids).backward()


def test_pairs_of_three_are_a_cycle() -> None:
    x, y, ids = goal.pairs(torch.eye(4), torch.tensor([2, 2, 5, 2]))
    assert dict(zip(x.argmax(1).tolist(), y.argmax(1).tolist(), strict=True)) == {0: 1, 1: 3, 3: 0}
    assert ids.tolist() == [2, 2, 2]


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor) and each.layout == torch.strided:
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("P", ["con", "sig-ms", "lin-ms"])
def test_a_large_batch_is_never_a_matrix(mining: str, P: str, monkeypatch: pytest.MonkeyPatch) -> None:
    n, tile = 1500, 1 << 17
    monkeypatch.setattr(eager, "TILE", tile)
    x, y = leaves(n, n, 4, dtype=torch.float32)
    with Largest() as largest:
        goal.apply(x, y, P=P, mining=mining).backward()
    assert largest.bytes <= 8 * 1.1 * tile  # a tile, of floats or of indices; S has 17 times as many entries
    assert x.grad.any()


def test_a_batch_of_thousands_in_tiles_as_they_come() -> None:
    x, y = leaves(6000, 6000, 8, dtype=torch.float32)
    for similarity in ("dot", "order"):
        with Largest() as largest:
            goal.apply(x, y, P="con", similarity=similarity).backward()
        assert largest.bytes < 6000 * 6000  # a quarter of S
    assert x.grad.any()


# ── kernels ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("quarters", [0, 14, 16, 22, 30, 42])
def test_kernels_take_a_margin_beyond_all_similarities(quarters: int) -> None:
    """s⁺ − margin may lie far outside what a key of the scan can hold; the lengths straddle powers of two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator))
    y = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator) + 2 * x)
    x, y = x * 2 ** (-quarters / 4), y * 2 ** (-quarters / 4)
    options: dict[str, Any] = {"T": "con", "P": "con", "mining": goal.mining.semi_hard(margin=0.2)}
    *expected, true = goal.gradients(x.double(), y.double(), **options)
    *found, stats = goal.gradients(x, y, impl="triton", precision="exact", **options)
    assert torch.equal(stats.index < 0, true.index < 0)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


# ── another default device, another default dtype ───────────────────────────────────────────────────────


def everything() -> list[Any]:
    """A little of all that makes tensors of its own."""
    found: list[Any] = []
    for n in (12, 300):  # by definitions, and by sorting
        x, y = batch(n, n, dtype=torch.float32)
        for mining, P, similarity in itertools.product(
            ["semi-hard", "all", "selective"], ["lin-ms", "sig-ms"], SIMILARITIES
        ):
            ids = None if P == "sig-ms" else [k // 2 for k in range(n)]
            *gradients, stats = goal.gradients(x, y, P=P, mining=mining, similarity=similarity, ids=ids)
            found += [*gradients, stats.s_neg, stats.index]
    found += [goal.gradients(1e20 * x, y, ids=[0] * n)[0], goal.gradients(x[:1], y[:1])[0]]
    encoder = nn.Linear(6, 4, bias=False, device="cpu", dtype=torch.float32)
    encoder.weight.data = torch.eye(6, dtype=torch.float32, device="cpu")[:4]
    found += [goal.cached_step(encoder, encoder, (x, y), goal.Objective(), chunk=7).loss, encoder.weight.grad]
    objective = Scheduled(T=varying(goal.T.cir, tau=linear(5.0, 20.0, 10)), P="lin")
    objective.step()
    objective.load_state_dict(objective.state_dict())
    found += [objective(x, y), objective.done]
    curriculum = Curriculum([goal.Objective(mining="semi-hard"), objective], until=[FewSemiHard(0.5)])
    curriculum(x, y)
    curriculum.step()
    curriculum.load_state_dict(curriculum.state_dict())
    found += [batch_integrability(goal.Objective("nca", "lin"), x[:5], y[:5], probes=2, loops=1)]
    found += [lab.integrability("nca", "lin"), lab.compose.nearest_loss("nca", "lin")(x[:, 0], y[:, 0])[0]]
    found += [simulate(T="con", P="con", mining="all", n=8, d=4, steps=3).x]
    return [*found, *(triplet_trajectory("con", "lin", s_pos=0.2, s_neg=0.6, steps=3, space=s).s_neg for s in SPACES)]


SPACES: tuple[Any, ...] = ("plane", "sphere")


@functools.cache
def usually() -> list[Any]:
    """What it is under the usual defaults, for all tests."""
    return everything()


@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_torch_change_nothing(default: Any) -> None:
    before = usually()
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    try:
        if isinstance(default, torch.device):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        after = everything()
    finally:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
    for one, other in zip(before, after, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)
        else:
            assert repr(one) == repr(other)
