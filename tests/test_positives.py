"""Positives by ids and single labelled sets, against ordinary autograd of the forms that the literature prints."""

import gc
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

import goal

LABELS = torch.tensor([4, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1, 4, 3])  # at least three of a kind
SINGLE = torch.tensor([7, 0, 0, 1, 1, 1, 8, 2, 2, 2, 2, 9, 3, 3])  # 7, 8 and 9 occur once


def rows(number: int, seed: int = 0, dtype: torch.dtype = torch.float64, dimensions: int = 6) -> Tensor:
    """Rows of norm 1, to be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(number, dimensions, generator=generator, dtype=torch.float64)
    return normalize(drawn, dim=1).to(dtype).requires_grad_()


def check(ours: Callable[..., Tensor], textbook: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The value and the gradient of all inputs agree to 1e-12, and there is a gradient."""
    results = []
    for function in (ours, textbook):
        leaves = [one.detach().clone().requires_grad_() for one in inputs]
        value = function(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    assert all(gradient.abs().max() > 1e-3 for gradient in results[1][1:])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def sets(labels: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(P, N): which candidates are positives, and which negatives; of a single set no row is its own positive."""
    same = labels[:, None] == (labels if others is None else others)
    return (same & ~torch.eye(len(labels), dtype=torch.bool) if others is None else same), ~same


def log_sum(h: Tensor, members: Tensor) -> Tensor:
    """log Σ e^h over the members of each row; rows without any are left out by the caller."""
    return h.masked_fill(~members, -math.inf).logsumexp(1)


def highest(s: Tensor, members: Tensor) -> Tensor:
    return s.masked_fill(~members, -math.inf).amax(1)


def lowest(s: Tensor, members: Tensor) -> Tensor:
    return s.masked_fill(~members, math.inf).amin(1)


# ── a single set of labelled rows ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "labels", [LABELS, SINGLE, torch.zeros(9, dtype=torch.int64)], ids=["all", "some single", "one class"]
)
@pytest.mark.parametrize("tau", [2.0, 14.0])
def test_supervised_contrastive(tau: float, labels: Tensor) -> None:
    """Khosla et al., L_out: the mean over the positives stands outside the logarithm.

    An anchor without positives adds nothing, but counts among the N. Positives repel as candidates, so a batch of a
    single class has a gradient too.
    """

    def textbook(x: Tensor) -> Tensor:
        positive, negative = sets(labels)
        s = x @ x.T
        log_probability = tau * s - log_sum(tau * s, positive | negative)[:, None]
        means = [log_probability[i, members].mean() for i, members in enumerate(positive) if members.any()]
        return -torch.stack(means).sum() / len(x)

    def ours(x: Tensor) -> Tensor:
        mining = goal.mining.soft(tau, over="candidates")
        return goal.apply(
            x, None, "con", "con", ids=labels, mining=mining, positives=goal.positives.soft(0.0), scale=tau
        )

    check(ours, textbook, rows(len(labels)))


@pytest.mark.parametrize("tau", [2.0, 14.0])
def test_neighbourhood_components(tau: float) -> None:
    """Goldberger et al.: −log of the probability of a neighbour of the class, by squared distances of unit rows."""

    def textbook(z: Tensor) -> Tensor:
        x = z / z.norm(dim=1, keepdim=True)
        positive, negative = sets(LABELS)
        h = -tau / 2 * (x[:, None] - x).square().sum(2)
        return -(log_sum(h, positive) - log_sum(h, positive | negative)).mean()

    def ours(z: Tensor) -> Tensor:
        return goal.apply(
            z,
            T=goal.T.nca(tau=tau),
            P="con",
            ids=LABELS,
            mining=goal.mining.soft(tau),
            positives=goal.positives.soft(-tau),
            scale=tau,
            similarity="cosine",
        )

    check(ours, textbook, 1.7 * rows(len(LABELS), 1).detach())


ALPHA, BETA, LAM = 2.0, 12.0, 0.3


def multi_similarity(x: Tensor, labels: Tensor) -> Tensor:
    """Wang et al., eq. 16, without its mining; sums over no rows are 0."""
    positive, negative = sets(labels)
    s = x @ x.T
    near = (-ALPHA * (s - LAM)).exp().masked_fill(~positive, 0).sum(1)
    far = (BETA * (s - LAM)).exp().masked_fill(~negative, 0).sum(1)
    return ((1 + near).log() / ALPHA + (1 + far).log() / BETA).mean()


def our_multi_similarity(x: Tensor, labels: Tensor) -> Tensor:
    return goal.apply(
        x,
        T="con",
        P=goal.P.sig(alpha=ALPHA, beta=BETA, lam=LAM),
        ids=labels,
        mining=goal.mining.soft(BETA),
        positives=goal.positives.soft(ALPHA),
    )


@pytest.mark.parametrize(
    "labels",
    [LABELS, SINGLE, torch.zeros(8, dtype=torch.int64)],
    ids=["all", "without positives", "without negatives"],
)
def test_multi_similarity(labels: Tensor) -> None:
    """The sum over the positives and the sum over the negatives are terms of their own: either stays alone."""
    check(lambda x: our_multi_similarity(x, labels), lambda x: multi_similarity(x, labels), rows(len(labels), 2))


def test_anchors_that_lack_either_keep_nothing_where_a_weight_couples_them() -> None:
    """σ(τ(s̃⁻ − s̃⁺)) has no value without s̃⁺: such anchors are out, and the rest is divided by all of them."""

    def textbook(x: Tensor) -> Tensor:
        positive, negative = sets(SINGLE)
        s, has = x @ x.T, positive.any(1)
        gap = log_sum(4.0 * s, negative)[has] + log_sum(-3.0 * s, positive)[has] * 4 / 3
        return softplus(gap).sum() / 4 / len(x)

    def ours(x: Tensor) -> Tensor:
        mining, positives = goal.mining.soft(4.0), goal.positives.soft(3.0)
        return goal.apply(x, T=goal.T.nca(tau=4.0), P="con", ids=SINGLE, mining=mining, positives=positives)

    check(ours, textbook, rows(len(SINGLE), 3))


def batch_hard(x: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Hermans et al., batch hard: the hinge of the hardest negative and the hardest positive."""
    positive, negative = sets(labels)
    s, has = x @ x.T, positive.any(1)
    return torch.relu(highest(s, negative)[has] - lowest(s, positive)[has] + margin).sum() / len(x)


@pytest.mark.parametrize("labels", [LABELS, SINGLE], ids=["all", "some single"])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_batch_hard(margin: float, labels: Tensor) -> None:
    check(
        lambda x: goal.apply(x, T=goal.T.con(margin=margin), P="con", ids=labels),
        lambda x: batch_hard(x, labels, margin),
        rows(len(labels), 4),
    )


def test_semi_hard_compares_with_the_hardest_positive() -> None:
    """Schroff et al., with the hardest positive: the hardest negative in s⁺ − m < s⁻ < s⁺, if there is one."""
    margin, hinge = 0.3, 0.5  # the hinge is open throughout, so that both ends of the zone matter
    spread = rows(len(LABELS), 5).detach()
    centres = rows(5, 6).detach()
    x = normalize(centres[LABELS] + 0.35 * spread, dim=1)  # classes apart, so that negatives lie below the positives

    def textbook(x: Tensor) -> Tensor:
        positive, negative = sets(LABELS)
        s = x @ x.T
        s_pos = lowest(s, positive)
        below = negative & (s < s_pos[:, None]) & (s > s_pos[:, None] - margin)
        has = below.any(1)
        assert 3 < has.sum() < len(x)
        return torch.relu(highest(s, below)[has] - s_pos[has] + hinge).sum() / len(x)

    def ours(x: Tensor) -> Tensor:
        return goal.apply(x, T=goal.T.con(margin=hinge), P="con", mining=goal.mining.semi_hard(margin), ids=LABELS)

    check(ours, textbook, x)


def test_a_row_of_a_single_set_has_both_roles() -> None:
    """x.grad = ∂l/∂(anchors) + ∂l/∂(candidates), each of which is the gradient of a set of its own."""
    x = rows(len(LABELS), 7)
    goal.apply(x, T="nca", P="con", ids=LABELS).backward()
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    positive, negative = sets(LABELS)
    s = a @ b.T
    (softplus(10.0 * (highest(s, negative) - lowest(s, positive))) / 10.0).mean().backward()
    assert x.grad is not None
    assert a.grad is not None
    assert b.grad is not None
    assert min(a.grad.norm(), b.grad.norm()) > 0.1 * x.grad.norm()
    torch.testing.assert_close(x.grad, a.grad + b.grad, rtol=1e-12, atol=1e-12)


def as_two_sets(x: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """The value and the summed gradient of (x, a copy of x) in the direction x→y."""
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    value = goal.apply(a, b, directions="x→y", **how)
    value.backward()
    assert a.grad is not None
    assert b.grad is not None
    return value.detach(), a.grad + b.grad


def as_one_set(x: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    value = goal.apply(x, **how)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


HARDEST: dict[str, Any] = {"T": "nca", "P": "con", "positives": "hardest"}


def test_a_single_set_equals_itself_and_a_copy_for_the_hardest_positive_of_unit_rows() -> None:
    """With a copy, row i is among the positives of row i, at s = 1: never the hardest, if it has another."""
    x = rows(len(LABELS), 8)
    one, two = as_one_set(x, ids=LABELS, **HARDEST), as_two_sets(x, ids=LABELS, **HARDEST)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    both = goal.apply(x, x.detach().clone(), ids=LABELS, **HARDEST)  # a copy is an anchor again: everything twice
    torch.testing.assert_close(both.detach(), 2 * one[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("why", ["soft positives", "single rows", "short rows"])
def test_a_single_set_is_not_itself_and_a_copy_otherwise(why: str) -> None:
    """Where the row's copy has a share of the pull: among soft positives, as the only one, or at less than the rest."""
    labels = SINGLE if why == "single rows" else LABELS
    x = rows(len(labels), 8).detach()
    if why == "short rows":
        x = torch.cat((0.1 * x[:4].abs(), x[4:].abs()))  # s(i, i) = 0.01 is lower than the rest
    how = {**HARDEST, "ids": labels}
    if why == "soft positives":
        how["positives"] = goal.positives.soft(0.5)
    one, two = as_one_set(x, **how), as_two_sets(x, **how)
    assert (one[0] - two[0]).abs() > 1e-3
    assert (one[1] - two[1]).abs().max() > 1e-3


@pytest.mark.parametrize("positives", ["hardest", "soft"])
def test_gradients_of_a_single_set(positives: str) -> None:
    """(gx, None, stats), gx as autograd has it, and the statistics those of rows as anchors."""
    x = rows(len(SINGLE), 9)
    how: dict[str, Any] = {"T": "nca", "P": "con", "ids": SINGLE, "positives": positives}
    gx, gy, stats = goal.gradients(x.detach(), **how)
    goal.apply(x, **how).backward()
    assert gy is None
    assert isinstance(stats, goal.Stats)
    torch.testing.assert_close(gx, x.grad, rtol=0, atol=0)
    assert gx.abs().max() > 0
    positive, negative = sets(SINGLE)
    s = (x @ x.T).detach()
    s_neg = stats.s_neg if stats.s_neg.dim() == 1 else stats.s_neg[0]
    s_pos = stats.s_pos if stats.s_pos.dim() == 1 else stats.s_pos[0]
    torch.testing.assert_close(s_neg, highest(s, negative), rtol=1e-12, atol=1e-12)
    stands = lowest(s, positive) if positives == "hardest" else -log_sum(-10.0 * s, positive) / 10.0
    torch.testing.assert_close(s_pos, stands, rtol=1e-12, atol=1e-12)  # inf where there is no positive


def test_an_objective_of_a_single_set_takes_the_hardest_positives_by_default() -> None:
    x = rows(len(LABELS), 10)
    objective = goal.Objective()
    usual, asked, soft = (
        as_one_set(x, ids=LABELS, **how)
        for how in ({}, {"positives": goal.positives.hardest()}, {"positives": goal.positives.soft()})
    )
    leaf = x.detach().clone().requires_grad_()
    value = objective(leaf, ids=LABELS)
    value.backward()
    assert leaf.grad is not None
    for other in (usual, asked):
        torch.testing.assert_close((value.detach(), leaf.grad), other, rtol=0, atol=0)
    assert (value - soft[0]).abs() > 1e-3
    assert goal.Objective()(leaf, leaf.detach().clone(), LABELS) != value  # of two sets the pairs are the default


@pytest.mark.parametrize("positives", ["pair", goal.positives.pair()], ids=["name", "object"])
def test_a_single_set_has_no_pairs(positives: str | goal.positives.Positives) -> None:
    with pytest.raises(ValueError, match=r"positives must be 'hardest' or 'soft' where y is left out, got 'pair'"):
        goal.apply(rows(len(LABELS)), ids=LABELS, positives=positives)


# ── two sets, whose positives are rows with equal ids ───────────────────────────────────────────────────────────────


def ours_of_two(x: Tensor, y: Tensor, ids: Tensor, y_ids: Tensor, tau: float, **more: Any) -> Tensor:
    mining, positives = goal.mining.soft(tau, over="candidates"), goal.positives.soft(0.0)
    how: dict[str, Any] = {"mining": mining, "positives": positives, "scale": tau / 2, "ids": ids, "y_ids": y_ids}
    return goal.apply(x, y, "con", "con", **how, **more)


def soft_targets(x: Tensor, y: Tensor, ids: Tensor, y_ids: Tensor, tau: float) -> Tensor:
    """ALBEF and X-VLM: the cross entropy to targets that are uniform over equal ids, the mean of both directions."""
    s, same = tau * (x @ y.T), (ids[:, None] == y_ids).to(x.dtype)
    rows_of, columns_of = same.sum(1, keepdim=True).clamp(min=1), same.sum(0)[:, None].clamp(min=1)
    return (cross_entropy(s, same / rows_of) + cross_entropy(s.T, same.T / columns_of)) / 2


SIZES = {
    "shuffled": (LABELS, LABELS.flip(0)),
    "more of y": (LABELS[:9], LABELS),
    "more of x": (LABELS, LABELS[:11]),
    "ids in x alone": (torch.tensor([0, 1, 5, 2, 6, 0, 1, 6]), torch.tensor([2, 1, 0, 0, 1])),
    "ids in y alone": (torch.tensor([2, 1, 0, 0, 1]), torch.tensor([0, 1, 5, 2, 6, 0, 1, 6])),
    "ids in either alone": (torch.tensor([2, 8, 0, 0, 1]), torch.tensor([0, 9, 5, 2, 6, 0, 1, 6])),
}


@pytest.mark.parametrize("tau", [3.0, 14.0])
@pytest.mark.parametrize("sizes", list(SIZES))
def test_soft_targets(sizes: str, tau: float) -> None:
    """Targets of an anchor whose id the other side lacks are all 0: it adds nothing, and counts in the mean."""
    ids, y_ids = SIZES[sizes]
    check(
        lambda x, y: ours_of_two(x, y, ids, y_ids, tau),
        lambda x, y: soft_targets(x, y, ids, y_ids, tau),
        rows(len(ids), 11),
        rows(len(y_ids), 12),
    )


@pytest.mark.parametrize("direction", ["x→y", "y→x"])
def test_soft_targets_of_a_single_direction(direction: str) -> None:
    ids, y_ids = SIZES["ids in either alone"]

    def textbook(x: Tensor, y: Tensor) -> Tensor:
        s, same = 14.0 * (x @ y.T), (ids[:, None] == y_ids).to(x.dtype)
        s, same = (s, same) if direction == "x→y" else (s.T, same.T)
        return cross_entropy(s, same / same.sum(1, keepdim=True).clamp(min=1)) / 2

    check(
        lambda x, y: ours_of_two(x, y, ids, y_ids, 14.0, directions=direction),
        textbook,
        rows(len(ids), 11),
        rows(len(y_ids), 12),
    )


@pytest.mark.parametrize("sizes", list(SIZES))
def test_hardest_positives_of_two_sets(sizes: str) -> None:
    """The hinge of the hardest positive and the hardest negative, both directions, divided by N and by M."""
    ids, y_ids = SIZES[sizes]

    def textbook(x: Tensor, y: Tensor) -> Tensor:
        s = x @ y.T
        total = torch.zeros((), dtype=s.dtype)
        for side, (positive, negative) in ((s, sets(ids, y_ids)), (s.T, sets(y_ids, ids))):
            has = positive.any(1)
            hinge = torch.relu(highest(side, negative)[has] - lowest(side, positive)[has] + 0.2)
            total = total + hinge.sum() / len(side)
        return total

    check(
        lambda x, y: goal.apply(x, y, goal.T.con(margin=0.2), "con", positives="hardest", ids=ids, y_ids=y_ids),
        textbook,
        rows(len(ids), 13),
        rows(len(y_ids), 14),
    )


def test_row_numbers_play_no_part() -> None:
    """A permutation of y and its ids changes nothing."""
    x, y, order = rows(len(LABELS), 15), rows(len(LABELS), 16), torch.arange(len(LABELS) - 1, -1, -1)
    for positives in ("hardest", "soft"):
        straight = goal.apply(x, y, ids=LABELS, positives=positives)
        turned = goal.apply(x, y[order], ids=LABELS, y_ids=LABELS[order], positives=positives)
        torch.testing.assert_close(straight, turned, rtol=1e-12, atol=1e-12)


# ── errors: the argument, what came, what is allowed ────────────────────────────────────────────────────────────────

X, Y, IDS = rows(6).detach(), rows(6, 1).detach(), torch.tensor([0, 0, 1, 1, 2, 2])
OTHER = torch.tensor([0, 0, 1, 7, 2, 8])  # contradicts IDS in rows 3 and 5

ERRORS: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "labels missing": (lambda: goal.apply(X), ValueError, ["ids", "y", "labels of x"]),
    "labels missing, gradients": (lambda: goal.gradients(X), ValueError, ["ids", "y", "labels of x"]),
    "labels missing, objective": (lambda: goal.Objective()(X), ValueError, ["ids", "y", "labels of x"]),
    "hardest without ids": (
        lambda: goal.apply(X, Y, positives="hardest"),
        ValueError,
        ["positives.hardest", "ids", "None"],
    ),
    "soft without ids": (lambda: goal.apply(X, Y, positives="soft"), ValueError, ["positives.soft", "ids", "None"]),
    "y_ids without ids": (lambda: goal.apply(X, Y, y_ids=IDS, positives="soft"), ValueError, ["y_ids", "ids", "both"]),
    "y_ids of a single set": (lambda: goal.apply(X, ids=IDS, y_ids=IDS), ValueError, ["y_ids", "y is left out", "ids"]),
    "labels as y": (lambda: goal.apply(X, IDS), TypeError, ["y", "int64", "float32"]),
    "labels too few": (lambda: goal.apply(X, ids=IDS[:4]), ValueError, ["ids", "(4,)", "(6,)"]),
    "labels not integers": (lambda: goal.apply(X, ids=IDS.double()), TypeError, ["ids", "float64", "integers"]),
    "no positive of a single set": (lambda: goal.apply(X, ids=torch.arange(6)), ValueError, ["ids", "positive", "x"]),
    "no positive of two sets": (
        lambda: goal.apply(X, Y, ids=IDS, y_ids=IDS + 9, positives="soft"),
        ValueError,
        ["ids", "positive", "x", "y"],
    ),
    "ids contradict pairs": (
        lambda: goal.apply(X, Y, ids=IDS, y_ids=OTHER),
        ValueError,
        ["ids 1", "y_ids 7", "row 3", "2 such rows", "3, 5", "hardest", "soft"],
    ),
    "ids for N rows alone": (
        lambda: goal.apply(X, Y[:4], ids=IDS, positives="soft"),
        ValueError,
        ["y_ids", "6 rows", "4"],
    ),
    "name": (
        lambda: goal.apply(X, Y, positives="softest"),
        ValueError,
        ["positives", "'softest'", "pair, hardest, soft"],
    ),
    "name of an objective": (
        lambda: goal.Objective(positives="mean"),
        ValueError,
        ["positives", "'mean'", "pair, hardest, soft"],
    ),
    "type": (lambda: goal.Objective(positives=3), TypeError, ["positives", "3", "name"]),  # type: ignore[arg-type]
    "circle at 0": (
        lambda: goal.positives.soft(0.0, hardness="circle"),
        ValueError,
        ["goal.positives.soft", "tau", "0.0", "> 0", "circle"],
    ),
    "circle below 0": (
        lambda: goal.positives.soft(-2.0, hardness="circle"),
        ValueError,
        ["goal.positives.soft", "tau", "-2.0", "> 0", "circle"],
    ),
    "hardness": (
        lambda: goal.positives.soft(hardness="square"),
        ValueError,
        ["hardness", "'square'", "linear, circle"],
    ),
    "at": (lambda: goal.positives.soft(at="all"), ValueError, ["at", "'all'", "aggregate, each"]),
    "tensor of two": (
        lambda: goal.positives.soft(torch.tensor([1.0, 2.0])),  # type: ignore[arg-type]
        TypeError,
        ["goal.positives.soft", "tau", "Tensor", "number"],
    ),
    "margin of two": (
        lambda: goal.positives.soft(margin=torch.ones(2)),  # type: ignore[arg-type]
        TypeError,
        ["goal.positives.soft", "'margin'", "Tensor", "number"],
    ),
    "text": (
        lambda: goal.positives.soft("2"),  # type: ignore[arg-type]
        TypeError,
        ["goal.positives.soft", "tau", "'2'", "number"],
    ),
    "not finite": (lambda: goal.positives.soft(math.nan), ValueError, ["goal.positives.soft", "tau", "nan", "finite"]),
    "margin below 0": (lambda: goal.positives.soft(margin=-1.0), ValueError, ["'margin'", "-1.0", ">= 0"]),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors_say_what_came_and_what_is_allowed(case: str) -> None:
    call, kind, words = ERRORS[case]
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert type(error.value) is kind
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message), (word, message)


def test_the_temperature_of_positives_goes_by_its_name() -> None:
    with pytest.raises(TypeError, match=r"parameter 'tau' must be a number"):
        goal.positives.soft("2")  # type: ignore[arg-type]


def test_a_hardness_that_is_a_list() -> None:
    with pytest.raises((TypeError, ValueError), match=r"hardness.*linear, circle"):
        goal.positives.soft(hardness=["linear"])  # type: ignore[arg-type]


def test_weights_of_unequal_sides() -> None:
    """A weight is for N = M; a shape that the message about pairs asks for must not fail in the middle."""
    with pytest.raises(ValueError, match="weight"):
        goal.apply(X, Y[:4], ids=IDS, y_ids=IDS[:4], weight=torch.ones(4), positives="soft")


# ── precision: float32 against the stored matrix in float32 ─────────────────────────────────────────────────────────

KINDS = ("unit rows", "pairs twice", "y twice", "a row of norm 10", "near collapse")
EPS = torch.finfo(torch.float32).eps


def batch(kind: str, seed: int) -> list[Tensor]:
    x, y, centre = (rows(number, 3 * seed + at, torch.float32, 16) for at, number in enumerate((24, 24, 1)))
    x, y = x.detach(), y.detach()
    if kind == "pairs twice":
        x[1::2] = x[::2]
    if kind in ("pairs twice", "y twice"):
        y[1::2] = y[::2]
    if kind == "a row of norm 10":
        x[0] *= 10
    if kind == "near collapse":  # all rows within 1e-3 of another
        return [normalize(centre.detach() + 4e-4 * side, dim=1) for side in (x, y)]
    return [x, y]


def errors(loss: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], truth: list[Tensor]) -> Tensor:
    """The relative 2-norm error of both gradients."""
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(both(loss, inputs), truth, strict=True)])


def both(loss: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    x, y = (side.detach().clone().requires_grad_() for side in inputs)
    return list(torch.autograd.grad(loss(x, y), (x, y)))


@pytest.mark.parametrize("tau", [20.0, 100.0, 300.0])
@pytest.mark.parametrize("kind", KINDS)
def test_infonce_in_float32_is_as_precise_as_the_stored_matrix(kind: str, tau: float) -> None:
    """The error against float64 is at most twice that of F.cross_entropy, and two roundings; median of ten batches."""

    def stored(x: Tensor, y: Tensor) -> Tensor:
        s, pairs = tau * (x @ y.T), torch.arange(len(x))
        return (cross_entropy(s, pairs) + cross_entropy(s.T, pairs)) / 2

    objective, ratios = goal.recipe("infonce", tau=tau), []
    for seed in range(10):
        inputs = batch(kind, seed)
        truth = both(stored, [side.double() for side in inputs])
        assert min(gradient.norm() for gradient in truth) > 1e-4
        ratios.append(errors(objective, inputs, truth) / (2 * errors(stored, inputs, truth) + 2 * EPS))
    assert torch.stack(ratios).median(0).values.max() <= 1


# ── memory: what a loss keeps ───────────────────────────────────────────────────────────────────────────────────────


def matrices(number: int) -> list[tuple[int, ...]]:
    """Shapes of the living tensors of at least number² elements; also of those that only C++ refers to."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.layout is torch.strided]
    return [tuple(one.shape) for one in tensors if one.numel() >= number * number]


@pytest.mark.parametrize("positives", ["pair", "hardest", "soft", "single set"])
def test_a_loss_keeps_no_matrix_after_backward(positives: str) -> None:
    number = 64
    x, y = rows(number, 20), rows(number, 21)
    before = matrices(number)
    kept = x.detach() @ y.detach().T
    assert len(matrices(number)) == len(before) + 1  # a matrix is seen
    del kept
    for mining in goal.mining.RULES:
        how: dict[str, Any] = {"T": "nca", "P": "con", "mining": mining, "ids": torch.arange(number) // 4}
        loss = goal.apply(x, **how) if positives == "single set" else goal.apply(x, y, positives=positives, **how)
        loss.backward()
        assert matrices(number) == before, mining
        assert loss.grad_fn is not None


# ── torch.compile ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mining", ["hardest", "soft"])
@pytest.mark.parametrize("positives", ["hardest", "soft"])
@pytest.mark.parametrize("sets_of", [1, 2])
def test_one_graph_equals_eager(sets_of: int, positives: str, mining: str) -> None:
    torch._dynamo.reset()
    objective = goal.Objective("nca", "con", positives=positives, mining=mining)
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    found = []
    for call in (objective, compiled):
        leaves = [rows(len(LABELS), 22), rows(len(LABELS), 23)][:sets_of]
        value = call(*leaves, ids=LABELS)
        value.backward()
        found.append((value.detach(), *(leaf.grad for leaf in leaves), objective.stats.s_pos, objective.stats.s_neg))
    assert found[0][1].abs().max() > 0
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)
