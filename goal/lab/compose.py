"""Operations on terms: products, sums and mixtures, schedules over steps, and the split of a field into loss and rest.

The result is an ordinary term: it runs, lowers, can be read, and has the parameters of its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from goal.lab.field import decompose, field_of
from goal.terms import STATISTICS, Definition, Parameter, Product, Term
from goal.terms import P as PAIRS
from goal.terms import T as TRIPLETS
from goal.validation import check_number, whole_number

_DEGREE = 8  # of the polynomial that stands for a nearest loss

Part = str | Term | Definition


def product(a: Part, b: Part) -> Term:
    """a · b: the triplet weight T_a T_b, or the pair weight P_a⁺ P_b⁺ and P_a⁻ P_b⁻.

    Example:
        >>> import goal
        >>> from goal.lab import compose
        >>> compose.product(goal.T.con(margin=0.2), goal.T.nca())  # NCA that ends at the margin
        T.con * nca(margin=0.2, tau=10.0)
    """
    return _combined("*", a, b)


def plus(a: Part, b: Part, amount: float = 1.0) -> Term:
    """a + amount · b.

    Example:
        >>> import goal
        >>> from goal.lab import compose
        >>> compose.plus(goal.P.con(), goal.P.lin(), amount=0.5)
        P.con + lin(amount=0.5)
    """
    amount = check_number("compose.plus", "amount", amount)
    return _combined("+", a, b, amount=amount)


def mixture(a: Part, b: Part, weight: float = 0.5) -> Term:
    """(1 − weight) a + weight b, with weight in [0, 1].

    Example:
        >>> import goal
        >>> from goal.lab import compose
        >>> objective = goal.Objective(T="nca", P=compose.mixture("con", goal.P.sig(), weight=0.3))
    """
    weight = check_number("compose.mixture", "weight", weight)
    if not 0 <= weight <= 1:
        raise ValueError(f"compose.mixture: parameter 'weight' must be within [0, 1], got {weight}.")
    return _combined("|", a, b, weight=weight)


def schedule(a: Part, b: Part, steps: int) -> Callable[[int], Term]:
    """Step → the term that has gone from a to b, linearly, in so many steps; b from then on.

    Its weight is a run-time number: a step changes no compiled kernel.

    Example:
        >>> from goal.lab import compose
        >>> P = compose.schedule("con", "lin", steps=100)
        >>> P(25).params, P(1000).params
        ({'weight': 0.25}, {'weight': 1.0})
    """
    mixture(a, b)  # refused now rather than at the first step
    return _Fading(a, b, whole_number("compose.schedule: steps", steps))


def nearest_loss(T: Part, P: Part) -> Term:
    """The pair weight that, with T = con, is the gradient of the loss nearest to the field of T × P.

    That loss is the polynomial φ(s⁺, s⁻) of degree 8 that minimises ∫ |∇φ − (−T·P⁺, T·P⁻)|² over [−1, 1]²: P⁺ =
    −∂φ/∂s⁺ and P⁻ = ∂φ/∂s⁻, which both depend on s⁺ and s⁻. Relative similarities are 0. For cosines: a polynomial
    says nothing outside of the square.

    Example:
        >>> from goal import lab
        >>> lab.integrability("con", lab.compose.nearest_loss("nca", "lin")).integrable
        True
    """
    return _projected(T, P)[0]


def rotational_part(T: Part, P: Part) -> Term:
    """The pair weight that, with T = con, is the field of T × P without its nearest loss.

    Added to a loss's pair weight by `plus`, it makes that loss's gradient one of no loss.

    Example:
        >>> from goal import lab
        >>> twisted = lab.compose.plus("con", lab.compose.rotational_part("nca", "lin"), amount=0.3)
        >>> lab.integrability("con", twisted).integrable
        False
    """
    return _projected(T, P)[1]


# ----------------------------------------------------------------------------------------------------- how it is done


def _bound(*parts: Part) -> list[Term]:
    """The parts as terms of one kind, which a name alone may leave open."""
    kinds = [
        {kind for kind, registry in (("T", TRIPLETS), ("P", PAIRS)) if part in registry}
        if isinstance(part, str)
        else {part.registry if isinstance(part, Definition) else part.definition.registry}
        for part in parts
    ]
    shared = set.intersection(*kinds)
    if len(shared) != 1:
        said = "may be either; say goal.T or goal.P for one of them" if shared else "are not of one kind"
        raise ValueError(f"{' and '.join(map(repr, parts))} {said}.")
    registry = TRIPLETS if shared == {"T"} else PAIRS
    return [registry.bind(part) for part in parts]


@dataclass(frozen=True)
class _Fading:
    """Step → a mixture; no function within a function, so that it can be pickled, like those that follow."""

    a: Part
    b: Part
    steps: int

    def __call__(self, step: int) -> Term:
        return mixture(self.a, self.b, weight=min(max(step / self.steps, 0.0), 1.0))


_SIGNS: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {
    "*": lambda u, v, given: u * v,
    "+": lambda u, v, given: u + given["amount"] * v,
    "|": lambda u, v, given: u + given["weight"] * (v - u),
}


@dataclass(frozen=True)
class _Combined:
    """The function of two terms' combination; `names`: what the second's parameters are called."""

    sign: str
    first: Term
    second: Term
    names: dict[str, str]

    def __call__(self, s_pos: Tensor, s_neg: Tensor, **given: Any) -> Any:
        of, (first, second) = _SIGNS[self.sign], (self.first, self.second)
        u = first.definition.function(
            s_pos, s_neg, **{name: given[name] for name in (*first.params, *first.statistics)}
        )
        v = second.definition.function(
            s_pos, s_neg, **{n: given[self.names.get(n, n)] for n in (*second.params, *second.statistics)}
        )
        if first.definition.registry == "T":
            return of(u, v, given)
        return of(u[0], v[0], given), of(u[1], v[1], given)


def _combined(sign: str, a: Part, b: Part, **own: float) -> Term:
    """A term that calls both, with the parameters of both: one that they share and set differently gets b's with _2."""
    first, second = _bound(a, b)
    params: dict[str, Parameter] = {**own, **first.params}
    names = {}
    for name, value in second.params.items():
        names[name] = name if params.get(name, value) == value else f"{name}_2"
        params[names[name]] = value
    for statistic in set(first.statistics + second.statistics):
        reads = STATISTICS[statistic]
        if statistic in second.statistics and reads is not None and names[reads] != reads:
            raise ValueError(
                f"{first} and {second}: {statistic!r} is computed with one {reads!r}, give both the same "
                f"(got {first.params[reads]} and {second.params[reads]})."
            )

    statistics = tuple(dict.fromkeys((*first.statistics, *second.statistics)))
    name = f"{first.name} {sign} {second.name}"
    function = _Combined(sign, first, second, names)
    return Definition(first.definition.registry, name, function, params, statistics)()


@dataclass(frozen=True)
class _Nearest:
    """The gradient of Σ loss[i][j] s⁺ⁱ s⁻ʲ as a pair weight."""

    loss: list[list[float]]

    def __call__(self, s_pos: Tensor, s_neg: Tensor) -> tuple[Any, Any]:
        (a, slope_a), (b, slope_b) = _powers(s_pos), _powers(s_neg)
        terms = [(i, j, self.loss[i][j]) for i in range(_DEGREE + 1) for j in range(_DEGREE + 1 - i) if i + j]
        return (
            sum(-factor * (slope_a[i] * b[j]) for i, j, factor in terms if i),
            sum(factor * (a[i] * slope_b[j]) for i, j, factor in terms if j),
        )


@dataclass(frozen=True)
class _Rest:
    """What is left of the field of T × P."""

    whole: Product
    nearest: _Nearest

    def __call__(self, s_pos: Tensor, s_neg: Tensor, **relative: Tensor) -> tuple[Any, Any]:
        T, P = self.whole.T, self.whole.P
        t = T(s_pos, s_neg, **{name: relative[name] for name in T.statistics})
        p_pos, p_neg = P(s_pos, s_neg, **{name: relative[name] for name in P.statistics})
        of_pos, of_neg = self.nearest(s_pos, s_neg)
        return t * p_pos - of_pos, t * p_neg - of_neg


def _projected(T: Part, P: Part) -> tuple[Term, Term]:
    """The gradient of the nearest polynomial, and what is left, as pair weights for T = con."""
    whole = Product(TRIPLETS.bind(T), PAIRS.bind(P))
    field = decompose(field_of(whole))
    at = field.at.numpy()
    basis = np.polynomial.chebyshev.chebvander(at, _DEGREE)  # (n + 1, degree + 1)
    degrees = [(i, j) for i in range(_DEGREE + 1) for j in range(_DEGREE + 1 - i) if i + j]
    along_pos = [np.outer(np.diff(basis[:, i]), basis[:, j]).ravel() for i, j in degrees]
    along_neg = [np.outer(basis[:, i], np.diff(basis[:, j])).ravel() for i, j in degrees]
    edges = np.concatenate([np.array(along_pos).T, np.array(along_neg).T])
    work = np.concatenate([field.along_pos.numpy().ravel(), field.along_neg.numpy().ravel()])
    chebyshev = np.zeros((_DEGREE + 1, _DEGREE + 1))
    chebyshev[tuple(np.array(degrees).T)] = np.linalg.lstsq(edges, work)[0]
    plain = np.array([np.polynomial.chebyshev.cheb2poly(c) for c in np.eye(_DEGREE + 1)], dtype=object)
    powers = np.array([np.pad(c, (0, _DEGREE + 1 - len(c))) for c in plain])  # of s in T_n(s)
    loss = (powers.T @ chebyshev @ powers).round(6).tolist()  # [i][j]: of s⁺ⁱ s⁻ʲ

    nearest = _Nearest(loss)
    said = f"{whole.T.name} × {whole.P.name}"
    return (
        Definition("P", f"nearest loss of {said}", nearest, {})(),
        Definition("P", f"rotational part of {said}", _Rest(whole, nearest), {}, whole.statistics)(),
    )


def _powers(s: Tensor) -> tuple[list[Any], list[Any]]:
    """1, s, s², … and their derivatives."""
    powers: list[Any] = [1.0, s]
    for _ in range(_DEGREE - 1):
        powers.append(powers[-1] * s)
    return powers, [0.0, *(n * powers[n - 1] for n in range(1, _DEGREE + 1))]
