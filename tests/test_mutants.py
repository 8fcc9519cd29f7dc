"""Single calls at the places where mutants of the engine outlived the other tests: limits, ties and masks."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import oracle, oracle_similarity
from torch import Tensor

import goal
from goal.engine.path import at_pairs
from goal.engine.types import Block, Masks
from goal.similarity import Dot

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = 1 << 16  # columns of a matrix that is walked through 64 rows at a time


def question(**named: Any) -> dict[str, Any]:
    """What the oracle is asked for, by names alone."""
    return {"T": "con", "T_params": {}, "P_params": {}, "mining": "hardest", "mining_params": {}, **named}


def emitted(*inputs: Tensor, **call: Any) -> tuple[Tensor, ...]:
    """The value and the gradients, of a matrix or of two sides."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    loss = goal.apply_similarity(*leaves, **call) if len(leaves) == 1 else goal.apply(*leaves, **call)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def matrix(positives: list[float], negatives: float) -> np.ndarray:
    S = np.full((len(positives), len(positives)), negatives)
    np.fill_diagonal(S, positives)
    return S


# ── limits that similarities lie on ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [4, 300])  # by the definition, and in sorted order
@pytest.mark.parametrize("P", ["lin-ms", "sig-ms"])
def test_a_positive_at_the_reach_of_the_hardest_negative_is_valid(P: str, size: int) -> None:
    S = matrix(([0.5, 0.25 + 0.1, 0.75, 0.25] * size)[:size], negatives=0.25)
    _, found = emitted(torch.from_numpy(S), T="con", P=P)
    np.testing.assert_allclose(found, oracle_similarity(S, **question(P=P)).G, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [4, 300])
def test_a_positive_so_far_above_that_it_counts_for_nothing(size: int) -> None:
    """exp(2 · (0 − 500)) is 0 in float64, and is left out of the mean."""
    S = matrix(([0.0, 500.0] * size)[:size], negatives=600.0)
    _, found = emitted(torch.from_numpy(S), T="con", P="sig-ms")
    np.testing.assert_allclose(found, oracle_similarity(S, **question(P="sig-ms")).G, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("P", ["lin-ms", "sig-ms"])
@pytest.mark.parametrize("extra", [0, WIDE])
def test_a_negative_at_the_threshold_is_valid(P: str, extra: int) -> None:
    S = matrix([0.5] * 66, negatives=0.5 - 0.1)
    S[3] += 0.25  # with one row to beat, which is in the first of two tiles if there are further columns
    S[65, 7:12] = 0.875  # and a few to be beaten by, in the second
    wide = np.concatenate((S, np.full((66, extra), -8.0)), axis=1)
    _, found = emitted(torch.from_numpy(wide), T="con", P=P)
    expected = oracle_similarity(S, **question(P=P)).G
    np.testing.assert_allclose(found[:, :66], expected, rtol=1e-10, atol=1e-12)
    assert not found[:, 66:].any()


# ── a side that needs no gradient ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("mining", ["hardest", "all"])
@pytest.mark.parametrize("size", [9, 70])  # G made as a matrix, and gathered
@pytest.mark.parametrize("similarity", ["dot", "cosine", "order"])
def test_the_gradient_of_one_side_alone(similarity: str, size: int, mining: str, frozen: int) -> None:
    rng = np.random.default_rng(size)
    sides = [torch.from_numpy(rng.normal(size=(size, 4))) for _ in range(2)]
    call: dict[str, Any] = {"T": "nca", "P": "con", "mining": mining, "similarity": similarity}
    expected = emitted(*sides, **call)[1:]
    sides[1 - frozen].requires_grad_()
    goal.apply(*sides, **call).backward()
    assert sides[frozen].grad is None
    torch.testing.assert_close(sides[1 - frozen].grad, expected[1 - frozen], rtol=1e-12, atol=1e-14)


# ── R⁺ of many pairs, which is made in float64 ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("P", ["lin-ms", "sig-ms"])
@pytest.mark.parametrize("size", [30, 260])  # by the definition, and in sorted order
def test_relative_similarities_have_the_computing_dtype(P: str, size: int) -> None:
    rng = np.random.default_rng(size)
    x, y = (rng.integers(-4, 5, (size, 3)) / 8 for _ in range(2))
    sides = torch.from_numpy(x).float(), torch.from_numpy(y).float()
    gx, gy, stats = goal.gradients(*sides, T="con", P=P)
    expected = oracle(x, y, **question(P=P))
    assert stats.P_pos.dtype == stats.P_neg.dtype == torch.float32
    np.testing.assert_allclose(gx, expected.gx, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gy, expected.gy, rtol=1e-4, atol=1e-6)


# ── similarities that the dtype does not hold ───────────────────────────────────────────────────────────


def beyond(row: int, col: int, sign: float = 1.0) -> list[Tensor]:
    """Two sides in float32 with S = 1 but for one entry of ±10⁴⁰, and for those of its row and column."""
    x, y = torch.eye(6)[:5], torch.eye(6)[:5]
    x[row, 5], y[col, 5] = 1e20, sign * 1e20
    return [x, y]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("T", ["con", "nca"])
def test_what_is_no_negative_may_be_beyond_the_range(T: str, average: bool) -> None:
    sides, ids = beyond(0, 1), torch.tensor([0, 0, 1, 2, 3])
    value, *found = emitted(*sides, T=T, P="con", mining=goal.mining.all_negatives(average), ids=ids)
    named = question(P="con", mining="all", mining_params={"average": average}, ids=ids.numpy())
    expected = oracle(*(side.double().numpy() for side in sides), **{**named, "T": T})
    assert value.item() == pytest.approx(expected.value, rel=1e-6)
    for one, other in zip(found, (expected.gx, expected.gy), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mining", ["hardest", "all", "selective"])
@pytest.mark.parametrize("place", [(0, 0, 1.0), (0, 0, -1.0), (0, 1, 1.0), (0, 1, -1.0)])
def test_the_value_shows_it_with_the_gradient(place: tuple[int, int, float], mining: str) -> None:
    value, *found = emitted(*beyond(*place), T="nca", P="con", mining=mining)
    expected = mining == "all" or place != (0, 1, -1.0)  # which is never the hardest of several
    assert [not bool(one.isfinite().all()) for one in found] == [expected, expected]
    assert bool(value.isfinite()) is not expected


def test_semi_hard_negatives_that_rounding_hides_show() -> None:
    """A row of 10²⁰ makes similarities of 1 and 0.9 equal for the arithmetic, though none of them is beyond it."""
    x, y = torch.eye(6)[:5], torch.eye(6)[:5]
    x[0, 5], x[2, 3] = 1e20, 0.9
    value, gx, gy = emitted(x, y, T="con", P="con", mining="semi-hard")
    assert not value.isfinite()
    for one in (gx, gy):  # of rows 2 (x→y) and 3 (y→x)
        assert one[2:4].isnan().any(1).all()
        assert one[[1, 4]].isfinite().all()


def test_a_semi_hard_negative_that_rounding_only_just_hides() -> None:
    """The rounding is 2√D · eps · 2⁶⁵ = 2⁴⁴, exactly what lies between the positive of row 0 and its one negative."""
    x, y = torch.zeros(3, 4), torch.eye(4)[[2, 1, 3]]
    x[0, 1], x[2, 0] = -(2.0**44), 2.0**65
    value, gx, _ = emitted(x, y, T="con", P="con", mining=goal.mining.semi_hard(2.0**46))
    assert not value.isfinite()
    assert gx[0].isnan().any()


def test_a_single_negative_below_the_range_is_not_none() -> None:
    x, y = torch.eye(4)[:2], torch.eye(4)[:2]
    x[0, 3], y[1, 3] = 1e20, -1e20
    value, gx, _ = emitted(x, y, T="con", P="con", ids=torch.arange(2))
    assert not value.isfinite()
    assert gx[0].isnan().any()


# ── one routine for all similarities ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mining", ["hardest", "semi-hard"])
def test_a_negative_equal_to_a_pair_has_its_bits(mining: str) -> None:
    """Rows in twos, the second x of each equal to the first: s of (0, 1) is s⁺ of row 1, whatever made it."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(32, 203))).float()
    x = torch.nn.functional.normalize(x, dim=1).repeat_interleave(2, dim=0)
    noise = torch.from_numpy(rng.normal(size=(64, 203))).float() * torch.tensor([0.01, 0.02]).repeat(32)[:, None]
    *_, stats = goal.gradients(x, x + noise, mining=mining)
    even = torch.arange(0, 64, 2)
    twins = even[stats.index[0, even] == even + 1]
    assert len(twins) > 8
    assert torch.equal(stats.s_neg[0, twins], stats.s_pos[twins + 1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mining", ["hardest", "all"])
def test_weights_of_their_own_for_both_directions(mining: str, reduction: str) -> None:
    """The objective is the sum of its directions, each weighed and divided by its own weights."""
    rng = np.random.default_rng(1)
    S = torch.from_numpy(rng.normal(size=(5, 5)))
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.5, 3.0], [0.25, 4.0, 1.0, 0.0, 1.0]])
    call: dict[str, Any] = {"T": "nca", "P": "con", "mining": mining, "reduction": reduction}
    value, found = emitted(S, **call, weight=weight)
    off = [torch.stack((weight[0], 0 * weight[1])), torch.stack((0 * weight[0], weight[1]))]
    one, other = (emitted(S, **call, weight=half) for half in off)
    torch.testing.assert_close(value, one[0] + other[0])
    torch.testing.assert_close(found, one[1] + other[1])


# ── limits of weighing ──────────────────────────────────────────────────────────────────────────────────


def test_a_gap_of_exactly_eps_is_outside_the_vanishing_zone() -> None:
    S = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    objective = goal.Objective("con", "con", mining=goal.mining.selective(eps=0.25))
    objective.apply_similarity(S)
    assert objective.stats.fallback == 0
    objective.apply_similarity(S + torch.tensor([[0.0, 2.0**-40, 0.0]] + [[0.0] * 3] * 2, dtype=torch.float64))
    assert objective.stats.fallback > 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_value_has_the_precision_of_the_embeddings_not_of_the_weights(reduction: str) -> None:
    x = torch.eye(4)
    weight = torch.ones(4, dtype=torch.float64)
    assert goal.apply(x, x.flip(0), "nca", "con", reduction=reduction, weight=weight).dtype == torch.float32


def test_an_anchor_beyond_the_range_costs_the_others_no_digit() -> None:
    """S is 1e320 at (0, 0) alone; where the anchors of pair 0 have no part, the gradient is what it is without that."""
    x, y = (torch.eye(6, dtype=torch.float64)[:5] for _ in range(2))
    expected = emitted(x, y, T="nca", P="con")[1:]
    x[0, 5] = y[0, 5] = 1e160
    value, *found = emitted(x, y, T="nca", P="con")
    assert not value.isfinite()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[2:, :5], other[2:, :5], rtol=1e-13, atol=0)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("mining", ["hardest", "semi-hard", "all"])
def test_a_term_never_meets_the_minus_infinity_of_no_negative(mining: str) -> None:
    met: list[bool] = []

    @goal.triplet_weight("meets")
    def meets(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        met.append(bool((s_neg == -torch.inf).any()))
        return torch.sigmoid(s_neg - s_pos)

    met.clear()  # what registering tried it on
    rng = np.random.default_rng(3)
    x, y = (torch.from_numpy(rng.normal(size=(5, 3))) for _ in range(2))
    stats = goal.gradients(x, y, T="meets", P="con", mining=mining, ids=torch.zeros(5, dtype=torch.int64))[2]
    assert not stats.T.any()
    assert met
    assert not any(met)


@pytest.mark.parametrize("P", ["lin-ms", "sig-ms"])
@pytest.mark.parametrize("size", [torch.nan, torch.inf, -torch.inf])
def test_relative_similarities_show_a_pair_that_is_not_finite(size: float, P: str) -> None:
    """They depend on all pairs, so every anchor has NaN at its own pair."""
    S = torch.from_numpy(np.random.default_rng(5).normal(size=(5, 5)) / 16).float()
    S[0, 0] = size
    _, found = emitted(S, T="con", P=P, check_finite=False)
    assert found.diagonal().isnan().all()


def test_pairs_of_a_rank_that_is_not_the_first() -> None:
    """The rank has rows 2 to 4 of six pairs, and takes their entries out of all six."""
    rng = np.random.default_rng(6)
    x, y, value = (torch.from_numpy(rng.normal(size=size)) for size in ((3, 4), (3, 4), 6))
    own = Block(x, y, Masks(6, 6, (6, 6)).block(slice(2, 5), slice(2, 5)))
    gx, gy = at_pairs(Dot(), own, value, (True, True))
    torch.testing.assert_close(gx, value[2:5, None] * y)
    torch.testing.assert_close(gy, value[2:5, None] * x)
