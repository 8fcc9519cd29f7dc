"""From a loss to its terms: the triplet weight and the pair weights whose product is the gradient of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sympy as sp
import torch
from torch import Tensor

from goal.lab.field import Field, gradient_of, scattered
from goal.lab.read import S_NEG, S_POS, CannotRead, Reading, read_function, torch_function, torch_source
from goal.lab.verdict import _tidy
from goal.terms import Definition, Term

_CLOSE = 1e-8  # relative to the largest product met: what rounding may leave of r(a, b) r(a₀, b₀) − r(a, b₀) r(a₀, b)
Weight = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Dissection:
    """What `goal.lab.dissect` found.

    Attributes:
        factors: whether −∂l/∂s⁺ = T·P⁺(s⁺) and ∂l/∂s⁻ = T·P⁻(s⁻) for some T, P⁺ and P⁻.
        T, P: the terms, ready for `goal.apply(T=..., P=...)`; None where the gradient does not factor.
        expressions: T, P⁺ and P⁻ in SymPy; None where the loss was not read.
        gauge: what fixes the free factor c of T → c T, P± → P± / c.
        why: where it does not factor, what stands in the way.
        unread: why the loss could not be read in symbols, or None.
    """

    factors: bool
    T: Term | None
    P: Term | None
    expressions: tuple[sp.Expr, sp.Expr, sp.Expr] | None
    gauge: str
    why: str
    unread: str | None

    def source(self, name: str) -> str:
        """A definition of both terms that can be pasted, registered under `name`.

        Raises:
            ValueError: the gradient does not factor, or was found in numbers alone.
        """
        if self.expressions is None:
            raise ValueError(f"There is no source: {self.why or self.unread}")
        t, p_pos, p_neg = map(torch_source, self.expressions)
        function = name.replace("-", "_")
        return (
            f'@goal.triplet_weight("{name}")\ndef {function}_t(s_pos, s_neg):\n    return {t}\n\n\n'
            f'@goal.pair_weight("{name}")\ndef {function}_p(s_pos, s_neg):\n    return {p_pos}, {p_neg}\n'
        )

    def __repr__(self) -> str:
        if not self.factors:
            return f"no T × P: {self.why}"
        if self.expressions is None:
            return f"T × P, in numbers alone ({self.unread}); gauge: {self.gauge}"
        t, p_pos, p_neg = self.expressions
        return f"T  = {t}\nP⁺ = {p_pos}\nP⁻ = {p_neg}\ngauge: {self.gauge}"


def dissect(loss: Callable[[Tensor, Tensor], Tensor]) -> Dissection:
    """The terms of a triplet loss l(s⁺, s⁻): T and P± with −∂l/∂s⁺ = T·P⁺(s⁺) and ∂l/∂s⁻ = T·P⁻(s⁻).

    With A = −∂l/∂s⁺ and B = ∂l/∂s⁻, such terms exist iff A / B = P⁺(s⁺) / P⁻(s⁻) is a product of functions of one
    similarity each, and they are unique up to a constant, T → c T, P± → P± / c, the gauge. Where T is constant it is
    chosen as 1; else P⁺(0) is 1, or P⁺(½), or P⁻(½), the first that can be. T has to be ≥ 0.

    Args:
        loss: an ordinary function of tensors (s⁺, s⁻) of one shape, elementwise; torch operators. It is read in
            symbols if it can be, and differentiated by autograd otherwise.

    Returns:
        A `Dissection`, which prints as the terms, or as the reason why there are none.

    Raises:
        ValueError: the loss is not finite, or not differentiable, somewhere on (−1, 1)².

    Example:
        >>> from torch.nn.functional import softplus
        >>> from goal import lab
        >>> lab.dissect(lambda s_pos, s_neg: softplus(10 * ((1 - s_pos) ** 2 + s_neg**2 - 0.5)) / 20)
        T  = sigmoid(10*s_neg**2 + 10*(s_pos - 1)**2 - 5)
        P⁺ = 1 - s_pos
        P⁻ = s_neg
        gauge: P⁺(0) = 1
        >>> lab.dissect(lambda s_pos, s_neg: (s_pos * s_neg - 1) ** 2 - s_pos)
        no T × P: -(∂l/∂s⁺)/(∂l/∂s⁻) is no P⁺(s⁺)/P⁻(s⁻), for instance between (s⁺, s⁻) = (...) and (...)

    Source: the converse of Xuan and Chen (2023), who read T and P off known losses.
    """
    field = gradient_of(loss)
    a, b = _points()
    with torch.no_grad():
        value = loss(a, b)
    if not value.isfinite().all():
        bad = int((~value.isfinite()).nonzero()[0])
        raise ValueError(f"loss: it is {value[bad]:g} at (s⁺, s⁻) = ({a[bad]:.3f}, {b[bad]:.3f}).")
    why = _obstacle(field)
    if why:
        return Dissection(False, None, None, None, "", why, None)
    expressions, gauge, unread = None, "", None
    try:
        reading = read_function(loss, "the loss")
    except CannotRead as error:
        unread = str(error)
    else:
        expressions, gauge = _in_symbols(reading, field)
        unread = None if expressions else "SymPy found no closed form of its terms"
    if expressions is not None:
        weights = tuple(torch_function(expression, {}) for expression in expressions)
    else:
        weights, gauge = _in_numbers(field)
    t = weights[0](a, b)
    if (t < -1e-9 * t.abs().max()).any():
        worst = t.argmin()
        why = f"T would have both signs, and be {t[worst]:.3g} at (s⁺, s⁻) = ({a[worst]:.3f}, {b[worst]:.3f})"
        return Dissection(False, None, None, None, "", why, None)
    return Dissection(True, *_terms(*weights), expressions, gauge, "", unread)


def _points() -> tuple[Tensor, Tensor]:
    """(4096,) s⁺ and s⁻, where a factorisation is tried."""
    return scattered(4096, seed=2)


def _components(field: Field, s_pos: Tensor, s_neg: Tensor) -> tuple[Tensor, Tensor]:
    """A = −∂l/∂s⁺ = T·P⁺ and B = ∂l/∂s⁻ = T·P⁻."""
    f_pos, f_neg = field(s_pos, s_neg)
    return -f_pos, f_neg


def _obstacle(field: Field) -> str:
    """Why the gradient does not factor; nothing if it does."""
    a, b = _points()
    A, B = _components(field, a, b)
    if not (A.isfinite().all() and B.isfinite().all()):
        bad = int((~(A.isfinite() & B.isfinite())).nonzero()[0])
        raise ValueError(f"loss: its gradient is ({-A[bad]}, {B[bad]}) at (s⁺, s⁻) = ({a[bad]:.3f}, {b[bad]:.3f}).")
    if not (A.any() or B.any()):
        return "its gradient is 0 everywhere on [−1, 1]²"
    # r(a, b) r(a₀, b₀) = r(a, b₀) r(a₀, b) for r = A / B, without dividing
    others = torch.randperm(len(a), generator=torch.Generator().manual_seed(0), device="cpu")
    a0, b0, A0, B0 = a[others], b[others], A[others], B[others]
    (A1, B1), (A2, B2) = _components(field, a, b0), _components(field, a0, b)
    left, right = A * A0 * B1 * B2, B * B0 * A1 * A2
    off = (left - right).abs()
    if (off > _CLOSE * (left.abs() + right.abs()).max()).any():
        at = int(off.argmax())
        return (
            "-(∂l/∂s⁺)/(∂l/∂s⁻) is no P⁺(s⁺)/P⁻(s⁻), for instance between (s⁺, s⁻) = "
            f"({a[at]:.3f}, {b[at]:.3f}) and ({a0[at]:.3f}, {b0[at]:.3f})"
        )
    return ""


def _reference(field: Field) -> tuple[float, float]:
    """(a₀, b₀): where most of the line s⁻ = b₀, and of the line s⁺ = a₀, has a gradient of both kinds."""
    at = torch.tensor([0.5, 0.0, 0.75, 0.25, -0.5, 1.0, -0.25, -0.75, -1.0], dtype=torch.float64, device="cpu")
    probe = torch.linspace(-0.97, 0.97, 61, dtype=torch.float64, device="cpu")
    along, across = _components(field, probe[:, None], at), _components(field, at, probe[:, None])
    a0, b0 = (at[((A != 0) & (B != 0)).sum(0).argmax()].item() for A, B in (across, along))
    return a0, b0


def _in_symbols(reading: Reading, field: Field) -> tuple[tuple[sp.Expr, sp.Expr, sp.Expr] | None, str]:
    """T, P⁺ and P⁻ in closed form, and the gauge; None where SymPy does not find one that gives the same field."""
    A, B = -sp.diff(reading.results[0], S_POS), sp.diff(reading.results[0], S_NEG)
    a0, b0 = (sp.Rational(each) for each in _reference(field))
    for p_pos, p_neg in _halves(reading, A, B, a0, b0):
        t = sp.simplify(A / p_pos if p_pos != 0 else B / p_neg)
        gauges = {
            "T = 1": 1 / t if not reading.depends(t, S_POS, S_NEG) else sp.nan,
            "P⁺(0) = 1": p_pos.subs(S_POS, 0),
            "P⁺(½) = 1": p_pos.subs(S_POS, sp.Rational(1, 2)),
            "P⁻(½) = 1": p_neg.subs(S_NEG, sp.Rational(1, 2)),
        }
        usable = (g for g, unit in gauges.items() if unit.is_number and unit.is_finite and unit != 0)
        gauge = next(usable, None)
        if gauge is None:
            continue
        t, p_pos, p_neg = t * gauges[gauge], p_pos / gauges[gauge], p_neg / gauges[gauge]
        expressions = tuple(reading.shown(_tidy(each)) for each in (t, p_pos, p_neg))
        if _same(expressions, field):
            return expressions, gauge
    return None, ""


def _halves(reading: Reading, A: sp.Expr, B: sp.Expr, a0: sp.Expr, b0: sp.Expr) -> Iterator[tuple[sp.Expr, sp.Expr]]:
    """P⁺ and P⁻ up to a common factor, in the ways in which they may be found."""
    if B == 0:
        yield (A if not A.has(S_NEG) else sp.Integer(1)), sp.Integer(0)
    elif A == 0:
        yield sp.Integer(0), (B if not B.has(S_POS) else sp.Integer(1))
    else:
        ratio = sp.simplify(A / B)
        p_pos, inverse = ratio.subs(S_NEG, b0), ratio.subs(S_POS, a0)
        at = {S_POS: a0, S_NEG: b0}
        switched = any((p_pos * inverse).has(h) for h, _ in reading.switches)
        if not switched and ratio.subs(at) not in (0, sp.nan, sp.zoo):
            yield sp.simplify(p_pos), sp.simplify(ratio.subs(at) / inverse)
        if not reading.depends(A, S_NEG) and not reading.depends(B, S_POS):
            yield A, B


def _same(expressions: tuple[sp.Expr, ...], field: Field) -> bool:
    """Whether T·P⁺ and T·P⁻ are the field."""
    a, b = _points()
    try:
        t, p_pos, p_neg = (torch_function(each, {})(a, b) for each in expressions)
    except CannotRead:  # SymPy made something of it that torch has not
        return False
    pairs = zip((t * p_pos, t * p_neg), _components(field, a, b), strict=True)
    return all(bool(torch.allclose(found, true, rtol=1e-8, atol=1e-9)) for found, true in pairs)


def _in_numbers(field: Field) -> tuple[tuple[Weight, Weight, Weight], str]:
    """T, P⁺ and P⁻ as functions that ask the loss for its gradient along s⁻ = b₀ and s⁺ = a₀."""
    a0, b0 = _reference(field)

    def ratio(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        A, B = _components(field, s_pos, s_neg)
        return torch.where(B == 0, 0.0, A / torch.where(B == 0, 1.0, B))

    unit = ratio(torch.tensor([a0], device="cpu"), torch.tensor([b0], device="cpu"))

    def p_pos(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        return ratio(s_pos, torch.full_like(s_pos, b0)) / unit

    def p_neg(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        A, B = _components(field, torch.full_like(s_neg, a0), s_neg)
        return torch.where(A == 0, 0.0, B / torch.where(A == 0, 1.0, A))

    def t(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        A, B = _components(field, s_pos, s_neg)
        own, other = p_pos(s_pos, s_neg), p_neg(s_pos, s_neg)
        of_pos, of_neg = (torch.where(p == 0, 0.0, f / torch.where(p == 0, 1.0, p)) for f, p in ((A, own), (B, other)))
        return torch.where(own.abs() > other.abs(), of_pos, of_neg)

    return (t, p_pos, p_neg), f"P⁺({a0:g}) = 1"


def _terms(t: Weight, p_pos: Weight, p_neg: Weight) -> tuple[Term, Term]:
    """The weights as terms that nobody registered."""

    def triplet(s_pos: Tensor, s_neg: Tensor) -> Tensor:
        return t(s_pos, s_neg).to(s_neg.dtype)

    def pair(s_pos: Tensor, s_neg: Tensor) -> tuple[Tensor, Tensor]:
        return p_pos(s_pos, s_neg).to(s_pos.dtype), p_neg(s_pos, s_neg).to(s_neg.dtype)

    return Definition("T", "dissected", triplet, {})(), Definition("P", "dissected", pair, {})()
