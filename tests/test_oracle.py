"""The oracle against arithmetic by hand, numerical differentiation and identities; what the table covers.

In the comments a = ln 2 / 2 and b = ln 2 / 10, so that e^{2a} = e^{10b} = 2.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from oracle import (
    Array,
    Params,
    Result,
    oracle,
    oracle_similarity,
    parts_of_con,
    potential,
    similarity_gradient,
    similarity_of,
)
from table import (
    BY_IDS,
    DIRECTIONS,
    IDS,
    INTEGRABLE,
    MINING,
    ON_GRID,
    PAIR,
    REDUCTIONS,
    SCALES,
    SHAPES,
    SIMILARITIES,
    TERMS_P,
    TERMS_T,
    Case,
    cases,
    covering,
    make_inputs,
    stays_integrable,
)

e, ln = np.exp, np.log
a, b = ln(2) / 2, ln(2) / 10


def on(S: list[list[float]] | Array, T: str = "con", P: str = "con", **options: Any) -> Result:
    """The oracle on a matrix, sums instead of means unless told."""
    defaults: dict[str, Any] = {
        "T_params": {},
        "P_params": {},
        "mining": "hardest",
        "mining_params": {},
        "reduction": "sum",
    }
    return oracle_similarity(S, T=T, P=P, **(defaults | options))


def close(actual: object, expected: object) -> None:
    assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-13, atol=1e-14)


def near(actual: object, expected: object) -> None:
    """What is so in a limit."""
    assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-5, atol=1e-5)


# ── both directions, reductions, values ────────────────────────────────────────────────────────────────


def test_two_pairs_by_hand() -> None:
    # x→y: row 0 (s⁺ 0.5, s⁻ 0.3), row 1 (0.4, 0.1); y→x: column 0 (0.5, 0.1), column 1 (0.4, 0.3).
    # Each adds +1 at its negative and −1 at its pair; values −0.2, −0.3, −0.4, −0.1.
    result = on([[0.5, 0.3], [0.1, 0.4]])
    close(result.G, [[-2, 2], [2, -2]])
    close(result.value, -1.0)
    close(result.s_pos, [0.5, 0.4])
    close(result.s_neg, [[0.3, 0.1], [0.1, 0.3]])
    assert result.index.tolist() == [[1, 0], [1, 0]]
    assert result.gx is result.gy is result.r_pos is result.r_neg is None
    mean = on([[0.5, 0.3], [0.1, 0.4]], reduction="mean")  # K = 2
    close(mean.G, [[-1, 1], [1, -1]])
    close(mean.value, -0.5)


def test_hinge_by_hand() -> None:
    # s⁻ − s⁺ + 0.2: row 0: 0.4 − 0.5 + 0.2 = 0.1, row 1: −0.15, column 0: −0.2,
    # column 1: 0.4 − 0.45 + 0.2 = 0.15.
    result = on([[0.5, 0.4], [0.1, 0.45]], T_params={"margin": 0.2})
    close(result.G, [[-1, 2], [0, -1]])
    close(result.value, 0.25)
    # with P = lin: P⁺ = 1 − s⁺ = 0.5 and 0.55, P⁻ = 0.4; the value is the violation of every negative:
    # (0.4 − 0.5) + (0.1 − 0.45) + (0.1 − 0.5) + (0.4 − 0.45) = −0.9.
    result = on([[0.5, 0.4], [0.1, 0.45]], P="lin", T_params={"margin": 0.2})
    close(result.G, [[-0.5, 0.8], [0, -0.55]])
    close(result.value, -0.9)


def test_circle_by_hand() -> None:
    # All s = 0.5: (1 − s⁺)² + s⁻² − ½ = 0, T = ½, P⁺ = P⁻ = ½: each of 4 anchors ∓¼, value ln 2 / 20 each.
    result = on([[0.5, 0.5], [0.5, 0.5]], T="cir", P="lin")
    close(result.G, [[-0.5, 0.5], [0.5, -0.5]])
    close(result.value, 4 * ln(2) / 20)


# One triplet, s⁺ = 0.5 and s⁻ = 0.5 + ln 3 / 10, its R sets empty.
S_NEG = 0.5 + ln(3) / 10
Z = 0.25 + S_NEG**2 - 0.5
T_AT: list[tuple[str, Params, float]] = [
    ("con", {}, 1),
    ("con", {"margin": 0.2}, 1),
    ("nca", {}, 3 / 4),  # σ(10 · ln 3 / 10) = 3 / (3 + 1)
    ("nca", {"tau": 20.0}, 9 / 10),  # σ(2 ln 3) = 9 / (9 + 1)
    ("cir", {}, 1 / (1 + e(-10 * Z))),
    ("cir", {"tau": 5.0}, 1 / (1 + e(-5 * Z))),
]
P_AT: list[tuple[str, Params, float, float]] = [
    ("con", {}, 1, 1),
    ("lin", {}, 0.5, S_NEG),
    ("sig", {}, 1 / 2, 3 / 4),  # σ(0), σ(ln 3)
    ("sig", {"alpha": 4.0, "beta": 20.0, "lam": 0.5}, 1 / 2, 9 / 10),
    ("sig", {"alpha": ln(3) / 0.1, "lam": 0.4}, 1 / 4, 1 / (1 + e(-1) / 3)),  # σ(−ln 3), σ(1 + ln 3)
    ("lin-ms", {}, 0.5, S_NEG),
    ("sig-ms", {}, 1, 3),  # 1 / e⁰, 1 / e^{−ln 3}
    ("sig-ms", {"self_term": True}, 1 / 2, 3 / 4),  # 1 / (1 + 1), 1 / (⅓ + 1)
    # e^{−ln 3}, e^{20(0.1 + ln 3 / 10)}
    ("sig-ms", {"alpha": ln(3) / 0.1, "beta": 20.0, "lam": 0.4}, 1 / 3, 9 * e(2)),
]


@pytest.mark.parametrize(("T", "T_params", "t"), T_AT)
@pytest.mark.parametrize(("P", "P_params", "p_pos", "p_neg"), P_AT)
def test_one_triplet_by_hand(
    T: str, T_params: Params, t: float, P: str, P_params: Params, p_pos: float, p_neg: float
) -> None:
    S = np.array([[0.5, S_NEG]])
    close(on(S, T, P, T_params=T_params, P_params=P_params).G, [[-t * p_pos, t * p_neg]])
    close(on(S.T, T, P, T_params=T_params, P_params=P_params).G, [[-t * p_pos], [t * p_neg]])


def test_values_by_hand() -> None:
    violation = ln(3) / 10
    margin = {"margin": 0.2}
    expected: list[tuple[str, Params, str, Params, float]] = [
        ("con", {}, "con", {}, violation),
        ("con", margin, "con", {}, violation + 0.2),
        ("con", {}, "lin", {}, 0.5**2 / 2 + S_NEG**2 / 2),
        ("con", margin, "lin", {}, violation),
        ("con", {}, "sig", {}, ln(1 + 1) / 2 + ln(1 + 3) / 10),
        ("con", {}, "sig", {"alpha": 4.0, "beta": 20.0}, ln(1 + 1) / 4 + ln(1 + 9) / 20),
        ("con", margin, "sig", {}, violation),
        ("nca", {}, "con", {}, ln(1 + 3) / 10),
        ("nca", {"tau": 20.0}, "con", {}, ln(1 + 9) / 20),
        ("nca", {}, "lin", {}, violation),
        ("nca", {}, "sig", {}, violation),
        ("cir", {}, "lin", {}, ln(1 + e(10 * Z)) / 20),
        ("cir", {"tau": 5.0}, "lin", {}, ln(1 + e(5 * Z)) / 10),
        ("cir", {}, "con", {}, violation),
        ("cir", {}, "sig", {}, violation),
        *((T, {}, P, {}, violation) for T in ("con", "nca", "cir") for P in ("lin-ms", "sig-ms")),
    ]
    for T, T_params, P, P_params, value in expected:
        close(on([[0.5, S_NEG]], T, P, T_params=T_params, P_params=P_params).value, value)
    close(on([[0.5, 0.1]], T_params=margin).value, 0)  # beyond the margin: relu(0.1 − 0.5 + 0.2)


# ── relative similarities ──────────────────────────────────────────────────────────────────────────────

THREE = [
    [0.5, 0.5 + b, 0.5],
    [0.0, 0.5 - a, 0.5],
    [0.3, 0.2, 0.5 + a],
]
# s⁺ = (0.5, 0.153…, 0.846…), so negatives are valid from 0.053… on; the hardest is left out of its own set.
# anchor    hardest        other negative       R⁻ set     s⁻ + 0.1   positives k below it   s⁺ᵢ − s⁺ₖ
# row 0     0.5 + b (1)    0.5                  b          0.669      s⁺₁                    a
# row 1     0.5     (2)    0.0, too small       empty      0.6        s⁺₀                    −a
# row 2     0.3     (0)    0.2                  0.1        0.4        s⁺₁                    2a
# column 0  0.3     (2)    0.0, too small       empty      0.4        s⁺₁                    a
# column 1  0.5 + b (0)    0.2                  0.3 + b    0.669      s⁺₀                    −a
# column 2  0.5     (0)    0.5, a tie           0          0.6        s⁺₀, s⁺₁               a, 2a


def test_sig_ms_by_hand() -> None:
    result = on(THREE, P="sig-ms")
    assert result.index.tolist() == [[1, 2, 0], [2, 0, 0]]
    close(result.r_pos, [[2, 1 / 2, 4], [2, 1 / 2, (2 + 4) / 2]])  # e^{2 · difference}
    close(result.r_neg, [[1 / 2, 0, e(-1)], [0, e(-3) / 2, 1]])  # e^{−10 · difference}, the tie counts
    # 1/P⁺ = e^{2(s⁺ − ½)} + R⁺ = (1, ½, 2) + R⁺;   1/P⁻ = e^{−10(s⁻ − ½)} + R⁻
    p_pos = [[1 / 3, 1, 1 / 6], [1 / 3, 1, 1 / 5]]
    p_neg = [[1, 1, 1 / (e(2) + e(-1))], [e(-2), 1 / (1 / 2 + e(-3) / 2), 1 / 2]]
    close(result.G, assemble(p_pos, p_neg))
    own = on(THREE, P="sig-ms", P_params={"self_term": True})  # every denominator one larger
    close(own.G, assemble(1 / (1 / np.array(p_pos) + 1), 1 / (1 / np.array(p_neg) + 1)))
    close(own.r_pos, result.r_pos)


def test_lin_ms_by_hand() -> None:
    result = on(THREE, P="lin-ms")
    r_pos = [[a, -a, 2 * a], [a, -a, 1.5 * a]]
    r_neg = [[b, 0, 0.1], [0, 0.3 + b, 0]]  # the tie in column 2 is left out
    close(result.r_pos, r_pos)
    close(result.r_neg, r_neg)
    p_pos = (1 - np.array(r_pos)) * [[0.5, 0.5 + a, 0.5 - a]]
    p_neg = (1 + np.array(r_neg)) * [[0.5 + b, 0.5, 0.3], [0.3, 0.5 + b, 0.5]]
    close(result.G, assemble(p_pos, p_neg))


def assemble(p_pos: object, p_neg: object) -> Array:
    """G of THREE from P⁺ and P⁻ (2, 3), its negatives at (0,1), (1,2), (2,0) and (2,0), (0,1), (0,2)."""
    (u, v), (p, q) = np.asarray(p_pos), np.asarray(p_neg)
    return np.array(
        [
            [-u[0] - v[0], p[0] + q[1], q[2]],
            [0, -u[1] - v[1], p[1]],
            [p[2] + q[0], 0, -u[2] - v[2]],
        ]
    )


def test_relative_sets_leave_out_zeros() -> None:
    # s⁺ = (0.5, 0.5, 0.3), every other s 0.6: all three positives are valid for all.
    S = np.full((3, 3), 0.6)
    np.fill_diagonal(S, [0.5, 0.5, 0.3])
    close(on(S, P="lin-ms").r_pos, [[0.2, 0.2, -0.2]] * 2)  # the equal positive, 0, is left out of the mean
    close(on(S, P="sig-ms").r_pos, [[(1 + e(0.4)) / 2, (1 + e(0.4)) / 2, e(-0.4)]] * 2)  # its e⁰ = 1 stays
    close(on(S, P="lin-ms").r_neg, np.zeros((2, 3)))
    close(on(S, P="sig-ms").r_neg, np.ones((2, 3)))
    # of two tied hardest negatives the second differs by 0: left out of {0, 0.2} by lin-ms, kept by sig-ms
    tied = [[0.5, 0.9, 0.9, 0.7]]
    close(on(tied, P="lin-ms").r_neg, [[0.2], [0]])
    close(on(tied, P="sig-ms").r_neg, [[(1 + e(-2)) / 2], [0]])
    # s⁺ = (0, 400, 0): e^{2(0 − 400)} is 0 in float64 and left out, e^{2(0 − 0)} stays.
    S = np.full((3, 3), 500.0)
    np.fill_diagonal(S, [0, 400, 0])
    r_pos = on(S, P="sig-ms").r_pos
    assert r_pos is not None
    close(r_pos[:, [0, 2]], [[1, 1], [1, 1]])
    # a negative's e^{−10 · 300} is 0 too, and stays in the mean: (1 + 0) / 2
    S = np.array([[0.0, 300, 300, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    r_neg = on(S, P="sig-ms").r_neg
    assert r_neg is not None
    close(r_neg[0, 0], 1 / 2)


def test_relative_thresholds() -> None:
    # row 0: hardest 0.6, then s = 0.5 − 0.1 ± 0.01 around min s⁺ − 0.1; positives 0.7 ± 0.01 around s⁻ + 0.1.
    S = np.array(
        [
            [0.5, 0.6, 0.39, 0.41],
            [0.0, 0.69, 0.0, 0.0],
            [0.0, 0.0, 0.71, 0.0],
            [0.0, 0.0, 0.0, 0.9],
        ]
    )
    result = on(S, P="lin-ms")
    assert result.r_neg is not None
    assert result.r_pos is not None
    close(result.r_neg[0, 0], 0.6 - 0.41)
    close(result.r_pos[0, 0], 0.5 - 0.69)


def test_relative_similarities_use_the_hardest_whatever_the_mining() -> None:
    # row 0 of THREE under "all": both negatives share R⁻ = e^{−10b} = ½ and R⁺ = 2.
    S = [[0.5, 0.5 + b, 0.5], [0.0, 0.5 - a, 0.5], [0.3, 0.2, 0.5 + a]]
    result = on(S, P="sig-ms", mining="all", mining_params={"average": False}, weight=[1, 0, 0])
    # x→y: P⁻ = 1/(½ + ½) = 1 and 1/(1 + ½) = ⅔, P⁺ = ⅓ twice; y→x: R⁻ = 0, R⁺ = 2:
    # s = 0: e^{10(0 − ½)} = e^{−5}, s = 0.3: e^{−2}, P⁺ = ⅓ twice.
    close(result.G, [[-4 / 3, 1, 2 / 3], [e(-5), 0, 0], [e(-2), 0, 0]])
    close(result.r_pos, on(S, P="sig-ms").r_pos)


# ── mining ─────────────────────────────────────────────────────────────────────────────────────────────

SUMMED_ONCE: Params = {"average": False, "pull": "once"}
ROW = np.array([[0.5, 0.9, 0.4, 0.25, 0.45]])  # one anchor, s⁺ = 0.5; no negatives y→x


@pytest.mark.parametrize(
    ("mining", "params", "G"),
    [
        ("hardest", {}, [-1, 1, 0, 0, 0]),
        ("semi-hard", {}, [-1, 0, 0, 0, 1]),  # 0.3 < s < 0.5: 0.4 and 0.45
        ("semi-hard", {"margin": 0.04}, [0, 0, 0, 0, 0]),  # 0.46 < s < 0.5: none
        ("all", {}, [-1, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("all", {"average": True}, [-1, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("all", {"average": False}, [-4, 1, 1, 1, 1]),
        ("all", SUMMED_ONCE, [-1, 1, 1, 1, 1]),
        ("all", {"pull": "once"}, [-1, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("selective", {}, [-1, 1, 0, 0, 0]),  # |0.5 − 0.9| ≥ ε
        ("selective", {"eps": 0.41}, [-1, 1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("selective", {"eps": 0.39}, [-1, 1, 0, 0, 0]),
    ],
)
def test_selection_by_hand(mining: str, params: Params, G: list[float]) -> None:
    for S, expected, directions in ((ROW, np.array([G]), "x→y"), (ROW.T, np.array([G]).T, "y→x")):
        result = on(S, mining=mining, mining_params=params, directions=directions)
        close(result.G, expected)
        assert result.index.max() == 1  # the hardest is reported whatever was selected
        close(result.value, np.dot(G, ROW[0]))  # con × con is linear in S


def test_one_pull_of_all_by_hand() -> None:
    # s⁺ = 0.5, s⁻ = 0.5 + ln 3 / 10 and 0.5: T = 3/4 and 1/2, P⁻ = s⁻, P⁺ = 0.5 times the mean of T
    S = [[0.5, S_NEG, 0.5]]
    once: dict[str, Any] = {"mining": "all", "mining_params": SUMMED_ONCE, "directions": "x→y"}
    close(on(S, "nca", "lin", **once).G, [[-5 / 8 / 2, 3 / 4 * S_NEG, 1 / 4]])
    averaged = once | {"mining_params": {"pull": "once"}}
    close(on(S, "nca", "lin", **averaged).G, [[-5 / 8 / 2, 3 / 8 * S_NEG, 1 / 8]])
    # values: both parts of s⁻, that of s⁺ once; and with a weight that of the anchor
    close(on(S, **once).value, S_NEG + 0.5 - 0.5)
    close(on(S, P="lin", **once).value, S_NEG**2 / 2 + 1 / 8 + 1 / 8)
    close(on(S, P="lin", **averaged).value, (S_NEG**2 / 2 + 1 / 8) / 2 + 1 / 8)
    close(on(S, P="sig", **once).value, ln(1 + 3) / 10 + ln(2) / 10 + ln(2) / 2)
    close(on(S, P="sig", weight=[3], **once).value, 3 * (ln(1 + 3) / 10 + ln(2) / 10 + ln(2) / 2))


def test_the_value_of_one_pull_of_all_for_other_terms() -> None:
    """It is that of all triplets: no part of it is of the positive alone."""
    S = [[0.5, S_NEG, 0.5]]
    each: dict[str, Any] = {"mining": "all", "mining_params": {"average": False}, "directions": "x→y"}
    once = {**each, "mining_params": SUMMED_ONCE}
    others: list[dict[str, Any]] = [{"T": "nca"}, {"T_params": {"margin": 0.2}}, {"T": "cir", "P": "lin"}]
    for terms in others:
        close(on(S, **terms, **once).value, on(S, **terms, **each).value)


@pytest.mark.parametrize(("P", "P_params"), [(P, params) for P, params in TERMS_P if P in ("con", "lin", "sig")])
def test_parts_of_con_are_where_the_potential_vanishes(P: str, P_params: Params) -> None:
    """The rule for all T, at (10⁴, −10⁴), (1, 0) or (0, 0), gives the parts that are written down for con."""

    def loss(s_pos: float, s_neg: float) -> float:
        return potential("con", {}, P, P_params, s_pos, s_neg)

    at, far = {"con": (0.0, 0.0), "lin": (1.0, 0.0), "sig": (1e4, -1e4)}[P], (1e4, -1e4)
    assert (loss(*far) == 0) == (P == "sig")
    assert (loss(1, 0) == 0) == (P == "lin")
    for s_pos, s_neg in ((0.3, 0.7), (-0.4, -0.2), (1.0, 0.0)):
        f, g = parts_of_con(P, P_params, s_pos, s_neg)
        close(f, loss(s_pos, at[1]))
        close(g, loss(at[0], s_neg) - loss(*at))


@pytest.mark.parametrize(("T", "T_params"), TERMS_T)
@pytest.mark.parametrize(("P", "P_params"), TERMS_P)
def test_one_pull_of_all_averaged_has_the_gradient_of_many(T: str, T_params: Params, P: str, P_params: Params) -> None:
    S = np.random.default_rng(9).normal(0.2, 0.3, (5, 6))
    options: dict[str, Any] = {"T_params": T_params, "P_params": P_params, "weight": [1, 0, 2, 0.5, 1]}
    each, once = (on(S, T, P, mining="all", mining_params={"pull": pull}, **options) for pull in ("each", "once"))
    close(once.G, each.G)
    if T == "con" and not T_params:
        close(once.value, each.value)


# ── soft mining ────────────────────────────────────────────────────────────────────────────────────────

# Negatives 0.5 + ln 2 / 10 and 0.5 beside s⁺ = 0.5: with tau = 10, e^h = e⁵ · (1 at the pair), e⁵ · 2, e⁵ · 1.
SOFT = np.array([[0.5, 0.5 + b, 0.5]])


def softly(S: list[list[float]] | Array, T: str = "con", P: str = "con", **soft: Any) -> Result:
    """Of the rows alone: the columns of S have no negatives."""
    return on(S, T, P, mining="soft", mining_params={"tau": 10.0, **soft}, directions="x→y")


def test_soft_by_hand() -> None:
    # e^h sums to 3: s̃ = 0.5 + ln 3 / 10 with shares ⅔ and ⅓, T = 3/4
    result = softly(SOFT, "nca")
    close(result.soft, [[S_NEG], [-np.inf]])
    close(result.G, [[-3 / 4, 1 / 2, 1 / 4]])
    close(result.value, ln(1 + 3) / 10)
    close(result.s_neg, [[0.5 + b], [-np.inf]])  # the hardest negative is reported as ever
    assert result.index.tolist() == [[1], [-1]]
    assert on(SOFT).soft is None
    options: dict[str, Any] = {"mining": "soft", "mining_params": {"tau": 10.0}}
    column = on(SOFT.T, "nca", **options)
    close(column.G, result.G.T)
    close(column.soft, [[-np.inf], [S_NEG]])
    close(on(SOFT, "nca", weight=[5], reduction="mean", **options).G, result.G)
    close(on(SOFT, "nca", weight=[5], **options).G, 5 * result.G)
    close(on(SOFT, "nca", weight=[0], **options).soft, result.soft)  # a statistic is there whatever the weight


def test_soft_mean_by_hand() -> None:
    # a mean of 3/2: s̃ = 0.5 + ln 1.5 / 10, T = 1.5 / 2.5
    result = softly(SOFT, "nca", normalise="mean")
    close(result.soft, [[0.5 + ln(1.5) / 10], [-np.inf]])
    close(result.G, [[-3 / 5, 2 / 5, 1 / 5]])
    close(result.value, ln(2.5) / 10)


def test_soft_over_candidates_by_hand() -> None:
    # e^h sums to 4 with the pair: s̃ = 0.5 + ln 4 / 10, shares ¼, ½, ¼, T = 4/5
    result = softly(SOFT, "nca", over="candidates")
    assert result.soft is not None
    close(result.soft[0], [0.5 + ln(4) / 10])
    close(result.G, [[-4 / 5 + 1 / 5, 2 / 5, 1 / 5]])
    close(result.value, ln(1 + 4) / 10)
    # the mean of three: 4/3, T = 4/7
    close(softly(SOFT, "nca", over="candidates", normalise="mean").G, np.array([[-3, 2, 1]]) / 7)
    # of a pair alone: s̃ = s⁺, and under con × lin it is pushed away by s⁺ and pulled by 1 − s⁺
    alone = softly([[0.3]], P="lin", over="candidates")
    close(alone.soft, [[0.3], [0.3]])
    close(alone.G, [[0.3 - 0.7]])
    close(alone.value, 0.3**2 / 2 + 0.7**2 / 2)
    assert alone.index.tolist() == [[-1], [-1]]


def test_soft_leaves_out_equal_ids() -> None:
    # candidate 1 shares the anchor's id and is in neither set, whatever its similarity; candidate 0 is the pair
    S = [[0.5, 9.0, 0.5 + b, 0.5]]
    ids: dict[str, Any] = {"ids": [1], "y_ids": [1, 1, 2, 2], "mining": "soft"}
    close(on(S, "nca", mining_params={"tau": 10.0}, **ids).G, [[-3 / 4, 0, 1 / 2, 1 / 4]])
    over = on(S, "nca", mining_params={"tau": 10.0, "over": "candidates"}, **ids)
    close(over.G, [[-3 / 5, 0, 2 / 5, 1 / 5]])


def test_soft_pair_weights_by_hand() -> None:
    # P of sig at s̃ = 0.5 + ln 3 / 10: σ(ln 3) = 3/4; at the negatives σ(ln 2) = 2/3 and 1/2; P⁺ = 1/2
    close(softly(SOFT, P="sig").G, [[-1 / 2, 3 / 4 * 2 / 3, 3 / 4 / 3]])
    close(softly(SOFT, P="sig", at="each").G, [[-1 / 2, 2 / 3 * 2 / 3, 1 / 2 / 3]])
    close(softly(SOFT, P="sig").value, ln(2) / 2 + ln(1 + 3) / 10)
    close(softly(SOFT, P="sig", at="each").value, ln(2) / 2 + ln(1 + 3) / 10)
    # at each of the candidates, the pair pushes itself: σ(0) · ¼
    each = softly(SOFT, P="sig", at="each", over="candidates")
    close(each.G, [[-1 / 2 + 1 / 2 / 4, 2 / 3 / 2, 1 / 2 / 4]])
    # R⁺ and R⁻ are those of the hardest: of THREE's row 0, R⁺ = 2 and R⁻ = ½; 1/P⁻(s̃) = 1/3 + 1/2, 1/P⁺ = 1 + 2
    row = on(THREE, P="sig-ms", mining="soft", mining_params={"tau": 10.0}, weight=[1, 0, 0])
    close(row.G[0, 1:], np.array([2 / 3, 1 / 3]) / (1 / 3 + 1 / 2))
    close(row.r_neg, on(THREE, P="sig-ms").r_neg)
    each = on(THREE, P="sig-ms", mining="soft", mining_params={"tau": 10.0, "at": "each"}, weight=[1, 0, 0])
    close(each.G[0, 1:], [2 / 3 / (1 / 2 + 1 / 2), 1 / 3 / (1 + 1 / 2)])
    # y→x: s = 0 and 0.3, R⁻ = 0
    z = ln(1 + e(3))
    close(row.G[1:, 0], np.array([1, e(3)]) / (1 + e(3)) * e(z - 5))
    close(row.G[0, 0], -1 / 3 - 1 / 3)


def test_soft_hardness_by_hand() -> None:
    # alpha = 10: e^{20 s} = e¹⁰ · 4 and e¹⁰ · 1, s̃ = (10 + ln 5) / 10
    linear = softly(SOFT, alpha=10.0)
    close(linear.soft, [[1 + ln(5) / 10], [-np.inf]])
    close(linear.G, [[-1, 4 / 5, 1 / 5]])
    # the square: e^{4 · ln 2 / 4} = 2 and e⁰ = 1, whatever the sign; z = ln 3
    square = np.array([[0.5, -np.sqrt(ln(2)) / 2, 0.0]])
    for level, soft in (("linear", ln(3) / 4), ("root", np.sqrt(ln(3)) / 2)):
        result = softly(square, P="lin", tau=4.0, hardness="square", level=level)
        close(result.soft, [[soft], [-np.inf]])
        close(result.G, [[-1 / 2, soft * 2 / 3, soft / 3]])
        each = softly(square, P="lin", tau=4.0, hardness="square", level=level, at="each")
        close(each.G, [[-1 / 2, -np.sqrt(ln(2)) / 2 * 2 / 3, 0]])
    # alpha belongs to the linear one alone
    close(softly(square, tau=4.0, hardness="square", alpha=3.0).G, [[-1, 2 / 3, 1 / 3]])
    # the circle: 10 · 1.2 · 0.4 = 4.8, 10 · 0.4 · (−0.4) = −1.6, and 0 beyond −0.4
    circle = [[0.5, 0.8, 0.0, -0.7]]
    total = e(4.8) + e(-1.6) + 1
    result = softly(circle, hardness="circle")
    close(result.soft, [[ln(total) / 10], [-np.inf]])
    close(result.G, [[-1, e(4.8) / total, e(-1.6) / total, 1 / total]])
    # margin 0.1: 10 · 0.9 · 0.7, 10 · 0.1 · (−0.1)
    total = e(6.3) + e(-0.1) + 1
    close(softly(circle, hardness="circle", margin=0.1).G, [[-1, e(6.3) / total, e(-0.1) / total, 1 / total]])
    # z below 0 has the root 0: z = ln(e^{−10} + e^{−20})
    close(softly([[0.5, -1.0, -2.0]], level="root").soft, [[0], [-np.inf]])


def test_soft_defaults() -> None:
    # tau = 20, no alpha: e^{20(s − ½)} = 4 and 1
    result = on(SOFT, "nca", mining="soft", T_params={"tau": 20.0})
    close(result.soft, [[0.5 + ln(5) / 20], [-np.inf]])
    close(result.G, [[-5 / 6, 4 / 6, 1 / 6]])
    with pytest.raises(TypeError, match="unheard"):
        softly(SOFT, unheard=1)
    for name in ("hardness", "level", "at", "over", "normalise"):
        with pytest.raises(KeyError, match="unheard"):
            softly(SOFT, **{name: "unheard"})
    with pytest.raises(KeyError, match="unheard"):
        on(SOFT, mining="all", mining_params={"pull": "unheard"})


def test_soft_of_large_exponents_is_exact() -> None:
    far = 2.0**40
    result = softly([[0.0, far, far]], tau=20.0)
    close(result.G, [[-1, 1 / 2, 1 / 2]])
    close(result.soft, [[far + ln(2) / 20], [-np.inf]])
    # 0.1 · (2³⁰ + 1) and 0.1 · 2³⁰ are 0.1 apart to eight digits in float64
    shares = softly([[0.0, 2.0**30 + 1, 2.0**30]], tau=0.1).G[0, 1:]
    close(shares, np.array([e(0.1), 1]) / (1 + e(0.1)))
    close(softly([[0.0, -far, -far]], tau=20.0).soft, [[-far + ln(2) / 20], [-np.inf]])
    close(softly([[0.0, 1e3, -1e3]], tau=1e4).G, [[-1, 1, 0]])


@pytest.mark.parametrize(("mining", "params"), [("soft", {}), ("soft", {"at": "each"}), ("all", {"pull": "once"})])
def test_a_pull_without_negatives(mining: str, params: Params) -> None:
    """Of con without a margin alone: P⁺(s⁺) without relative similarities, and the part of the potential in s⁺."""
    options: dict[str, Any] = {"mining": mining, "mining_params": params}
    alone: list[tuple[str, Params, float, float]] = [
        ("con", {}, 1, -0.3),
        ("lin", {}, 0.7, 0.7**2 / 2),
        ("sig", {}, 1 / (1 + e(-0.4)), ln(1 + e(0.4)) / 2),
        ("sig", {"alpha": 4.0}, 1 / (1 + e(-0.8)), ln(1 + e(0.8)) / 4),
        ("lin-ms", {}, 0.7, -0.3),
        ("sig-ms", {}, e(0.4), -0.3),
        ("sig-ms", {"self_term": True}, 1 / (e(-0.4) + 1), -0.3),
    ]
    for P, P_params, pull, value in alone:
        result = on([[0.3]], P=P, P_params=P_params, weight=[3], **options)
        close(result.G, [[-2 * 3 * pull]])
        close(result.value, 2 * 3 * value)
        assert (result.index == -1).all()
        for T, T_params in TERMS_T:
            if T != "con" or T_params:
                nothing = on([[0.3]], T, P, T_params=T_params, P_params=P_params, **options)
                assert not nothing.G.any()
                assert nothing.value == 0
    # each of two anchors that share an id, K = 2, one of them weightless
    close(on([[0.3, 0.9], [0.8, 0.4]], ids=[1, 1], reduction="mean", weight=[0, 1], **options).G, [[0, 0], [0, -2]])
    assert not on([[0.3]], mining="all").G.any()


# ── positives by ids ───────────────────────────────────────────────────────────────────────────────────

# One anchor with two positives and a negative: e^{−10 s} = e⁻⁵ · (1, 2), so z⁺ = ln 3 − 5 and the shares are ⅓ and ⅔.
TWO = np.array([[0.5, 0.5 - b, 0.5]])
TWO_IDS: dict[str, Any] = {"ids": [1], "y_ids": [1, 1, 2], "directions": "x→y"}
NEAR = 0.5 - ln(3) / 10  # its s̃⁺


def test_hardest_positives_by_hand() -> None:
    # rows: (s⁺ 0.3 of 0.5 and 0.3, s⁻ 0.4), (0.6, 0.2 of 0.1 and 0.2); columns: (0.5, 0.1), (0.3, 0.2), (0.6, 0.4).
    S = np.array([[0.5, 0.3, 0.4], [0.1, 0.2, 0.6]])
    of: dict[str, Any] = {"ids": [1, 2], "y_ids": [1, 1, 2], "positives": "hardest"}
    result = on(S, **of)
    close(result.G, [[-1, -2, 2], [1, 2, -2]])
    close(result.value, 0.1 - 0.4 - 0.4 - 0.1 - 0.2)
    close(result.s_pos, [[0.3, 0.6, np.inf], [0.5, 0.3, 0.6]])
    close(result.s_neg, [[0.4, 0.2, -np.inf], [0.1, 0.2, 0.4]])
    assert result.index.tolist() == [[2, 1, -1], [1, 1, 0]]
    assert result.r_pos is result.soft is None
    # the mean is that of two rows and that of three columns
    rows, columns = np.array([[0, -1, 1], [0, 1, -1]]), np.array([[-1, -1, 1], [1, 1, -1]])
    close(on(S, reduction="mean", **of).G, rows / 2 + columns / 3)
    close(on(S, reduction="mean", directions="y→x", **of).G, columns / 3)
    close(on(S, reduction="mean", scale=6, **of).value, 3 * (0.1 - 0.4) + 2 * (-0.4 - 0.1 - 0.2))
    # of equal positives the lowest index; row k and column k are a pair no more
    close(on([[0.9, 0.4, 0.4]], ids=[1], y_ids=[2, 1, 1], positives="hardest").G, [[1, -1, 0]])


def test_soft_positives_by_hand() -> None:
    # s̃⁺ = 0.5 − ln 3 / 10, T = σ(ln 3) = 3/4
    result = on(TWO, "nca", positives="soft", **TWO_IDS)
    close(result.G, [[-1 / 4, -1 / 2, 3 / 4]])
    close(result.value, ln(1 + 3) / 10)
    close(result.s_pos, [[NEAR, np.inf, np.inf], [0.5, 0.5 - b, np.inf]])
    column = on(TWO.T, "nca", positives="soft", ids=[1, 1, 2], y_ids=[1], directions="y→x")
    close(column.G, result.G.T)
    close(column.s_pos, result.s_pos[::-1])
    # P⁺ at s̃⁺ or at each positive: 0.5 and 0.5 + b, whose shares are ⅓ and ⅔
    lin = on(TWO, P="lin", positives="soft", **TWO_IDS)
    close(lin.G, [[-(1 - NEAR) / 3, -(1 - NEAR) * 2 / 3, 1 / 2]])
    each = on(TWO, P="lin", positives="soft", positives_params={"at": "each"}, **TWO_IDS)
    close(each.G, [[-1 / 2 / 3, -(1 / 2 + b) * 2 / 3, 1 / 2]])
    close(each.value, (1 - NEAR) ** 2 / 2 + 1 / 8)
    close(each.value, lin.value)
    sig_ms = on(TWO, P="sig-ms", positives="soft", positives_params={"at": "each"}, **TWO_IDS)  # 1 / e^{2(s − ½)}
    close(sig_ms.G, [[-1 / 3, -e(2 * b) * 2 / 3, 1]])
    for name in ("hardness", "at"):
        with pytest.raises(KeyError, match="unheard"):
            on(TWO, positives="soft", positives_params={name: "unheard"}, **TWO_IDS)
    for positives in ("hardest", "soft"):
        with pytest.raises(TypeError, match="unheard"):
            on(TWO, positives=positives, positives_params={"unheard": 1}, **TWO_IDS)
        with pytest.raises(ValueError, match="want ids"):
            on(TWO, positives=positives)
    with pytest.raises(KeyError, match="unheard"):
        on(TWO, positives="unheard", **TWO_IDS)
    with pytest.raises(TypeError, match="tau"):
        on(TWO, positives_params={"tau": 1.0})


@pytest.mark.parametrize(
    ("params", "s_pos", "shares"),
    [
        ({"tau": 0.0}, 0.5 - b / 2, [1 / 2, 1 / 2]),
        ({"tau": -10.0}, 0.5 + ln(3 / 2) / 10, [2 / 3, 1 / 3]),  # e^{10 s} = e⁵ · (1, ½)
        ({"tau": 20.0}, 0.5 - ln(5) / 20, [1 / 5, 4 / 5]),  # e⁻¹⁰ · (1, 4)
        ({"tau": 1e6}, 0.5 - b, [0, 1]),
        ({"tau": -1e6}, 0.5, [1, 0]),
    ],
)
def test_soft_positives_of_any_tau(params: Params, s_pos: float, shares: list[float]) -> None:
    result = on(TWO, positives="soft", positives_params=params, **TWO_IDS)
    close(result.s_pos[0, 0], s_pos)
    close(result.G, [[-shares[0], -shares[1], 1]])
    close(result.value, 0.5 - s_pos)


def test_circle_of_positives_by_hand() -> None:
    # margin 0.4: 10 · 0.9 · 0.1 = 0.9, 10 · 0.6 · (−0.2) = −1.2, and 0 from 1.4 on
    S, ids = [[0.5, 0.8, 1.5, 0.1]], dict[str, Any](ids=[1], y_ids=[1, 1, 1, 2], directions="x→y")
    total = e(0.9) + e(-1.2) + 1
    result = on(S, positives="soft", positives_params={"hardness": "circle"}, **ids)
    close(result.s_pos[0, 0], -ln(total) / 10)
    close(result.G, [[-e(0.9) / total, -e(-1.2) / total, -1 / total, 1]])
    # margin 0.2, tau 5: 5 · 0.7 · 0.3, 5 · 0.4 · 0
    total = e(1.05) + 1 + 1
    result = on(S, positives="soft", positives_params={"hardness": "circle", "margin": 0.2, "tau": 5.0}, **ids)
    close(result.s_pos[0, 0], -ln(total) / 5)
    close(result.G, [[-e(1.05) / total, -1 / total, -1 / total, 1]])
    for tau in (0.0, -1.0):
        with pytest.raises(ValueError, match="tau > 0"):
            on(S, positives="soft", positives_params={"hardness": "circle", "tau": tau}, **ids)


def test_soft_positives_of_large_exponents_are_exact() -> None:
    far = 2.0**40
    result = on([[far, far, 0.0]], positives="soft", **TWO_IDS)
    close(result.G, [[-1 / 2, -1 / 2, 1]])
    close(result.s_pos[0, 0], far - ln(2) / 10)
    shares = on([[2.0**30 + 1, 2.0**30, 0]], positives="soft", positives_params={"tau": 0.1}, **TWO_IDS).G[0, :2]
    close(shares, -np.array([1, e(0.1)]) / (1 + e(0.1)))
    # one positive alone is its own level, to the bit
    S = np.random.default_rng(18).normal(size=(5, 5))
    for tau in (0.0, 0.1, 7.3, -3.3):
        result = on(S, positives="soft", positives_params={"tau": tau}, ids=range(5))
        assert (result.s_pos == S.diagonal()).all()


def test_mining_sees_the_level_of_the_positives() -> None:
    S, of = [[0.9, 0.5, 0.45, 0.6]], dict[str, Any](ids=[1], y_ids=[1, 1, 2, 2], directions="x→y")
    mean: dict[str, Any] = {"positives": "soft", "positives_params": {"tau": 0.0}, **of}  # s̃⁺ = 0.7
    close(on(S, positives="hardest", mining="semi-hard", **of).G, [[0, -1, 1, 0]])  # 0.3 < s < 0.5
    close(on(S, mining="semi-hard", **mean).G, [[-1 / 2, -1 / 2, 0, 1]])  # 0.5 < s < 0.7
    eps: dict[str, Any] = {"mining": "selective", "mining_params": {"eps": 0.11}}
    close(on([[0.9, 0.5, 0.45, 0.6]], positives="hardest", **eps, **of).G, [[0, -1, 1 / 2, 1 / 2]])  # |0.5 − 0.6|
    close(on([[0.9, 0.5, 0.45, 0.3]], positives="hardest", **eps, **of).G, [[0, -1, 1 / 2, 1 / 2]])  # |0.5 − 0.45|
    close(on([[0.9, 0.5, 0.45, 0.3]], **eps, **mean).G, [[-1 / 2, -1 / 2, 1, 0]])  # |0.7 − 0.45|


def test_positives_share_the_pull_of_all() -> None:
    # s̃⁺ = 0.5 − ln 3 / 10; negatives 0.5 and s̃⁺: T = 3/4 and 1/2
    S, of = [[0.5, 0.5 - b, 0.5, NEAR]], dict[str, Any](ids=[1], y_ids=[1, 1, 2, 2], directions="x→y", mining="all")
    p_pos, pushes = 1 - NEAR, np.array([3 / 4 * 0.5, 1 / 2 * NEAR])
    each, near = {"at": "each"}, [-1 / 2 / 3, -(1 / 2 + b) * 2 / 3]  # P⁺ at each positive, shared
    both: list[tuple[Params, float, float]] = [
        ({"average": False}, 5 / 4, 1),
        ({}, 5 / 8, 1 / 2),
        (SUMMED_ONCE, 5 / 8, 1),
        ({"pull": "once"}, 5 / 8, 1 / 2),
    ]
    for params, pull, push in both:
        result = on(S, "nca", "lin", positives="soft", mining_params=params, **of)
        close(result.G, [[-pull * p_pos / 3, -pull * p_pos * 2 / 3, *(push * pushes)]])
        result = on(S, "nca", "lin", positives="soft", positives_params=each, mining_params=params, **of)
        close(result.G, [[pull * near[0], pull * near[1], *(push * pushes)]])
    value = on(S, positives="soft", mining_params=SUMMED_ONCE, **of).value
    close(value, 0.5 + NEAR - NEAR)
    close(on(S, positives="soft", mining_params={"average": False}, **of).value, 0.5 + NEAR - 2 * NEAR)


def test_positives_are_candidates_by_hand() -> None:
    # e^{10(s − ½)}: positives 1 and ½, negative 1: s̃ = 0.5 + ln 2.5 / 10, shares 0.4, 0.2, 0.4; T of con
    over: dict[str, Any] = {"mining": "soft", "mining_params": {"tau": 10.0, "over": "candidates"}, **TWO_IDS}
    result = on(TWO, positives="hardest", **over)
    assert result.soft is not None
    close(result.soft[0, 0], 0.5 + ln(2.5) / 10)
    close(result.G, [[0.4, 0.2 - 1, 0.4]])
    close(on(TWO, positives="soft", **over).G, [[0.4 - 1 / 3, 0.2 - 2 / 3, 0.4]])
    close(on(TWO, positives="soft", **over).value, 0.5 + ln(2.5) / 10 - NEAR)
    mean = {"mining_params": {"tau": 10.0, "over": "candidates", "normalise": "mean"}}
    close(on(TWO, positives="soft", **(over | mean)).value, 0.5 + ln(2.5 / 3) / 10 - NEAR)
    # at each candidate P⁻ = s
    lin = {"mining_params": {"tau": 10.0, "over": "candidates", "at": "each"}}
    pushes = np.array([0.4, 0.2, 0.4]) * TWO
    close(on(TWO, P="lin", positives="hardest", **(over | lin)).G, pushes - [[0, 0.5 + b, 0]])
    # a positive alone is its own level: nothing moves it under con, and con × lin does by s⁺ and 1 − s⁺
    alone: dict[str, Any] = {**over, "positives": "soft", "ids": [1], "y_ids": [1], "directions": "both"}
    close(on([[0.3]], **alone).G, [[0]])
    close(on([[0.3]], P="lin", **alone).G, [[2 * (0.3 - 0.7)]])
    close(on([[0.3]], P="lin", **alone).value, 0.3**2 + 0.7**2)


IN_PARTS: list[tuple[str, Params]] = [
    ("soft", {}),
    ("soft", {"at": "each"}),
    ("all", SUMMED_ONCE),
    ("all", {"pull": "once"}),
]
# P, P⁺ and f, P⁻ and g at 0.3
PARTS: list[tuple[str, Params, float, float, float, float]] = [
    ("con", {}, 1, -0.3, 1, 0.3),
    ("lin", {}, 0.7, 0.7**2 / 2, 0.3, 0.3**2 / 2),
    ("sig", {}, 1 / (1 + e(-0.4)), ln(1 + e(0.4)) / 2, 1 / (1 + e(2)), ln(1 + e(-2)) / 10),
    ("sig", {"alpha": 4.0, "beta": 5.0}, 1 / (1 + e(-0.8)), ln(1 + e(0.8)) / 4, 1 / (1 + e(1)), ln(1 + e(-1)) / 5),
    ("lin-ms", {}, 0.7, -0.3, 0.3, 0.3),
    ("sig-ms", {}, e(0.4), -0.3, e(-2), 0.3),
]


@pytest.mark.parametrize(("mining", "params"), MINING)
@pytest.mark.parametrize("positives", ["hardest", "soft"])
def test_an_anchor_that_lacks_positives_or_negatives(positives: str, mining: str, params: Params) -> None:
    """It adds nothing, but the part it has where con without a margin is mined softly or pulled once."""
    of: dict[str, Any] = {"positives": positives, "mining": mining, "mining_params": params, "weight": [3]}
    in_parts = params.get("pull") == "once" or (mining == "soft" and params.get("over") != "candidates")
    for P, P_params, p_pos, f, p_neg, g in PARTS:
        for T, T_params in TERMS_T:
            terms: dict[str, Any] = {"T": T, "T_params": T_params, "P": P, "P_params": P_params}
            if mining == "soft":  # a level of one negative is that negative only where it is linear
                plain = {name: params[name] for name in ("at", "over") if name in params}
                of["mining_params"] = {"tau": 4.0, **plain}
            emits = in_parts and T == "con" and not T_params
            no_negative, no_positive = (on([[0.3]], ids=[1], y_ids=y_ids, **terms, **of) for y_ids in ([1], [2]))
            close(no_positive.G, [[2 * 3 * p_neg if emits else 0]])
            close(no_positive.value, 2 * 3 * g if emits else 0)
            assert np.isposinf(no_positive.s_pos).all()
            close(no_positive.s_neg, [[0.3], [0.3]])
            if params.get("over") != "candidates":  # where it is its own candidate
                close(no_negative.G, [[-2 * 3 * p_pos if emits else 0]])
                close(no_negative.value, 2 * 3 * f if emits else 0)
            close(no_negative.s_pos, [[0.3], [0.3]])
            assert (no_negative.index == -1).all()


def test_parts_of_several_by_hand() -> None:
    # without negatives the pull is shared: P⁺ at s̃⁺, or at 0.5 and 0.5 − b
    of: dict[str, Any] = {"P": "lin", "directions": "x→y", "positives": "soft", "ids": [1]}
    for mining, params in IN_PARTS:
        mined: dict[str, Any] = {"mining": mining, "mining_params": params, **of}
        alone = on(TWO[:, :2], y_ids=[1, 1], **mined)
        close(alone.G, [[-(1 - NEAR) / 3, -(1 - NEAR) * 2 / 3]])
        close(alone.value, (1 - NEAR) ** 2 / 2)
        each = on(TWO[:, :2], y_ids=[1, 1], positives_params={"at": "each"}, **mined)
        close(each.G, [[-1 / 2 / 3, -(1 / 2 + b) * 2 / 3]])
        close(each.value, (1 - NEAR) ** 2 / 2)
    # without positives the push: of all, and of a level s̃ = 0.5 + ln 1.5 / 10 with the shares ⅔ and ⅓
    close(on(TWO[:, :2], y_ids=[2, 2], mining="all", mining_params=SUMMED_ONCE, **of).G, TWO[:, :2])
    close(on(TWO[:, :2], y_ids=[2, 2], mining="all", mining_params={"pull": "once"}, **of).G, TWO[:, :2] / 2)
    squares = (TWO[0, :2] ** 2 / 2).sum()
    close(on(TWO[:, :2], y_ids=[2, 2], mining="all", mining_params=SUMMED_ONCE, **of).value, squares)
    close(on(TWO[:, :2], y_ids=[2, 2], mining="all", mining_params={"pull": "once"}, **of).value, squares / 2)
    level = 0.5 + ln(1.5) / 10
    soft = on(TWO[:, :2], y_ids=[2, 2], mining="soft", mining_params={"tau": 10.0}, **of)
    close(soft.G, [[level * 2 / 3, level / 3]])
    close(soft.value, level**2 / 2)
    each = on(TWO[:, :2], y_ids=[2, 2], mining="soft", mining_params={"tau": 10.0, "at": "each"}, **of)
    close(each.G, [[0.5 * 2 / 3, (0.5 - b) / 3]])
    # they count in the mean: one of two rows
    half = on(
        [[0.2, 0.3], [0.4, 0.1]], ids=[1, 3], y_ids=[1, 2], positives="hardest", directions="x→y", reduction="mean"
    )
    close(half.G, [[-1 / 2, 1 / 2], [0, 0]])


def test_relative_similarities_by_ids_by_hand() -> None:
    # anchor    s̃⁺    hardest    other valid   R⁻     positives at most s⁻ + 0.1   R⁺
    # row 0     0.3   0.35 (3)   0.21          0.14   row 1                        −0.1
    # row 1     0.4   0.6 (1)                  0      row 0                        0.1
    # row 2           0.45 (3)   0.25          0.2    it has none                  0
    # column 0  0.5   0.1 (2)                  0                                   0
    # column 1  0.3   0.6 (1)    0.25          0.35   columns 0 and 3              −0.15
    # column 2  0.9   0.21 (0)                 0      column 1                     0.6
    # column 3  0.4   0.45 (2)   0.35          0.1    columns 0 and 1              (−0.1 + 0.1) / 2
    S = [[0.5, 0.3, 0.21, 0.35], [0.0, 0.6, 0.9, 0.4], [0.1, 0.25, 0.15, 0.45]]
    of: dict[str, Any] = {"P": "lin-ms", "ids": [1, 2, 9], "y_ids": [1, 1, 2, 2], "positives": "hardest"}
    result = on(S, directions="x→y", **of)
    close(result.r_pos, [[-0.1, 0.1, 0, 0], [0, -0.15, 0.6, 0]])
    close(result.r_neg, [[0.14, 0, 0.2, 0], [0, 0.35, 0, 0.1]])
    close(result.G, [[0, -1.1 * 0.7, 0, 1.14 * 0.35], [0, 0.6, 0, -0.9 * 0.6], [0, 0, 0, 0]])
    # without a positive its push has them too
    soft = on(S, directions="x→y", mining="soft", **of)
    assert soft.soft is not None
    close(soft.G[2].sum(), 1.2 * soft.soft[0, 2])
    # nobody has a positive: no threshold, and no negative beyond the hardest is valid
    nobody = on(S, **(of | {"ids": [7, 8, 9]}))
    close(nobody.r_pos, np.zeros((2, 4)))
    close(nobody.r_neg, np.zeros((2, 4)))
    # the s̃⁺ of both are the levels: means 0.4 and 0.65
    mean = on(S, **(of | {"positives": "soft", "positives_params": {"tau": 0.0}}))
    assert mean.r_pos is not None
    close(mean.r_pos[0], [0, 0.25, 0, 0])


def test_one_set_by_hand() -> None:
    # rows 0 and 1 share an id, row 2 has no positive: (s⁺ 0.6, s⁻ 0.7) and (0.6, 0.2); no row is its own positive
    S = [[1.0, 0.6, 0.7], [0.6, 1.0, 0.2], [0.7, 0.2, 1.0]]
    of: dict[str, Any] = {"ids": [4, 4, 5], "positives": "hardest", "one_set": True}
    result = on(S, **of)
    close(result.G, [[0, -1, 1], [-1, 0, 1], [0, 0, 0]])
    close(result.value, 0.1 - 0.4)
    close(result.s_pos, [[0.6, 0.6, np.inf], [np.inf] * 3])
    close(result.s_neg, [[0.7, 0.2, 0.7], [-np.inf] * 3])
    assert result.index.tolist() == [[2, 2, 0], [-1, -1, -1]]
    for directions in ("x→y", "y→x"):
        close(on(S, directions=directions, **of).G, result.G)
    close(on(S, reduction="mean", **of).G, result.G / 3)
    close(on(S, reduction="mean", weight=[1, 0, 3], **of).G, [[0, -1 / 4, 1 / 4], [0, 0, 0], [0, 0, 0]])
    close(on(S, reduction="mean", weight=[[1, 0, 3], [9, 9, 9]], **of).G[0], [0, -1 / 4, 1 / 4])
    # nor its own candidate: row 2 has e^{10 · 0.7} + e^{10 · 0.2} as negatives, and is pushed without a positive
    soft = on(S, mining="soft", mining_params={"tau": 10.0}, **of)
    close(soft.soft, [[0.7, 0.2, ln(e(7) + e(2)) / 10], [-np.inf] * 3])
    close(soft.G[2], [1 / (1 + e(-5)), 1 / (1 + e(5)), 0])
    over = on(S, mining="soft", mining_params={"tau": 10.0, "over": "candidates"}, **of)
    close(over.G[0], [0, e(6) / (e(6) + e(7)) - 1, e(7) / (e(6) + e(7))])
    assert not over.G[2].any()
    for wrong in ({"positives": "pair"}, {"y_ids": [4, 4, 5]}, {"ids": None}):
        with pytest.raises(ValueError, match="ids"):
            on(S, **(of | wrong))
    with pytest.raises(ValueError, match="square"):
        on(S[:2], **(of | {"ids": [4, 4]}))


def test_one_set_has_the_gradient_of_both_roles() -> None:
    x = np.random.default_rng(19).normal(size=(6, 3))
    options: dict[str, Any] = {"T": "nca", "T_params": {}, "P": "lin", "P_params": {}, "mining": "all"}
    options |= {"mining_params": {}, "ids": [0, 0, 1, 1, 1, 2], "positives": "soft", "one_set": True, "scale": 2.0}
    options |= {"positives_params": {"tau": 3.0, "at": "each"}}
    result, given = oracle(x, None, **options), oracle_similarity(x @ x.T, **options)
    close(result.G, given.G)
    close(result.gx, given.G @ x + given.G.T @ x)
    assert result.gy is None
    close(result.value, given.value)
    with pytest.raises(ValueError, match="one set"):
        oracle(x, x, **options)
    with pytest.raises(ValueError, match="one set"):
        oracle(x, None, **(options | {"one_set": False}))


def test_weights_by_ids_are_of_a_direction() -> None:
    S = np.random.default_rng(20).normal(0.2, 0.3, (4, 4))
    of: dict[str, Any] = {"P": "sig-ms", "ids": [0, 0, 1, 2], "y_ids": [1, 0, 0, 1], "positives": "soft"}
    rows, columns = [1.0, 0.5, 0.0, 2.0], [0.0, 3.0, 1.0, 1.0]
    to_y = [on(S, weight=one, directions="x→y", **of) for one in np.diag(rows)]
    to_x = [on(S, weight=one, directions="y→x", **of) for one in np.diag(columns)]
    both = on(S, weight=[rows, columns], **of)
    close(both.G, sum(one.G for one in to_y + to_x))
    close(both.value, sum(one.value for one in to_y + to_x))
    mean = on(S, weight=[rows, columns], reduction="mean", **of)
    close(mean.G, sum(one.G for one in to_y) / 3.5 + sum(one.G for one in to_x) / 5)
    close(on(S, weight=[rows, rows], reduction="mean", **of).G, on(S, weight=rows, reduction="mean", **of).G)
    with pytest.raises(ValueError, match="weight"):
        on(S, weight=rows[:3], **of)
    with pytest.raises(ValueError, match="weight"):
        on(S[:3], weight=rows[:3], **(of | {"ids": [0, 0, 1]}))


@pytest.mark.parametrize(("mining", "mining_params"), MINING)
@pytest.mark.parametrize(("positives", "positives_params"), [row for row in BY_IDS if "hardness" not in row[1]])
def test_one_row_of_every_id_is_a_pair(
    positives: str, positives_params: Params, mining: str, mining_params: Params
) -> None:
    S = np.random.default_rng(21).normal(0.2, 0.3, (6, 6))
    of: dict[str, Any] = {"mining": mining, "mining_params": mining_params, "weight": [1, 2, 0, 0.5, 1, 1]}
    of |= {"reduction": "mean", "scale": 2.0}
    for T, P in (("con", "con"), ("con", "sig-ms"), ("nca", "lin"), ("cir", "lin-ms")):
        pair = on(S, T, P, **of)
        ids = on(S, T, P, ids=range(6), positives=positives, positives_params=positives_params, **of)
        close(ids.s_pos, [pair.s_pos] * 2)
        for actual, expected in zip(ids[:4] + ids[5:], pair[:4] + pair[5:], strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None:
                close(actual, expected)


def test_soft_positives_lie_between_the_hardest_and_the_mean() -> None:
    S = np.random.default_rng(22).normal(0.2, 0.3, (5, 7))
    of: dict[str, Any] = {"T": "nca", "P": "sig-ms", "ids": [0, 0, 1, 1, 2], "y_ids": [0, 0, 0, 1, 1, 2, 3]}
    hardest = on(S, positives="hardest", **of)
    for at in ("aggregate", "each"):
        sharp = on(S, positives="soft", positives_params={"tau": 1e7, "at": at}, **of)
        near(sharp.s_pos, hardest.s_pos)
        near(sharp.G, hardest.G)
        near(sharp.value, hardest.value)
    flat: dict[str, Any] = of | {"positives": "soft", "positives_params": {"tau": 0.0}}
    means = [S[0, :3].mean(), S[1, :3].mean(), S[2, 3:5].mean(), S[3, 3:5].mean(), S[4, 5]]
    close(on(S, **flat).s_pos[0], [*means, np.inf, np.inf])
    # of a tau near 0 the shares alone have the mean as their limit: s̃⁺ has the term −log n / tau
    nearly = {"positives_params": {"tau": 1e-7}}
    constant = {"T": "con", "P": "con"}
    near(on(S, **(flat | nearly | constant)).G, on(S, **(flat | constant)).G)


def groups(S: Array, ids: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of one set: whose positive and whose negative each row is."""
    alike = np.equal.outer(ids, ids)
    return alike & ~np.eye(len(S), dtype=bool), ~alike


GROUPED = np.array([0, 0, 0, 1, 1, 2, 3, 3])  # row 5 has no positive
ONE_SET: dict[str, Any] = {"ids": GROUPED, "positives": "soft", "one_set": True}


@pytest.mark.parametrize("tau", [1.0, 7.5])
def test_con_of_the_mean_positive_is_the_supervised_contrastive_loss(tau: float) -> None:
    """Khosla et al. 2020, L_out: log Σ e^{τ s} over all others less the mean of τ s over the positives."""
    S = np.random.default_rng(23).normal(0.2, 0.3, (8, 8))
    own, other = groups(S, GROUPED)
    has, total = np.asarray(own.any(1)), (e(tau * S) * (own | other)).sum(1)
    of: dict[str, Any] = {
        "mining": "soft",
        "mining_params": {"tau": tau, "over": "candidates"},
        "scale": tau,
        **ONE_SET,
    }
    result = on(S, positives_params={"tau": 0.0}, **of)
    count = np.maximum(own.sum(1), 1)
    close(result.value, (ln(total) - (tau * S * own).sum(1) / count)[has].sum())
    close(result.G, tau * has[:, None] * (e(tau * S) * (own | other) / total[:, None] - own / count[:, None]))
    mean = on(S, positives_params={"tau": 0.0}, reduction="mean", **of)
    close(mean.value, result.value / 8)  # row 5 counts


@pytest.mark.parametrize("tau", [1.0, 7.5])
def test_con_of_positives_by_their_likeness_is_nca(tau: float) -> None:
    """Goldberger et al. 2004, in the logarithm: −log(Σ_P e^{τ s} / Σ e^{τ s})."""
    S = np.random.default_rng(24).normal(0.2, 0.3, (8, 8))
    own, other = groups(S, GROUPED)
    has, likeness = np.asarray(own.any(1)), e(tau * S)
    near_own, total = (likeness * own).sum(1), (likeness * (own | other)).sum(1)
    of: dict[str, Any] = {
        "mining": "soft",
        "mining_params": {"tau": tau, "over": "candidates"},
        "scale": tau,
        **ONE_SET,
    }
    result = on(S, positives_params={"tau": -tau}, **of)
    close(result.value, -ln(near_own[has] / total[has]).sum())
    shares = likeness * own / np.where(has, near_own, 1)[:, None]
    close(result.G, tau * has[:, None] * (likeness * (own | other) / total[:, None] - shares))


@pytest.mark.parametrize(("alpha", "beta", "lam"), [(2.0, 50.0, 1.0), (3.0, 7.0, 0.2)])
@pytest.mark.parametrize("ids", [GROUPED, np.zeros(8, np.int64), np.arange(8)])
def test_con_and_sig_of_soft_sets_is_the_multi_similarity_loss(
    ids: NDArray[np.int64], alpha: float, beta: float, lam: float
) -> None:
    """Wang et al. 2019, without its mining; an anchor without positives or negatives has log 1 for them."""
    S = np.random.default_rng(25).normal(0.2, 0.3, (8, 8))
    own, other = groups(S, ids)
    pulls, pushes = e(-alpha * (S - lam)) * own, e(beta * (S - lam)) * other
    of: dict[str, Any] = {"P_params": {"alpha": alpha, "beta": beta, "lam": lam}, "mining": "soft"}
    of |= {"mining_params": {"tau": beta}, "positives": "soft", "positives_params": {"tau": alpha}, "ids": ids}
    result = on(S, P="sig", one_set=True, **of)
    close(result.value, (ln(1 + pulls.sum(1)) / alpha + ln(1 + pushes.sum(1)) / beta).sum())
    close(result.G, pushes / (1 + pushes.sum(1, keepdims=True)) - pulls / (1 + pulls.sum(1, keepdims=True)))
    # and of two sets, both ways: a row is a positive of itself there
    alike = ids[:, None] == ids
    pulls = e(-alpha * (S - lam)) * alike
    both = on(S, P="sig", **of)
    close(both.value, sum((ln(1 + pulls.sum(i)) / alpha + ln(1 + pushes.sum(i)) / beta).sum() for i in (0, 1)))
    close(
        both.G,
        sum(pushes / (1 + pushes.sum(i, keepdims=True)) - pulls / (1 + pulls.sum(i, keepdims=True)) for i in (0, 1)),
    )


@pytest.mark.parametrize(("positives", "positives_params"), BY_IDS)
@pytest.mark.parametrize(("mining", "mining_params"), MINING)
def test_swapping_x_and_y_transposes_by_ids(
    mining: str, mining_params: Params, positives: str, positives_params: Params
) -> None:
    S, ids, y_ids = np.random.default_rng(26).normal(0.2, 0.3, (7, 5)), np.arange(7) % 4, np.arange(5) % 3
    options: dict[str, Any] = {"mining": mining, "mining_params": mining_params, "reduction": "mean"}
    options |= {"positives": positives, "positives_params": positives_params}
    for T, P in (("con", "lin"), ("cir", "sig-ms")):
        one, other = on(S, T, P, ids=ids, y_ids=y_ids, **options), on(S.T, T, P, ids=y_ids, y_ids=ids, **options)
        assert one.G.any()
        close(one.G, other.G.T)
        close(one.value, other.value)
        close(one.s_pos, other.s_pos[::-1])
        parts = [on(S, T, P, ids=ids, y_ids=y_ids, directions=directions, **options) for directions in DIRECTIONS[-2:]]
        close(one.G, parts[0].G + parts[1].G)
        close(one.value, parts[0].value + parts[1].value)


@pytest.mark.parametrize(("positives", "positives_params"), BY_IDS)
@pytest.mark.parametrize(("mining", "mining_params"), [row for row in MINING if row[1] != SUMMED_ONCE])
def test_con_balances_by_ids(mining: str, mining_params: Params, positives: str, positives_params: Params) -> None:
    """With P = con an anchor that has positives and negatives pulls as much as it pushes."""
    S = np.random.default_rng(27).normal(0.2, 0.3, (8, 8))
    of: dict[str, Any] = {"mining": mining, "mining_params": mining_params, "ids": GROUPED, "one_set": True}
    for T, T_params in TERMS_T:
        result = on(S, T, T_params=T_params, positives=positives, positives_params=positives_params, **of)
        assert_allclose(np.delete(result.G, 5, 0).sum(1), 0, atol=1e-14)
        assert result.G.any() or mining == "semi-hard"


# ── a scale, and one direction ─────────────────────────────────────────────────────────────────────────


def test_one_direction_by_hand() -> None:
    # as in two pairs by hand: rows −0.2 and −0.3, columns −0.4 and −0.1
    S = [[0.5, 0.3], [0.1, 0.4]]
    rows, columns = on(S, directions="x→y"), on(S, directions="y→x")
    close(rows.G, [[-1, 1], [1, -1]])
    close(rows.value, -0.5)
    close(columns.value, -0.5)
    close(on(S, directions="x→y", weight=[1, 0]).value, -0.2)
    close(on(S, directions="y→x", weight=[1, 0]).value, -0.4)
    close(on(S, directions="y→x", weight=[1, 0]).G, [[-1, 0], [1, 0]])
    close(on(S, directions="x→y", reduction="mean").G, rows.G / 2)  # of the K anchors of the direction
    close(rows.s_neg, on(S).s_neg)  # the statistics are of both
    with pytest.raises(KeyError, match="unheard"):
        on(S, directions="unheard")


@pytest.mark.parametrize(("mining", "mining_params"), MINING)
def test_scale_is_linear_and_directions_add_up(mining: str, mining_params: Params) -> None:
    S = np.random.default_rng(10).normal(0.2, 0.3, (5, 7))
    options: dict[str, Any] = {"mining": mining, "mining_params": mining_params, "weight": [1, 2, 0, 0.5, 1]}
    options |= {"ids": [1, 1, 2, 3, 4], "y_ids": [1, 2, 2, 3, 4, 1, 5], "reduction": "mean"}
    for T, P in (("con", "sig-ms"), ("nca", "lin")):
        plain, scaled = on(S, T, P, **options), on(S, T, P, scale=2.5, **options)
        close(scaled.G, 2.5 * plain.G)
        close(scaled.value, 2.5 * plain.value)
        close(scaled.s_neg, plain.s_neg)
        x, y = (on(S, T, P, directions=directions, **options) for directions in ("x→y", "y→x"))
        close(x.G + y.G, plain.G)
        close(x.value + y.value, plain.value)
        assert x.G.any()
        assert y.G.any()
        assert not x.G[2].any()  # a weightless row; columns beyond K are no anchors
        assert not y.G[:, [2, 5, 6]].any()


def test_embeddings_pass_scale_and_directions_on() -> None:
    rng = np.random.default_rng(12)
    x, y = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    options: dict[str, Any] = {"T": "nca", "T_params": {}, "P": "lin", "P_params": {}, "mining": "soft"}
    options |= {"mining_params": {"over": "candidates"}, "scale": 3.0, "directions": "y→x"}
    result, given = oracle(x, y, **options), oracle_similarity(x @ y.T, **options)
    close(result.G, given.G)
    close(result.gx, given.G @ y)
    close(result.value, given.value)
    close(result.soft, given.soft)


def test_selective_default_eps_is_one_hundredth_each_way() -> None:
    for hardest, fallback in ((0.509, True), (0.511, False), (0.491, True), (0.489, False)):
        result = on([[0.5, hardest, 0.1]], mining="selective")
        close(result.G, [[-1, 0.5, 0.5] if fallback else [-1, 1, 0]])


def test_selective_mean_counts_the_hinge_zeros() -> None:
    # |s⁺ − max s| = 0: mean of relu(0.5 − 0.5 + 0.2), relu(0.4 − 0.5 + 0.2), relu(0.1 − 0.5 + 0.2) = 0.3 / 3
    result = on([[0.5, 0.5, 0.4, 0.1]], T_params={"margin": 0.2}, mining="selective")
    close(result.value, 0.1)
    close(result.G, [[-2 / 3, 1 / 3, 1 / 3, 0]])


def test_semi_hard_bounds_are_open() -> None:
    close(on([[0.5, 0.301]], mining="semi-hard").G, [[-1, 1]])  # the default margin is 0.2
    close(on([[0.5, 0.299]], mining="semi-hard").G, [[0, 0]])
    close(on([[0.5, 0.5, 0.25]], mining="semi-hard", mining_params={"margin": 0.25}).G, [[0, 0, 0]])


def test_ties_go_to_the_lowest_index() -> None:
    for mining in ("hardest", "semi-hard", "selective"):
        close(on([[0.5, 0.1, 0.4, 0.4]], mining=mining).G, [[-1, 0, 1, 0]])
    assert on([[0.5, 0.1, 0.4, 0.4]]).index.tolist() == [[2], [-1]]


# ── ids, further rows, weights ─────────────────────────────────────────────────────────────────────────


def test_ids_by_hand() -> None:
    S = np.array([[0.1, 0.9, 0.2], [0.8, 0.2, 0.3], [0.4, 0.5, 0.3]])
    # 0 and 1 share an id: their only negative is 2, and the pair stays a pair.
    result = on(S, ids=[7, 7, 9])
    assert result.index.tolist() == [[2, 2, 1], [2, 2, 1]]
    # rows: +(0,2) +(1,2) +(2,1), columns: +(2,0) +(2,1) +(1,2); −2 on every pair
    close(result.G, [[-2, 0, 1], [0, -2, 2], [1, 2, -2]])
    # ids of rows against ids of columns: row 0 (5) excludes column 1 (5); column 0 (6) excludes nobody
    result = on(S, ids=[5, 1, 2], y_ids=[6, 5, 3])
    assert result.index.tolist() == [[2, 0, 1], [1, 2, 1]]


def test_anchors_without_negatives_emit_nothing() -> None:
    for result in (on([[0.3]]), on([[0.1, 0.9], [0.2, 0.3]], ids=[4, 4], T="cir", P="sig-ms")):
        assert not result.G.any()
        assert result.value == 0
        assert (result.index == -1).all()
        assert (result.s_neg == -np.inf).all()
    assert result.r_pos is not None
    assert not result.r_pos.any()
    # they count in the mean, K = 2: row 0 and column 1 (id 1) have no negative, row 1 and column 0 take 0.8
    half = on([[0.1, 0.9, 0.2], [0.8, 0.2, 0.3]], ids=[1, 2], y_ids=[1, 1, 1], reduction="mean")
    close(half.G, [[-0.5, 0, 0], [1, -0.5, 0]])
    close(half.value, ((0.8 - 0.2) + (0.8 - 0.1)) / 2)


def test_further_rows_are_candidates_only() -> None:
    # K = 2: column 2 is a candidate of both rows, but no anchor; its similarities never enter min s⁺.
    S = np.array([[0.5, 0.2, 0.7], [0.1, 0.4, -0.9]])
    result = on(S)
    close(result.s_pos, [0.5, 0.4])
    assert result.index.tolist() == [[2, 0], [1, 0]]
    close(result.G, [[-2, 1, 1], [2, -2, 0]])
    close(on(S, reduction="mean").G, np.array([[-2, 1, 1], [2, -2, 0]]) / 2)
    close(on(S.T).G, result.G.T)


def test_weights_by_hand() -> None:
    S = [[0.5, 0.3], [0.1, 0.4]]
    # anchor 0, both directions, three times; anchor 1 not at all: −0.2 and −0.4
    result = on(S, weight=[3, 0])
    close(result.G, [[-6, 3], [3, 0]])
    close(result.value, 3 * (-0.2 - 0.4))
    close(on(S, weight=[3, 1], reduction="mean").G, on(S, weight=[3, 1]).G / 4)
    nothing = on(S, T="cir", P="sig-ms", weight=[0, 0], reduction="mean")
    assert not nothing.G.any()
    assert nothing.value == 0


@pytest.mark.parametrize(("P", "P_params"), TERMS_P)
def test_weights_are_linear_and_leave_the_statistics_alone(P: str, P_params: Params) -> None:
    S = np.random.default_rng(3).normal(0.2, 0.3, (5, 6))
    weight = np.array([2.0, 0.5, 0.0, 1.0, 3.0])
    options: dict[str, Any] = {"T": "nca", "P": P, "P_params": P_params, "mining": "all"}
    parts = [on(S, weight=row, **options) for row in np.diag(weight)]
    whole = on(S, weight=weight, **options)
    close(whole.G, sum(part.G for part in parts))
    close(whole.value, sum(part.value for part in parts))
    plain = on(S, **options)
    close(plain.s_neg, whole.s_neg)
    if plain.r_pos is not None:
        close(plain.r_pos, whole.r_pos)
        close(plain.r_neg, whole.r_neg)
    close(on(S, weight=weight, **(options | {"reduction": "mean"})).G, whole.G / 6.5)


# ── similarities ───────────────────────────────────────────────────────────────────────────────────────


def test_similarities_by_hand() -> None:
    x, y = np.array([3.0, 4.0]), np.array([2.0, 0.0])
    close(similarity_of("dot", x, y), 6)
    close(similarity_gradient("dot", x, y), [[2, 0], [3, 4]])
    # cosine: x̂ = (0.6, 0.8), ŷ = (1, 0), s = 0.6;
    # (ŷ − 0.6 x̂) / 5 = (0.64, −0.48) / 5, (x̂ − 0.6 ŷ) / 2 = (0, 0.8) / 2
    close(similarity_of("cosine", x, y), 0.6)
    close(similarity_gradient("cosine", x, y), [[0.128, -0.096], [0, 0.4]])
    # order: max(0, y − x) = (3, 4, 0), s = −5; s grows as x does
    x, y = np.array([1.0, 1.0, 9.0]), np.array([4.0, 5.0, 2.0])
    close(similarity_of("order", x, y), -5)
    close(similarity_gradient("order", x, y), [[0.6, 0.8, 0], [-0.6, -0.8, 0]])
    assert similarity_of("order", y, y - 1) == 0
    close(similarity_gradient("order", y, y - 1), np.zeros((2, 3)))


def test_zero_and_tiny_vectors() -> None:
    zero, x = np.zeros(2), np.array([3.0, 4.0])
    assert similarity_of("cosine", zero, x) == similarity_of("cosine", x, zero) == 0
    close(similarity_gradient("cosine", zero, x), np.zeros((2, 2)))
    close(similarity_gradient("cosine", x, zero), np.zeros((2, 2)))
    close(similarity_of("cosine", 1e-200 * x, 1e200 * x), 1)


def test_what_overflows_shows() -> None:
    # e^{2(−400 − ½)} is 0 in float64 and R⁺ is empty: P⁺ = 1 / 0; P⁻ = e^{10(−500 − ½)} = 0
    close(on([[-400.0, -500.0]], P="sig-ms").G, [[-np.inf, 0]])
    close(on([[-400.0, 500.0]], T="nca").G, [[-1, 1]])
    with pytest.raises(ValueError, match="finite"):
        on([[0.5, np.nan]])


def test_unknown_names_are_errors() -> None:
    x = np.eye(2)
    options: dict[str, Any] = {"T_params": {}, "P_params": {}, "mining_params": {}}
    options |= {"T": "con", "P": "con", "mining": "hardest"}
    for name in ("T", "P", "mining", "reduction"):
        with pytest.raises(KeyError, match="unheard"):
            oracle(x, x, **(options | {name: "unheard"}))
    with pytest.raises(ValueError, match="unheard"):
        oracle(x, x, **(options | {"similarity": "unheard"}))
    with pytest.raises(TypeError, match="tau"):
        on([[0.5, 0.3]], T_params={"tau": 1.0})
    with pytest.raises(ValueError, match="y_ids"):
        on([[0.5, 0.3]], ids=[1])


# ── the gradient is the derivative of the value ────────────────────────────────────────────────────────


def slopes(similarity: str, **options: Any) -> Iterator[tuple[float, float]]:
    """Along random directions, what the gradient says and what the value does; by ids where positives are, too."""
    rng = np.random.default_rng(11)
    batches: list[tuple[int, int | None, dict[str, Any]]] = [
        (4, 6, {"reduction": "mean"}),
        (6, 5, {"ids": [0, 1, 1, 2, 3, 0], "y_ids": [0, 1, 2, 2, 4], "weight": [1.0, 0.5, 2.0, 0.0, 1.5]}),
        (3, 4, {"ids": [0, 1, 2], "y_ids": [1, 0, 0, 0], "scale": 2.5}),  # row 0 has one negative, column 1 two
        (3, 3, {"ids": [0, 0, 0], "y_ids": [0, 0, 1], "directions": "y→x"}),  # columns 0 and 1 have none
        (3, 3, {"ids": [0, 0, 1], "y_ids": [0, 0, 0], "directions": "x→y"}),  # rows 0 and 1 have none
    ]
    if options.get("positives", "pair") != "pair":
        batches = [
            (5, 7, {"ids": [0, 0, 1, 2, 8], "y_ids": [0, 0, 0, 1, 1, 2, 9], "reduction": "mean", "scale": 2.5}),
            (
                4,
                4,
                {"ids": [0, 0, 1, 1], "y_ids": [0, 0, 1, 7], "weight": [[1.0, 0.5, 2.0, 0.0], [1.5, 0.0, 1.0, 3.0]]},
            ),
            (3, 4, {"ids": [0, 0, 5], "y_ids": [0, 0, 0, 0]}),  # rows 0 and 1 lack negatives, row 2 lacks positives
            (6, None, {"ids": [0, 0, 0, 1, 1, 2], "one_set": True, "weight": [1.0, 0.5, 2.0, 0.0, 1.5, 1.0]}),
        ]
    h = 1e-6
    for N, M, more in batches:
        x, y = rng.normal(0, 0.6, (N, 4)), None if M is None else rng.normal(0, 0.6, (M, 4))
        if y is not None:
            y[:3] += x[:3]  # some pairs closer than their negatives
        given: dict[str, Any] = {"reduction": "sum", "similarity": similarity, **options, **more}
        result = oracle(x, y, **given)
        u = rng.normal(size=x.shape)
        above, below = (oracle(x + step * u, y, **given).value for step in (h, -h))
        yield float(np.vdot(result.gx, u)), (above - below) / (2 * h)  # type: ignore[arg-type]
        if y is not None:
            u = rng.normal(size=y.shape)
            above, below = (oracle(x, y + step * u, **given).value for step in (h, -h))
            yield float(np.vdot(result.gy, u)), (above - below) / (2 * h)  # type: ignore[arg-type]


def named(term: tuple[str, Params, str, Params]) -> dict[str, Any]:
    return dict(zip(("T", "T_params", "P", "P_params"), term, strict=True))


ROOT_OF_SQUARES: Params = {"tau": 6.0, "hardness": "square", "level": "root", "at": "each"}


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize(("mining", "mining_params"), MINING)
@pytest.mark.parametrize("term", INTEGRABLE)
def test_gradient_is_the_derivative_of_the_value(
    term: tuple[str, Params, str, Params], mining: str, mining_params: Params, similarity: str
) -> None:
    """Where the table says so, and nowhere else but for the root of squares, where P⁻ is s⁻."""
    of = slopes(similarity, mining=mining, mining_params=mining_params, **named(term))
    said, true = np.array(list(of)).T
    stays = stays_integrable(term, mining, mining_params) or (mining_params == ROOT_OF_SQUARES and term[2] == "lin")
    if stays:
        assert_allclose(said, true, rtol=1e-7, atol=1e-8)
    else:
        assert np.abs(said - true).max() > 1e-4


@pytest.mark.parametrize(("positives", "positives_params"), BY_IDS)
@pytest.mark.parametrize(("mining", "mining_params"), MINING)
def test_gradient_by_ids_is_the_derivative_of_the_value(
    mining: str, mining_params: Params, positives: str, positives_params: Params
) -> None:
    by_ids: dict[str, Any] = {"positives": positives, "positives_params": positives_params}
    for number, term in enumerate(INTEGRABLE):
        stays = stays_integrable(term, mining, mining_params, positives, positives_params)
        similarity = SIMILARITIES[number % len(SIMILARITIES)] if stays else "dot"
        of = slopes(similarity, mining=mining, mining_params=mining_params, **named(term), **by_ids)
        said, true = np.array(list(of)).T
        if stays:
            assert_allclose(said, true, rtol=1e-7, atol=1e-8)
        elif mining_params != ROOT_OF_SQUARES or term[2] != "lin":
            assert np.abs(said - true).max() > 1e-4, term


# ── identities ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("T", "T_params"), TERMS_T)
@pytest.mark.parametrize(
    ("mining", "mining_params"), [(mining, params) for mining, params in MINING if params != SUMMED_ONCE]
)
def test_con_pairs_balance(T: str, T_params: Params, mining: str, mining_params: Params) -> None:
    """With P = con every anchor pulls as much as it pushes: one anchor's entries sum to 0."""
    S = np.random.default_rng(5).normal(0.2, 0.3, (6, 6))
    for k in range(6):
        result = on(S, T, T_params=T_params, mining=mining, mining_params=mining_params, weight=np.eye(6)[k])
        assert_allclose([result.G[k].sum() + np.delete(result.G[:, k], k).sum()], [0], atol=1e-14)
        untouched = np.delete(np.delete(result.G, k, 0), k, 1)
        assert not untouched.any()


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(("mining", "mining_params"), MINING)
@pytest.mark.parametrize("P", ["lin-ms", "sig-ms"])
def test_swapping_x_and_y_transposes(mining: str, mining_params: Params, P: str, similarity: str) -> None:
    rng = np.random.default_rng(6)
    x, y, ids, y_ids = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)), np.arange(7) % 4, np.arange(5) % 3
    options: dict[str, Any] = {
        "T": "cir",
        "T_params": {},
        "P": P,
        "P_params": {},
        "mining": mining,
        "mining_params": mining_params,
        "similarity": similarity,
    }
    one, other = oracle(x, y, ids=ids, y_ids=y_ids, **options), oracle(y, x, ids=y_ids, y_ids=ids, **options)
    close(one.G, other.G.T)
    close(one.gx, other.gy)
    close(one.gy, other.gx)
    close(one.index, other.index[::-1])
    close(one.value, other.value)
    if one.soft is not None and other.soft is not None:
        close(one.soft, other.soft[::-1])
    one = oracle(x, y, ids=ids, y_ids=y_ids, directions="x→y", **options)
    other = oracle(y, x, ids=y_ids, y_ids=ids, directions="y→x", **options)
    close(one.G, other.G.T)
    close(one.value, other.value)


def test_sum_of_hinges_is_the_textbook_one() -> None:
    S = np.random.default_rng(7).normal(0.2, 0.3, (9, 9))
    d, off = np.diag(S), ~np.eye(9, dtype=bool)
    by_row, by_col = (S - d[:, None] + 0.2).clip(0) * off, (S - d[None, :] + 0.2).clip(0) * off
    margin = {"margin": 0.2}
    summed = on(S, T_params=margin, mining="all", mining_params={"average": False})
    close(summed.value, by_row.sum() + by_col.sum())
    G = (by_row > 0).astype(float) + (by_col > 0)
    np.fill_diagonal(G, -(by_row > 0).sum(1) - (by_col > 0).sum(0))
    close(summed.G, G)
    close(on(S, T_params=margin).value, by_row.max(1).sum() + by_col.max(0).sum())


@pytest.mark.parametrize("P", ["con", "lin", "sig", "sig-ms"])
@pytest.mark.parametrize("T", ["con", "nca", "cir"])
def test_soft_lies_between_the_mean_and_the_hardest(T: str, P: str) -> None:
    S = np.random.default_rng(13).normal(0.2, 0.3, (5, 7))
    options: dict[str, Any] = {"weight": [1, 2, 0, 0.5, 1], "reduction": "mean"}
    hardest = on(S, T, P, **options)
    for at, normalise in product(("aggregate", "each"), ("sum", "mean")):
        sharp = {"tau": 1e7, "at": at, "normalise": normalise}
        soft = on(S, T, P, mining="soft", mining_params=sharp, **options)
        near(soft.soft, hardest.s_neg)
        near(soft.G, hardest.G)
        near(soft.value, hardest.value)
        over = on(S, T, P, mining="soft", mining_params={**sharp, "over": "candidates"}, **options)
        near(over.soft, np.maximum(hardest.s_neg, hardest.s_pos))
    # a small tau: s̃ is the mean negative, and all have the same share
    options |= {"mining": "soft", "mining_params": {"tau": 1e-6, "normalise": "mean"}}
    near(on(S, T, P, **options).soft, [[np.delete(view[k], k).mean() for k in range(5)] for view in (S, S.T)])
    pushes = on(S, T, P, directions="x→y", **options).G[0, 1:]
    near(pushes, np.full(6, pushes[0]))


def test_soft_at_each_sees_each_negative_as_all_does() -> None:
    """Equal shares of a small tau, T = con: the mean over all negatives."""
    S = np.random.default_rng(14).normal(0.2, 0.3, (5, 7))
    for P in ("lin", "sig", "lin-ms", "sig-ms"):
        each = on(S, P=P, mining="soft", mining_params={"tau": 1e-9, "at": "each"})
        assert_allclose(each.G, on(S, P=P, mining="all").G, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("tau", [1.0, 12.5])
def test_nca_of_soft_negatives_is_infonce(tau: float) -> None:
    """Of the same temperature, a scale of tau / 2: the mean of both cross entropies over tau · S."""
    S = np.random.default_rng(15).normal(0.2, 0.3, (6, 6))
    options: dict[str, Any] = {"T_params": {"tau": tau}, "mining": "soft", "mining_params": {"tau": tau}}
    result = on(S, "nca", reduction="mean", scale=tau / 2, **options)
    logits = tau * S
    to_y, to_x = (e(logits) / e(logits).sum(axis, keepdims=True) for axis in (1, 0))
    close(result.G, tau * ((to_y - np.eye(6)) + (to_x - np.eye(6))) / 2 / 6)
    close(result.value, -(ln(np.diag(to_y)).mean() + ln(np.diag(to_x)).mean()) / 2)
    one = on(S, "nca", reduction="mean", scale=tau, directions="y→x", **options)
    close(one.G, tau * (to_x - np.eye(6)) / 6)
    close(one.value, -ln(np.diag(to_x)).mean())


def test_con_of_all_candidates_is_infonce_too() -> None:
    """With the pair among the candidates s̃ − s⁺ is (log Σ e^{τS} − τs⁺) / τ; further columns are negatives alone."""
    S = np.random.default_rng(16).normal(0.2, 0.3, (4, 7))
    options: dict[str, Any] = {"mining": "soft", "mining_params": {"tau": 8.0, "over": "candidates"}}
    result = on(S, directions="x→y", **options)
    softmax = e(8 * S) / e(8 * S).sum(1, keepdims=True)
    close(result.G, softmax - np.eye(4, 7))
    close(result.value, -ln(np.diag(softmax)).sum() / 8)


@pytest.mark.parametrize(("t", "bias"), [(10.0, -10.0), (3.0, 0.7)])
def test_con_and_sig_of_all_negatives_pulled_once_is_siglip(t: float, bias: float) -> None:
    """Both directions push a negative and pull a pair, hence half of t: −Σ log σ(±(t s + bias)) / K."""
    S = np.random.default_rng(17).normal(0.2, 0.3, (6, 6))
    signs = 2 * np.eye(6) - 1
    loss = ln(1 + e(-signs * (t * S + bias))).sum() / 6
    slope = -signs * t / (1 + e(signs * (t * S + bias))) / 6
    sig = {"alpha": t, "beta": t, "lam": -bias / t}
    options: dict[str, Any] = {"P_params": sig, "mining": "all", "mining_params": SUMMED_ONCE, "reduction": "mean"}
    for scale, directions in ((t / 2, "both"), (t, "x→y"), (t, "y→x")):
        result = on(S, P="sig", scale=scale, directions=directions, **options)
        close(result.G, slope)
        close(result.value, loss)


def test_embeddings_give_the_matrix_and_its_chain_rule() -> None:
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(6, 3))
    options: dict[str, Any] = {"T": "nca", "T_params": {}, "P": "sig-ms", "P_params": {}}
    options |= {"mining": "all", "mining_params": {}, "reduction": "sum", "weight": [1, 2, 0, 3, 0.5]}
    options |= {"ids": [1, 2, 3, 4, 1], "y_ids": [1, 2, 2, 4, 5, 3]}
    result, given = oracle(x, y, **options), oracle_similarity(x @ y.T, **options)
    assert not np.allclose(result.G, oracle(x, y, **(options | {"weight": None})).G)
    close(result.G, given.G)
    close(result.gx, given.G @ y)
    close(result.gy, given.G.T @ x)
    close(result.value, given.value)


# ── the table ──────────────────────────────────────────────────────────────────────────────────────────

CASES = list(cases())
MINING_NAMES = {mining for mining, _ in MINING}


def test_table_covers_every_combination_once() -> None:
    def family(name: str, params: Params) -> tuple[str, bool]:
        return name, name == "con" and "margin" in params

    seen = Counter((family(c.T, c.T_params), c.P, c.mining, c.similarity, c.reduction, c.ids_case) for c in CASES)
    Ts = {family(T, T_params) for T, T_params in TERMS_T}
    Ps, minings = ({name for name, _ in terms} for terms in (TERMS_P, MINING))
    assert set(seen) == set(product(Ts, Ps, minings, SIMILARITIES, REDUCTIONS, IDS))
    assert set(seen.values()) == {1}
    assert len({c.id for c in CASES}) == len(CASES)
    for of, defaults in (("scale", SCALES), ("directions", DIRECTIONS)):
        met = Counter(getattr(case, of) for case in CASES)
        assert set(met) == set(defaults)
        assert 0.6 < met[defaults[0]] / len(CASES) < 0.73  # two thirds
        assert all(("-scale=" in c.id, "→" in c.id) == (c.scale != 1, c.directions != "both") for c in CASES)
    assert all(("-positives=" in c.id) == (c.positives != "pair") for c in CASES)
    assert [c.id for c in cases()] == [c.id for c in CASES]


def test_table_spreads_positives() -> None:
    """Pairs alone without ids, by ids alone where ids and y_ids are unrelated, half and half elsewhere."""
    for ids_case in IDS:
        met = Counter((c.positives, str(c.positives_params)) for c in CASES if c.ids_case == ids_case)
        by_ids = [met[name, str(params)] for name, params in BY_IDS]
        assert met.total() == met["pair", "{}"] + sum(by_ids)
        share = {"none": 0.0, "unrelated": 1.0}.get(ids_case, 0.5)
        assert share - 0.05 <= sum(by_ids) / met.total() <= share + 0.05
        assert ids_case == "none" or min(by_ids) > sum(by_ids) / len(by_ids) / 2


def test_pairs_of_the_table_have_equal_ids() -> None:
    for case in CASES:
        _, _, ids, y_ids, weight = make_inputs(case, 0)
        K = min(case.shape[:2])
        if case.positives == "pair":
            assert ids is None or y_ids is None or (ids[:K] == y_ids[:K]).all(), case.id
        else:
            assert ids is not None
            assert weight is None or case.shape[0] == case.shape[1]
        assert weight is None or weight.shape == (K,)


def factors(case: Case) -> tuple[Any, ...]:
    T = (case.T, "margin" in case.T_params and case.T == "con")
    return T, case.P, case.mining, case.similarity, case.reduction, case.ids_case


def uncovered(some: Iterable[Case]) -> set[Any]:
    """The values of any three factors, or of two sets of four, that never meet in these cases."""
    Ts = {(T, "margin" in params and T == "con") for T, params in TERMS_T}
    Ps, minings = ({name for name, _ in terms} for terms in (TERMS_P, MINING))
    values, rows = (Ts, Ps, minings, SIMILARITIES, REDUCTIONS, IDS), [factors(case) for case in some]
    missing: set[Any] = set()
    for of in [*combinations(range(6), 3), (0, 1, 2, 3), (1, 2, 3, 5)]:
        every = set(product(*(values[i] for i in of)))
        missing |= {(of, one) for one in every - {tuple(row[i] for i in of) for row in rows}}
    return missing


def test_covering_cases_cover() -> None:
    some = covering()
    assert uncovered(some) == set()
    assert some == covering()
    assert len(some) < len(CASES) / 4
    assert {(*factors(case)[:4], case.ids_case == "none") for case in some} == {
        (*factors(case)[:4], case.ids_case == "none") for case in CASES
    }
    variants = [("T", "T_params", TERMS_T), ("P", "P_params", TERMS_P), ("mining", "mining_params", MINING)]
    for name, params, terms in variants:
        for term in terms:
            chosen = [case for case in some if (getattr(case, name), getattr(case, params)) == term]
            assert {case.shape for case in chosen} == set(SHAPES)
            assert {case.ids_case for case in chosen} == set(IDS)
            assert name != "mining" or {case.scale != 1 for case in chosen} == {True, False}
    assert {(case.mining, case.directions) for case in some} == set(product(MINING_NAMES, DIRECTIONS))
    for positives in (PAIR, *BY_IDS):
        chosen = [case for case in some if (case.positives, case.positives_params) == positives]
        assert {case.mining for case in chosen} == MINING_NAMES
        assert {case.similarity for case in chosen} == set(SIMILARITIES)
        assert {case.scale != 1 for case in chosen} == {True, False}
        assert {case.shape for case in chosen} == set(SHAPES)
        assert {factors(case)[0] for case in chosen} == {factors(case)[0] for case in CASES}
        open_ties = {"lin-ms"} if positives not in (PAIR, *ON_GRID) else set()
        assert {case.P for case in chosen} == {P for P, _ in TERMS_P} - open_ties
    by_ids = {(case.mining, str(case.mining_params), case.positives != "pair") for case in some}
    assert by_ids == {(mining, str(params), ids) for mining, params in MINING for ids in (True, False)}


def test_covering_cases_lack_positives_and_negatives() -> None:
    """By ids, in either direction, for each mining and for each that keeps the part that an anchor has."""
    met: Counter[Any] = Counter()
    for case in covering():
        if case.positives == "pair":
            continue
        _, _, ids, y_ids, weight = make_inputs(case, 0)
        assert ids is not None
        alike = np.equal.outer(ids, ids if y_ids is None else y_ids)
        once, over = (case.mining_params.get(name) for name in ("pull", "over"))
        separate = case.T == "con" and not case.T_params
        in_parts = separate and (once is not None or (case.mining == "soft" and over is None))
        for direction, view in zip(DIRECTIONS[-2:], (alike, alike.T), strict=True):
            if case.directions not in ("both", direction):
                continue
            lacking = view[np.ones(len(view), bool) if weight is None else weight > 0]
            for lack, anchors in (("positives", (~lacking).all(1)), ("negatives", lacking.all(1))):
                met[lack, case.mining, once, over] += int(anchors.any())
                met[lack, case.mining, in_parts, direction] += int(anchors.any())
            met["several positives", case.mining, direction] += int((lacking.sum(1) > 1).any())
    assert len(met) == 2 * (len(MINING_NAMES) + 2) + 2 * 2 * (len(MINING_NAMES) + 2) + 2 * len(MINING_NAMES)
    assert min(met.values()) > 0, met


def test_covering_cases_are_missed() -> None:
    some = covering()
    for of in sorted({factors(case)[:4] for case in some})[::20]:
        assert uncovered(case for case in some if factors(case)[:4] != of), of


def test_table_spreads_parameters_and_shapes() -> None:
    """Every variant of a term meets every shape, similarity, reduction and T; no two choices move in step."""
    variants = [("T", "T_params", TERMS_T), ("P", "P_params", TERMS_P), ("mining", "mining_params", MINING)]
    for name, params, terms in variants:
        for term in terms:
            chosen = [c for c in CASES if (getattr(c, name), getattr(c, params)) == term]
            assert {c.shape for c in chosen} == set(SHAPES)
            assert {c.similarity for c in chosen} == set(SIMILARITIES)
            assert {c.reduction for c in chosen} == set(REDUCTIONS)
            assert {(c.T, str(c.T_params)) for c in chosen} >= {(T, str(p)) for T, p in TERMS_T if name != "T"}


def test_table_inputs_are_exact() -> None:
    """On a grid of 2⁻²⁰ and of norm ≤ 2: products, their sums and differences need fewer than 53 bits."""
    for case in CASES[::7]:
        x, y, *_ = make_inputs(case, 0)
        assert (x.shape, y.shape) == (case.shape[::2], case.shape[1:])
        for rows in (x, y):
            assert (rows * 2**20 == np.round(rows * 2**20)).all()
            norms = np.sqrt((rows**2).sum(1))
            assert ((norms == 0) | ((norms >= 0.3) & (norms <= 2))).all()
            if case.similarity == "cosine":
                assert set(np.frexp(norms)[0]) <= {0.0, 0.5}  # powers of two


def test_table_inputs_meet_what_is_hard() -> None:
    """Unit and spread norms, zero rows, copies, ties, violated and satisfied anchors, weights and ids."""
    met: Counter[str] = Counter()
    chosen = [case for case in CASES[::7] if case.shape[2] > 2]  # in one or two dimensions copies abound
    for case in chosen:
        x, y, ids, y_ids, weight = make_inputs(case, 0)
        N, M, _ = case.shape
        K = min(N, M)
        norms = np.linalg.norm(np.concatenate([x, y]), axis=1)
        met["unit"] += bool(np.allclose(norms[norms > 0], 1))
        met["zero row"] += bool((norms == 0).any())
        met["copies"] += len(np.unique(y, axis=0)) < M
        met["identical pair"] += bool(((x[:K] == y[:K]).all(1) & y[:K].any(1)).any())
        S = x @ y.T
        hardest = np.where(np.eye(N, M, dtype=bool), -np.inf, S)[:K].max(1, initial=-np.inf)
        met["tie at the top"] += bool(((S[:K] == hardest[:, None]).sum(1) > 1).any())
        met["tie with the pair"] += bool((hardest == np.diag(S)).any())
        met["violated"] += bool((hardest > np.diag(S)).any())
        met["satisfied"] += bool((hardest < np.diag(S)).any())
        met["weighted"] += weight is not None
        met["zero weight"] += weight is not None and bool((weight == 0).any())
        assert (ids is None) == (case.ids_case == "none")
        assert ids is None or (ids.shape == (N,) and ids.dtype == np.int64)
        assert y_ids is None or y_ids.shape == (M,)
        assert ids is None or N == M or y_ids is not None
        met["same again"] += np.array_equal(x, make_inputs(case, 0)[0])
        met["another seed"] += not np.array_equal(x, make_inputs(case, 1)[0])
    assert met["same again"] == len(chosen)
    assert met["another seed"] > len(chosen) * 0.8
    assert 0.4 < met["unit"] / len(chosen) < 0.6
    for what in (
        "zero row",
        "copies",
        "identical pair",
        "tie at the top",
        "tie with the pair",
        "violated",
        "satisfied",
        "weighted",
    ):
        assert met[what] > len(chosen) / 10, (what, met)
    assert met["zero weight"] > len(chosen) / 20
