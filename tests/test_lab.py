"""The laboratory against the mathematics: verdicts, curls, losses, factorisations, the algebra, pictures."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch
from torch import Tensor
from torch.nn.functional import softplus

import goal
from goal import lab
from goal.lab import compose
from goal.lab.field import decompose, field_of, gradient_of, work
from goal.lab.read import S_NEG, S_POS, CannotRead, read, torch_function
from goal.terms import Product

pytestmark = pytest.mark.usefixtures("registries", "one_thread")

TERMS_T = [goal.T.con(), goal.T.con(margin=0.2), goal.T.nca(), goal.T.cir()]
TERMS_P = [goal.P.con(), goal.P.lin(), goal.P.sig(), goal.P.lin_ms(), goal.P.sig_ms()]
GRID = list(itertools.product(TERMS_T, TERMS_P))
LOSS = {  # docs/mathematics.md, proven by hand
    ("con", None, "con"): lambda a, b: b - a,
    ("con", None, "lin"): lambda a, b: ((1 - a) ** 2 + b**2) / 2,
    ("con", None, "sig"): lambda a, b: softplus(-2 * (a - 0.5), 1, 50) / 2 + softplus(10 * (b - 0.5), 1, 50) / 10,
    ("con", 0.2, "con"): lambda a, b: torch.relu(b - a + 0.2),
    ("nca", None, "con"): lambda a, b: softplus(10 * (b - a), 1, 50) / 10,
    ("cir", None, "lin"): lambda a, b: softplus(10 * ((1 - a) ** 2 + b**2 - 0.5), 1, 50) / 20,
}
CURLS = {  # between the lines of the switches: d(T P-)/ds+ + d(T P+)/ds-, by hand
    ("nca", "lin"): lambda a, b, s: 10 * s * (1 - s) * ((1 - a) - b),
    ("nca", "sig"): lambda a, b, s: 10 * s * (1 - s) * (torch.sigmoid(1 - 2 * a) - torch.sigmoid(10 * b - 5)),
    ("cir", "con"): lambda a, b, s: 20 * s * (1 - s) * (a + b - 1),
}


def points(count: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.rand(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return drawn[0], drawn[1]


def key(T: Any, P: Any) -> tuple[str, float | None, str]:
    return T.name, T.params.get("margin"), P.name


# ── verdicts ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("T", "P"), GRID, ids=[f"{T.name}-{P.name}-{k}" for k, (T, P) in enumerate(GRID)])
def test_the_grid(T: Any, P: Any) -> None:
    found = lab.integrability(T, P)
    loss = LOSS.get(key(T, P))
    assert found.integrable == (loss is not None)
    assert found.agree
    assert found.proven
    assert bool(found.coupling) == P.name.endswith("-ms")
    if loss is not None:
        assert found.potential is not None
        assert found.potential.expression is not None
        a, b = points()
        difference = found.potential(a, b) - loss(a, b)
        assert (difference - difference[0]).abs().max() <= 1e-12
        assert found.curl == 0
        assert found.rotational_share <= 1e-20
    else:
        assert found.potential is None
        assert found.coupling or found.rotational_share >= 1e-3


@pytest.mark.parametrize(("T", "P"), CURLS)
def test_the_curl_is_that_by_hand(T: str, P: str) -> None:
    found = lab.integrability(T, P)
    a, b = points()
    s = torch.sigmoid(10 * (b - a)) if T == "nca" else torch.sigmoid(10 * ((1 - a) ** 2 + b**2 - 0.5))
    assert found.reading is not None
    came = torch_function(found.curl, found.reading.values)(a, b)
    torch.testing.assert_close(came, CURLS[T, P](a, b, s), rtol=1e-10, atol=1e-12)
    middles = (found.field.at[1:] + found.field.at[:-1]) / 2
    a, b = torch.meshgrid(middles, middles, indexing="ij")
    s = torch.sigmoid(10 * (b - a)) if T == "nca" else torch.sigmoid(10 * ((1 - a) ** 2 + b**2 - 0.5))
    torch.testing.assert_close(found.field.curl, CURLS[T, P](a, b, s), rtol=0.1, atol=0.02)  # means over cells


def test_the_jump_of_a_hinge() -> None:
    found = lab.integrability(goal.T.con(margin=0.2), "lin")
    margin = sp.Symbol("margin", real=True)
    assert found.curl == (1 - S_POS - S_NEG) * sp.DiracDelta(margin + S_NEG - S_POS)
    assert lab.integrability(goal.T.con(margin=0.2), "con").curl == 0
    # a triangle of legs 0.4 over the line: its long side inside the active half is the line itself, moved by 1e-6
    near, far = 1e-6, 0.4
    corners = torch.tensor([[0.1, -0.1 + near], [0.1 + far, -0.1 + far + near], [0.1 + far, -0.1]], dtype=torch.float64)
    came = work(field_of(Product(found.T, found.P)), corners, corners.roll(-1, 0)).sum()
    # only the side along the line does work: ∫ (−(1 − s⁺) + s⁻) ds⁺ with s⁻ = s⁺ − 0.2
    low, high = 0.1, 0.1 + far
    assert abs(came - ((high**2 - low**2) - 1.2 * (high - low))) <= 1e-5


def test_a_hinge_that_the_square_does_not_reach() -> None:
    found = lab.integrability(goal.T.con(margin=3.0), "lin")
    assert found.integrable
    assert found.agree


def test_a_verdict_is_about_the_numbers_that_are_bound() -> None:
    @goal.pair_weight("tilted")
    def tilted(s_pos, s_neg, *, gain=0.0):  # type: ignore[no-untyped-def]
        return 1 + gain * (s_neg + 1), 1.0

    assert lab.integrability("con", "tilted").integrable
    found = lab.integrability("con", goal.P.tilted(gain=1e-3))
    assert not found.integrable
    assert found.agree
    assert found.curl == sp.Symbol("gain", real=True)


def test_terms_that_cannot_be_read_are_judged_by_numbers() -> None:
    @goal.pair_weight("bell")
    def bell(s_pos, s_neg):  # type: ignore[no-untyped-def]
        return torch.erfc(s_pos), torch.erfc(-s_neg)

    found = lab.integrability("con", "bell")
    assert found.integrable
    assert found.symbolic is None
    assert found.potential is not None
    assert found.potential.expression is None
    a, b = points(50)
    field = field_of(Product(found.T, found.P))(a, b)
    for came, true in zip(by_differences(found.potential, a, b), field, strict=True):
        torch.testing.assert_close(came, true, rtol=1e-6, atol=1e-6)
    assert "torch.erfc" in str(found)
    assert "line" in str(found)
    assert not lab.integrability("nca", "bell").integrable
    with pytest.raises(CannotRead, match=r"erfc"):
        found.latex()


def by_differences(loss: Callable[..., Tensor], a: Tensor, b: Tensor, h: float = 1e-4) -> tuple[Tensor, Tensor]:
    return (loss(a + h, b) - loss(a - h, b)) / (2 * h), (loss(a, b + h) - loss(a, b - h)) / (2 * h)


def test_latex_and_repr() -> None:
    found = lab.integrability("cir", "lin")
    text = found.latex()
    assert text.startswith("\\begin{align*}")
    for part in (r"T &= \sigma", r"s^{+}", r"\tau", r"\ell &= \frac{\operatorname{softplus}"):
        assert part in text
    assert "the gradient of a loss" in repr(found)
    other = lab.integrability(goal.T.con(margin=0.2), "lin")
    assert r"\delta" in other.latex()
    assert "9 % of the field is rotational" in repr(other)


def test_a_field_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        decompose(lambda a, b: (a / 0, b))


# ── the field in numbers ────────────────────────────────────────────────────────────────────────────────


def test_work_is_the_difference_of_a_potential_across_kinks_and_jumps() -> None:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(b - a + 0.3) * 2 + torch.sin(3 * a * b) + (a - 0.1).abs() ** 3

    start, end = torch.stack(points(60, seed=1), 1), torch.stack(points(60, seed=2), 1)
    came = work(gradient_of(loss), start, end)
    assert (came - (loss(*end.T) - loss(*start.T))).abs().max() <= 1e-10


def test_the_decomposition_is_the_least_squares_one() -> None:
    def field(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(2 * a) - 0.7 * b * a, torch.cos(a) * b + torch.relu(a - b)

    cells = 5
    found = decompose(field, cells)
    number = np.arange((cells + 1) ** 2).reshape(cells + 1, cells + 1)
    tails = np.concatenate([number[:-1].ravel(), number[:, :-1].ravel()])
    heads = np.concatenate([number[1:].ravel(), number[:, 1:].ravel()])
    incidence = np.zeros((len(tails), number.size))
    incidence[np.arange(len(tails)), heads] += 1
    incidence[np.arange(len(tails)), tails] -= 1
    along = np.concatenate([found.along_pos.numpy().ravel(), found.along_neg.numpy().ravel()])
    best = np.linalg.lstsq(incidence, along)[0]
    rest = along - incidence @ best
    assert found.rotational_share == pytest.approx((rest**2).sum() / (along**2).sum(), rel=1e-9)
    difference = found.potential.numpy().ravel() - best
    np.testing.assert_allclose(difference, difference[0], atol=1e-12)
    assert 0.01 < found.rotational_share < 0.9
    np.testing.assert_allclose(found.rest_pos.numpy().ravel(), rest[: cells * (cells + 1)], atol=1e-12)


def test_a_rotation_has_its_curl_and_a_gradient_has_none() -> None:
    turning = decompose(lambda a, b: (-b, a))
    torch.testing.assert_close(turning.curl, torch.full_like(turning.curl, 2.0))
    assert decompose(lambda a, b: (a, b)).rotational_share <= 1e-25
    assert decompose(lambda a, b: (0 * a, 0 * b)).rotational_share == 0.0


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_read_is_what_is_run() -> None:
    @goal.triplet_weight("everything", statistics=("r_pos_lin",))
    def everything(s_pos, s_neg, *, tau=3.0, margin=0.25, hard=True, r_pos_lin):  # type: ignore[no-untyped-def]
        gap = torch.clamp(s_neg - s_pos, min=-0.5, max=0.75)
        bent = torch.where((gap > margin) & ~(s_pos < 0.1), torch.exp(gap), torch.rsqrt(2 + gap))
        soft = torch.nn.functional.softplus(tau * gap) - torch.nn.functional.logsigmoid(gap)
        low = torch.minimum(s_pos.abs(), s_neg.square()) + torch.maximum(s_neg, torch.tanh(s_pos)) + 1.2
        return bent + soft + low + s_pos.relu() ** 2 + torch.log(2 + s_neg) + r_pos_lin.sqrt() * hard

    reading = read(Product(goal.T.everything(), goal.P.con()))
    a, b = points(500)
    for r in (0.0, 0.25):
        true = goal.T.everything()(a, b, r_pos_lin=torch.full_like(a, r))
        expression = reading.shown(reading.results[0]).subs(sp.Symbol("r_pos_lin", real=True), sp.Rational(r))
        # by SymPy's own arithmetic, point by point
        came = [
            float(reading.bound(expression).subs({S_POS: x, S_NEG: y}).evalf())
            for x, y in zip(a[:40].tolist(), b[:40].tolist(), strict=True)
        ]
        torch.testing.assert_close(torch.tensor(came, dtype=torch.float64), true[:40], rtol=1e-9, atol=1e-9)


def test_parameters_of_one_name_are_told_apart_where_they_differ() -> None:
    @goal.pair_weight("warm")
    def warm(s_pos, s_neg, *, tau=2.0):  # type: ignore[no-untyped-def]
        return torch.exp(-tau * s_pos), torch.exp(tau * s_neg)

    reading = read(Product(goal.T.nca(tau=5.0), goal.P.warm()))
    assert {str(symbol): float(value) for symbol, value in reading.values.items()} == {"tau_T": 5.0, "tau_P": 2.0}
    same = read(Product(goal.T.nca(tau=2.0), goal.P.warm()))
    assert {str(symbol) for symbol in same.values} == {"tau"}


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda s_pos, s_neg: torch.erf(s_neg) + 1, r"T\.mine.*torch\.erf.*line \d+"),
        (lambda s_pos, s_neg: torch.where(s_neg.bool(), 1.0, 2.0) + s_pos**2, r"Tensor\.bool"),
    ],
)
def test_what_cannot_be_read_is_named(function: Any, part: str) -> None:
    goal.triplet_weight("mine")(function)
    with pytest.raises(CannotRead, match=part):
        read(Product(goal.T.mine(), goal.P.con()))


# ── dissection ──────────────────────────────────────────────────────────────────────────────────────────

TRUTH: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "softplus": (
        lambda p, n: softplus(10 * (n - p)) / 10,
        lambda p, n: torch.sigmoid(10 * (n - p)),
        lambda p: 1 + 0 * p,
        lambda n: 1 + 0 * n,
    ),
    "circle": (
        lambda p, n: softplus(10 * ((1 - p) ** 2 + n**2 - 0.5)) / 20,
        lambda p, n: torch.sigmoid(10 * ((1 - p) ** 2 + n**2 - 0.5)),
        lambda p: 1 - p,
        lambda n: n,
    ),
    "NCA": (
        lambda p, n: -torch.log(torch.exp(10 * p) / (torch.exp(10 * p) + torch.exp(10 * n))),
        lambda p, n: 10 * torch.sigmoid(10 * (n - p)),
        lambda p: 1 + 0 * p,
        lambda n: 1 + 0 * n,
    ),
    "exponential": (
        lambda p, n: torch.exp(5 * (n - p)),
        lambda p, n: 5 * torch.exp(5 * (n - p)),
        lambda p: 1 + 0 * p,
        lambda n: 1 + 0 * n,
    ),
    "squared hinge": (
        lambda p, n: torch.relu(n - p + 0.2) ** 2,
        lambda p, n: 2 * torch.relu(n - p + 0.2),
        lambda p: 1 + 0 * p,
        lambda n: 1 + 0 * n,
    ),
    "hinge": (
        lambda p, n: torch.relu(n - p + 0.2),
        lambda p, n: (n - p + 0.2 > 0).double(),
        lambda p: 1 + 0 * p,
        lambda n: 1 + 0 * n,
    ),
    "binomial deviance": (
        lambda p, n: softplus(-2 * (p - 0.5)) / 2 + softplus(10 * (n - 0.5)) / 10,
        lambda p, n: 1 + 0 * p,
        lambda p: torch.sigmoid(1 - 2 * p),
        lambda n: torch.sigmoid(10 * n - 5),
    ),
    "contrastive": (
        lambda p, n: (1 - p) ** 2 + torch.relu(n - 0.3) ** 2,
        lambda p, n: 1 + 0 * p,
        lambda p: 2 * (1 - p),
        lambda n: 2 * torch.relu(n - 0.3),
    ),
    "of the positive alone": (
        lambda p, n: (1 - p) ** 2,
        lambda p, n: 1 + 0 * p,
        lambda p: 2 * (1 - p),
        lambda n: 0 * n,
    ),
    "unreadable": (
        lambda p, n: torch.erf(n - p),
        lambda p, n: 2 / math.pi**0.5 * torch.exp(-((n - p) ** 2)),
        lambda p: 1 + 0 * p,
        lambda n: 1 + 0 * n,
    ),
}


@pytest.mark.parametrize("name", TRUTH)
def test_dissection(name: str) -> None:
    loss, t, p_pos, p_neg = TRUTH[name]
    found = lab.dissect(loss)
    assert found.factors
    assert found.T is not None
    assert found.P is not None
    assert (found.expressions is None) == (name == "unreadable")
    a, b = points()
    came_t = found.T(a, b)
    came_pos, came_neg = found.P(a, b)
    # up to the gauge: one constant for all points
    c = (came_pos[0] / p_pos(a[:1])).item()
    torch.testing.assert_close(came_pos, c * p_pos(a), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(came_neg, c * p_neg(b), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(came_t, t(a, b) / c, rtol=1e-7, atol=1e-9)
    if found.expressions is not None:
        namespace: dict[str, Any] = {"goal": goal, "torch": torch}
        exec(found.source("pasted-one"), namespace)
        torch.testing.assert_close(goal.T.pasted_one()(a, b) + 0 * a, came_t)
        torch.testing.assert_close(goal.P.pasted_one()(a, b)[1] + 0 * b, came_neg)
        assert found.gauge in repr(found)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda p, n: (p * n - 1) ** 2 - p, "is no P⁺"),
        (lambda p, n: torch.relu(n - p + 0.2) + torch.relu(n - 0.5), "is no P⁺"),
        (lambda p, n: softplus(n - p) + 0.01 * p**2 * n, "is no P⁺"),
        (lambda p, n: (p - n) ** 2, "both signs"),
        (lambda p, n: 0 * p, "0 everywhere"),
    ],
)
def test_what_does_not_factor(loss: Any, why: str) -> None:
    found = lab.dissect(loss)
    assert not found.factors
    assert why in found.why
    assert why in repr(found)
    with pytest.raises(ValueError, match="no source"):
        found.source("mine")


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^loss: it is nan at \(s⁺, s⁻\)"):
        lab.dissect(lambda p, n: torch.log(n))
    with pytest.raises(ValueError, match=r"^loss: its gradient is .* at \(s⁺, s⁻\)"):
        lab.dissect(lambda p, n: ((n - p) * (n > p)).square().sqrt())


@pytest.mark.parametrize(("T", "P"), [("nca", "con"), ("cir", "lin"), ("con", "sig")])
def test_dissecting_a_composed_loss_gives_its_terms_back(T: str, P: str) -> None:
    report = lab.integrability(T, P)
    assert report.potential is not None
    found = lab.dissect(report.potential)
    assert found.T is not None
    assert found.P is not None
    a, b = points()
    t, (p_pos, p_neg) = found.T(a, b), found.P(a, b)
    true = Product(report.T, report.P).weights(a, b, {})
    for came, expected in zip((t * p_pos, t * p_neg), (true[0] * true[1], true[0] * true[2]), strict=True):
        torch.testing.assert_close(came, expected + 0 * a, rtol=1e-8, atol=1e-9)


# ── the algebra ─────────────────────────────────────────────────────────────────────────────────────────


def test_products_sums_and_mixtures_are_those_of_their_parts() -> None:
    a, b = points()
    nca, cir, lin, sig = goal.T.nca(tau=5.0), goal.T.cir(), goal.P.lin(), goal.P.sig()
    torch.testing.assert_close(compose.product(nca, cir)(a, b), nca(a, b) * cir(a, b))
    torch.testing.assert_close(compose.plus(nca, cir, amount=3.0)(a, b), nca(a, b) + 3 * cir(a, b))
    for k in (0, 1):
        came = compose.mixture(lin, sig, weight=0.25)(a, b)[k]
        torch.testing.assert_close(came, 0.75 * lin(a, b)[k] + 0.25 * sig(a, b)[k])
    assert compose.mixture(nca, cir).params == {"weight": 0.5, "tau": 5.0, "tau_2": 10.0}
    assert compose.product(nca, goal.T.cir(tau=5.0)).params == {"tau": 5.0}


def test_composed_terms_run_in_every_way() -> None:
    T, P = compose.product(goal.T.con(margin=0.2), "nca"), compose.mixture("lin-ms", "sig-ms", weight=0.3)
    x, y = (torch.nn.functional.normalize(torch.randn(12, 6, dtype=torch.float64), dim=1) for _ in range(2))
    gx, _, _ = goal.gradients(x, y, T=T, P=P)
    parts = [goal.gradients(x, y, T=T, P=each)[0] for each in ("lin-ms", "sig-ms")]
    torch.testing.assert_close(gx, 0.7 * parts[0] + 0.3 * parts[1])
    from goal.kernels.lower import lower

    lower(Product(T, P))
    assert not lab.integrability(T, P).integrable


def test_a_schedule_moves_one_number() -> None:
    term = compose.schedule("con", "lin", steps=4)
    assert [term(step).params["weight"] for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert len({term(step).definition.name for step in range(3)}) == 1


def test_parts_that_do_not_fit_are_refused() -> None:
    for parts, message in (
        (("con", "con"), "say goal.T or goal.P"),
        (("nca", "lin"), "not of one kind"),
        ((goal.T.nca(), goal.P.lin()), "not of one kind"),
        (("lin-ms", "nope"), "not of one kind"),
    ):
        with pytest.raises(ValueError, match=message):
            compose.product(*parts)
    with pytest.raises(ValueError, match=r"'r_neg_exp'.*'beta'.*3\.0 and 10\.0"):
        compose.plus(goal.P.sig_ms(beta=3.0), "sig-ms")
    for bad, message in ((1.5, "within"), (True, "number"), (math.nan, "finite")):
        with pytest.raises((ValueError, TypeError), match=message):
            compose.mixture("con", "lin", weight=bad)
    for steps, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="steps"):
            compose.schedule("con", "lin", steps=steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(("T", "P"), [("nca", "lin"), ("cir", "lin")])
def test_a_field_is_its_nearest_loss_and_the_rest(T: str, P: str) -> None:
    nearest, rest = compose.nearest_loss(T, P), compose.rotational_part(T, P)
    whole, found = lab.integrability(T, P), lab.integrability("con", nearest)
    assert found.integrable
    assert found.proven
    assert found.potential is not None
    assert found.potential.expression is not None
    a, b = points()
    t, p_pos, p_neg = Product(whole.T, whole.P).weights(a, b, {})
    for k, component in enumerate((t * p_pos, t * p_neg)):
        torch.testing.assert_close(nearest(a, b)[k] + rest(a, b)[k], component)
    # as near to it as the loss on the grid, nearly
    left = decompose(field_of(Product(goal.T.con(), rest)))
    size = sum(each.square().sum() for each in (whole.field.along_pos, whole.field.along_neg))
    off = sum(each.square().sum() for each in (left.along_pos, left.along_neg)) / size
    assert whole.rotational_share - 1e-6 <= off <= whole.rotational_share + 0.01
    assert not lab.integrability("con", compose.plus("con", rest, amount=0.5)).integrable or T == "cir"


# ── the map and the pictures ────────────────────────────────────────────────────────────────────────────


def test_the_table_names_the_losses() -> None:
    found = lab.table(["con", goal.T.con(margin=0.3), "nca"], ["con", "lin", "sig-ms"])
    assert found.rows == ["con", "con(margin=0.3)", "nca"]
    cells = [[found.text(i, j) for j in range(3)] for i in range(3)]
    assert [row[0] for row in cells] == ["linear triplet", "triplet", "NCA, InfoNCE with one negative"]
    assert cells[0][1] == "squares of 1 − s⁺ and s⁻"
    assert cells[2][1].startswith("new: not integrable, 8.")
    assert all("other pairs" in row[2] for row in cells)
    lines = str(found).splitlines()
    assert len(lines) == 5
    assert all(line.count("|") == 5 for line in lines if "|" in line)


def test_a_loss_without_a_name_has_none() -> None:
    @goal.pair_weight("cubes")
    def cubes(s_pos, s_neg):  # type: ignore[no-untyped-def]
        return (1 - s_pos) ** 3, (1 + s_neg) ** 3

    assert lab.known_loss(Product(goal.T.con(), goal.P.cubes())) is None
    assert lab.table(["con"], ["cubes"]).text(0, 0) == "a loss without a name"
    twice = compose.plus(goal.P.con(), goal.P.con())
    assert lab.known_loss(Product(goal.T.nca(tau=3.0), twice)) == "NCA, InfoNCE with one negative"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_is_written(suffix: str, tmp_path: Path) -> None:
    T, P = (goal.T.con(margin=0.2), "lin") if suffix == ".png" else ("cir", "sig-ms")
    path = tmp_path / f"picture{suffix}"
    figure = lab.show(lab.integrability(T, P), path)
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(begins)
    assert len(path.read_bytes()) > 20_000
    assert "gradient of no loss" in figure._suptitle.get_text()  # type: ignore[attr-defined]


def test_pictures_of_all_cells(tmp_path: Path) -> None:
    table = lab.table(["nca", "cir"], ["con", "lin"])
    figure = lab.gallery(table, tmp_path / "all.png")
    titles = [axes.get_title().splitlines()[-1] for axes in figure.axes]
    assert titles == [table.text(i, j) for i in (0, 1) for j in (0, 1)]
    assert (tmp_path / "all.png").stat().st_size > 20_000


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.jpg.*\.png, \.svg, \.pdf"):
        lab.gallery(lab.table(["nca"], ["con"]), tmp_path / "all.jpg")
