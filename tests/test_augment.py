"""Made rows against their formulas, and the objective in the augmented space against a dense float64 truth."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import goal
from goal.candidates import Augmented, Made, interpolate, mixup
from tests import oracle

pytestmark = pytest.mark.usefixtures("one_thread")


def embeddings(n: int, d: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ── interpolation within an id ──────────────────────────────────────────────────────────────────────────


def test_two_items_are_joined_by_the_formula() -> None:
    x, n = embeddings(2), 3
    rows, ids = interpolate(x, torch.tensor([4, 4]), n, seeded(0))
    a, b = x
    points = [(k * a + (n + 1 - k) * b) / (n + 1) for k in range(1, n + 1)]
    expected = torch.stack([p / p.norm() for p in points])
    order = [0, 1, 2] if torch.allclose(rows[0], expected[0]) else [2, 1, 0]
    torch.testing.assert_close(rows, expected[order])
    assert ids.tolist() == [4] * n


@pytest.mark.parametrize(("sizes", "lines"), [([2, 2, 2], 3), ([3], 3), ([5, 1, 2], 6), ([1, 1], 0)])
def test_a_ring_joins_all_items_of_an_id_and_of_no_other(sizes: list[int], lines: int) -> None:
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[
        torch.randperm(sum(sizes), generator=seeded(1))
    ]
    x = torch.eye(len(ids))  # a row tells its origins
    for seed in range(3):
        rows, of = interpolate(x, ids, 2, seeded(seed))
        assert len(rows) == len(of) == 2 * lines
        for row, own in zip(rows, of, strict=True):
            origins = row.nonzero().flatten()
            assert ids[origins].tolist() == [own, own]
        degree = (rows[: len(rows) // 2] != 0).sum(0)
        sizes_of = torch.tensor(sizes)[ids]
        assert degree.tolist() == torch.where(sizes_of > 2, 2, sizes_of - 1).tolist()


def test_the_ring_is_random_and_the_generator_decides() -> None:
    x, ids = torch.eye(8), torch.zeros(8, dtype=torch.int64)
    found = [interpolate(x, ids, 1, seeded(seed)).rows for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ── mixtures between ids ────────────────────────────────────────────────────────────────────────────────


def test_a_mixture_is_mostly_its_own_item_and_never_with_its_own_id() -> None:
    ids = torch.tensor([7, 3, 7, 9, 3, 7])
    x = torch.eye(6, dtype=torch.float64)
    rows, of = mixup(x, ids, 50, seeded(0))
    assert torch.equal(of, ids.repeat(50))
    partners = set()
    for place, row in enumerate(rows):
        own = place % 6
        (other,) = [j for j in row.nonzero().flatten().tolist() if j != own]
        assert ids[other] != ids[own]
        assert row[own] >= row[other] > 0
        assert row.norm() == pytest.approx(1)
        partners.add((own, other))
    assert len(partners) == sum(int(a != b) for a in ids for b in ids), "every item of another id is drawn"


def test_the_share_is_uniform_from_one_half_to_one() -> None:
    rows = mixup(torch.eye(2, dtype=torch.float64), torch.tensor([0, 1]), 4000, seeded(0)).rows
    shares = (rows / rows.sum(1, keepdim=True)).amax(1)  # of the greater part
    quantiles = torch.quantile(shares, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0], abs=0.01)


def test_without_a_second_id_there_is_nothing_to_mix() -> None:
    with pytest.raises(ValueError, match="all ids are the same"):
        mixup(torch.eye(3), torch.zeros(3, dtype=torch.int64))


# ── both ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", [interpolate, mixup])
def test_the_gradient_flows_to_the_origins(make: Any) -> None:
    x, ids = embeddings(6).requires_grad_(), torch.tensor([0, 1, 0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda x: make(x, ids, 2, seeded(0)).rows, x)


@pytest.mark.parametrize("make", [interpolate, mixup])
def test_what_is_refused(make: Any) -> None:
    x, ids = torch.eye(3), torch.tensor([0, 0, 1])
    for n, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="n must be a whole number >= 1"):
            make(x, ids, n)
    with pytest.raises(ValueError, match="ids must have shape"):
        make(x, ids[:2])
    with pytest.raises(TypeError, match="x must have one of the dtypes"):
        make(x.long(), ids)


def test_opposite_rows_do_not_blow_up() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    interpolate(x, torch.zeros(2, dtype=torch.int64), 1).rows.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() <= 1000


# ── the objective in the augmented space ────────────────────────────────────────────────────────────────


def one_way(
    anchors: np.ndarray,
    positives: np.ndarray,
    candidates: np.ndarray,
    ids: list[int],
    of: list[int],
    case: dict[str, Any],
) -> tuple[np.ndarray, float]:
    """(K, K + A) G and the value of one direction, anchor by anchor; the first K candidates are the positives."""
    S = anchors @ candidates.T
    K = len(anchors)
    s_pos = [float(anchors[k] @ positives[k]) for k in range(K)]
    G, value = np.zeros_like(S), 0.0
    for k in range(K):
        row = S[k].tolist()
        negatives = [j for j in range(len(row)) if j != k and of[j] != ids[k]]
        hardest = oracle.hardest_of(row, negatives)
        relative = oracle.relative_similarities(case["P"], {}, k, s_pos, row, negatives, hardest)
        for j, m in oracle.selection(case["mining"], {}, s_pos[k], row, negatives).items():
            t = oracle.triplet_weight(case["T"], case["T_params"], s_pos[k], row[j])
            p_pos, p_neg = oracle.pair_weight(case["P"], {}, s_pos[k], row[j], *relative)
            G[k, j] += case["weight"][k] * m * t * p_neg
            G[k, k] -= case["weight"][k] * m * t * p_pos
            value += (
                case["weight"][k] * m * oracle.potential(case["T"], case["T_params"], case["P"], {}, s_pos[k], row[j])
            )
    return G, value


def truth(x: Tensor, y: Tensor, made: Made, ids: list[int], y_ids: list[int], case: dict[str, Any]) -> tuple[Any, ...]:
    """(value, ∂l/∂x, ∂l/∂y), the part through the made rows by autograd from its dense gradient there."""
    X, Y, C = (side.detach().numpy() for side in (x, y, made.rows))
    of = made.ids.tolist()
    forth, value = one_way(X, Y, np.concatenate([Y, C]), ids, y_ids + of, case)
    back, more = one_way(Y, X, np.concatenate([X, C]), y_ids, ids + of, case)
    k = len(X)
    gx = forth @ np.concatenate([Y, C]) + back[:, :k].T @ Y
    gy = back @ np.concatenate([X, C]) + forth[:, :k].T @ X
    gc = torch.from_numpy(forth[:, k:].T @ X + back[:, k:].T @ Y)
    through = torch.autograd.grad(made.rows, (x, y), gc)
    scale = {"mean": math.fsum(case["weight"]), "sum": 1.0}[case["reduction"]]
    sides = (torch.from_numpy(g) + t for g, t in zip((gx, gy), through, strict=True))
    return (value + more) / scale, *(side / scale for side in sides)


TERMS: list[tuple[str, dict[str, float], str]] = [
    ("con", {"margin": 0.4}, "con"),
    ("cir", {}, "sig-ms"),
    ("nca", {"tau": 4.0}, "lin-ms"),
]


@pytest.mark.parametrize("augment", ["interpolate", "mixup"])
@pytest.mark.parametrize("mining", ["hardest", "semi-hard", "all", "selective"])
@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_augmented_objective_is_the_dense_truth(augment: str, mining: str, terms: Any, reduction: str) -> None:
    T, T_params, P = terms
    k = 8
    x, y = (embeddings(k, 4, seed).requires_grad_() for seed in (1, 2))
    ids = y_ids = [0, 0, 1, 1, 6, 6, 2, 5]
    weight = [1.0, 0.5, 2.0, 1.0, 0.0, 1.0, 3.0, 1.0]
    case = {"T": T, "T_params": T_params, "P": P, "mining": mining, "reduction": reduction, "weight": weight}
    inner = goal.Objective(goal.T[T](**T_params), P, mining=mining, reduction=reduction)
    objective = Augmented(inner, augment, n=2)
    torch.manual_seed(5)
    value = objective(x, y, torch.tensor(ids), torch.tensor(y_ids), torch.tensor(weight, dtype=torch.float64))
    found = torch.autograd.grad(value, (x, y))
    torch.manual_seed(5)
    make = {"interpolate": interpolate, "mixup": mixup}[augment]
    made = make(torch.cat([x, y]), torch.tensor(ids + y_ids), 2)
    expected, *gradients = truth(x, y, made, ids, y_ids, case)
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert all(g.abs().max() > 0 for g in gradients)
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_made_row_is_met_and_its_gradient_reaches_both_origins() -> None:
    x = torch.eye(3, dtype=torch.float64, requires_grad=True)
    y = torch.full((3, 3), 3**-0.5, dtype=torch.float64, requires_grad=True)
    objective = Augmented(goal.Objective("con", "con", reduction="sum"), n=1)
    plain = torch.autograd.grad(goal.apply(x, y, "con", "con", reduction="sum"), (x, y))
    found = torch.autograd.grad(objective(x, y), (x, y))
    assert (objective.stats.index[1] >= 3).all()
    assert not torch.allclose(found[0], plain[0])
    assert not torch.allclose(found[1], plain[1])


def test_ids_default_to_the_pairs_and_y_ids_to_ids() -> None:
    x, y = embeddings(5, seed=1), embeddings(5, seed=2)
    objective = Augmented(goal.Objective())
    found = []
    for given in ({}, {"ids": torch.arange(5)}, {"ids": torch.arange(5), "y_ids": torch.arange(5)}):
        torch.manual_seed(0)
        found.append(objective(x, y, **given).item())
    assert found[0] == found[1] == found[2]


def test_labelled_batches_of_one_modality() -> None:
    embedded = embeddings(9).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 5, 1])
    x, y, ids = goal.pairs(embedded, labels)
    objective = Augmented(goal.Objective("cir", "lin"))
    objective(x, y, ids).backward()
    assert embedded.grad is not None
    assert (embedded.grad[labels == 5] == 0).all(), "an item without a partner is in no pair"
    assert (embedded.grad[labels != 5].abs().sum(1) > 0).all()


def test_cosine_is_dot_on_unit_rows() -> None:
    x, y = (3 * embeddings(6, seed=seed) for seed in (1, 2))
    x.requires_grad_()
    found = []
    for similarity, side in (("cosine", x), ("dot", normalize(x, dim=1))):
        torch.manual_seed(0)
        unit = y if similarity == "cosine" else normalize(y, dim=1)
        value = Augmented(goal.Objective(similarity=similarity), "mixup")(side, unit)
        found.append((value.detach(), *torch.autograd.grad(value, x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mining", ["hardest", "semi-hard", "all", goal.mining.selective(0.2)], ids=str)
def test_stats_are_those_of_both_directions(mining: Any) -> None:
    x, y = embeddings(6, 3, seed=1), embeddings(6, 3, seed=2)
    objective = Augmented(goal.Objective(mining=mining), "mixup")
    with pytest.raises(RuntimeError, match="there was none"):
        _ = objective.stats
    torch.manual_seed(0)
    objective(x, y)
    found = objective.stats
    torch.manual_seed(0)
    made = mixup(torch.cat([x, y]), torch.arange(6).repeat(2))
    ids = torch.arange(6)
    of = torch.cat([ids, made.ids])
    forth = goal.gradients(x, torch.cat([y, made.rows]), mining=mining, ids=ids, y_ids=of)[2]
    back = goal.gradients(torch.cat([x, made.rows]), y, mining=mining, ids=of, y_ids=ids)[2]
    for name in ("s_neg", "index", "T", "P_pos", "P_neg"):
        assert torch.equal(getattr(found, name), torch.stack([getattr(forth, name)[0], getattr(back, name)[1]])), name
    assert torch.equal(found.recall_at_1, torch.stack([forth.recall_at_1[0], back.recall_at_1[1]]))
    assert torch.equal(found.s_pos, forth.s_pos)
    assert found.active == (found.T != 0).double().mean()
    if mining not in ("hardest", "semi-hard", "all"):
        hardest = goal.gradients(x, torch.cat([y, made.rows]), ids=ids, y_ids=of)[2].s_neg[0]
        other = goal.gradients(torch.cat([x, made.rows]), y, ids=of, y_ids=ids)[2].s_neg[1]
        near = (torch.stack([hardest, other]) - found.s_pos).abs() < 0.2
        assert found.fallback == near.double().mean()
        assert near[0].sum() != near[1].sum()


def test_what_the_objective_refuses() -> None:
    with pytest.raises(ValueError, match=r"augment='interpolated' is not known\. Did you mean 'interpolate'"):
        Augmented(goal.Objective(), "interpolated")
    with pytest.raises(ValueError, match="order"):
        Augmented(goal.Objective(similarity="order"))
    with pytest.raises(TypeError, match=r"goal\.Objective"):
        Augmented(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be"):
        Augmented(goal.Objective(), n=0)
    with pytest.raises(ValueError, match="same number of rows"):
        Augmented(goal.Objective())(torch.eye(3), torch.eye(3)[:2])


# ── what makes it possible: weights of each direction ───────────────────────────────────────────────────


@pytest.mark.parametrize("mining", ["hardest", "semi-hard", "all", "selective"])
@pytest.mark.parametrize("P", ["con", "lin-ms", "sig-ms"])
def test_directions_add_up(mining: str, P: str) -> None:
    x, y = embeddings(9, 5, 1), embeddings(12, 5, 2)
    weight = torch.arange(9) % 4 / 2
    ids, y_ids = torch.arange(9) // 2, torch.arange(12) // 2
    given: dict[str, Any] = {"T": "cir", "P": P, "mining": mining, "ids": ids, "y_ids": y_ids}
    weights = [*torch.eye(2)[:, :, None] * weight, weight.expand(2, -1), weight]
    forth, back, same, whole = ((*goal.gradients(x, y, **given, weight=w)[:2],) for w in weights)
    for side in range(2):
        torch.testing.assert_close(forth[side] + back[side], whole[side])
        torch.testing.assert_close(same[side], whole[side])
        assert not torch.allclose(forth[side], back[side])
    values = [goal.apply(x, y, **given, weight=w) for w in weights]
    torch.testing.assert_close(values[0] + values[1], values[3])
    torch.testing.assert_close(values[2], values[3])
    assert values[0] != values[1]


@pytest.mark.parametrize("mining", ["hardest", "selective"])
def test_kernels_weigh_directions_as_well(mining: str) -> None:
    x, y = embeddings(4, 5, 1).float(), embeddings(5, 5, 2).float()
    weight = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    given: dict[str, Any] = {"T": "nca", "P": "lin", "mining": mining}
    found, expected = (goal.gradients(x, y, **given, weight=weight, impl=impl) for impl in ("triton", "torch"))
    for side in range(2):
        torch.testing.assert_close(found[side], expected[side], rtol=1e-4, atol=1e-5)


def test_the_weights_of_a_direction_move_that_direction_alone() -> None:
    S = torch.tensor([[0.9, 0.1], [0.4, 0.8]], requires_grad=True)
    weight = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    goal.apply_similarity(S, "con", "con", reduction="mean", weight=weight).backward()
    assert S.grad is not None
    assert S.grad.tolist() == [[-0.25, 0.25], [0.75, -0.75]]


def test_weights_of_a_wrong_shape_are_refused() -> None:
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\).* or \(2, 3\).*got \(3, 2\)"):
        goal.apply(x, x, weight=torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"got -1.0 at position 1, 2"):
        goal.apply(x, x, weight=torch.tensor([[1.0, 1, 1], [1, 1, -1]]))
